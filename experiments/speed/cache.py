"""How much faster an epoch is when the frozen part of an encoder was computed before, and what that takes on the disk.

    python experiments/speed/cache.py [--records N] [--rounds N] [--only KIND]

A ViT-Tiny (12 blocks, 192 wide, 16 x 16 patches) with drawn weights on images of 224 x 224 pixels, one image a patient,
every patient in every step of 16; patient-level DP-SGD, one thread. Sides alternate; medians are printed.
"""

import argparse
import hashlib
import json
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from transformers import ViTConfig, ViTModel

from fedmed.compose import compose
from fedmed.config import RunConfig
from fedmed.data.dataset import Manifest, SiteDataset
from fedmed.models.activations import ActivationCache
from fedmed.models.build import build
from fedmed.models.classifier import Batch, Classifier
from fedmed.privacy.plan import PrivacyPlan, make_plan
from fedmed.privacy.randomness import operating_system, seeded
from fedmed.training import local_parts, one_thread, train

SIZE, STEP = 224, 16


def encoder(folder: Path) -> Path:
    """A folder with the encoder, as a hub would give it."""
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=192, num_hidden_layers=12, num_attention_heads=3, intermediate_size=768, image_size=SIZE
    )
    ViTModel(config, add_pooling_layer=False).save_pretrained(folder)
    written = {"image_processor_type": "ViTImageProcessor", "size": {"height": SIZE, "width": SIZE}}
    (folder / "preprocessor_config.json").write_text(json.dumps(written))
    return folder


def made_up(records: int) -> SiteDataset:
    draws = np.random.default_rng(0)
    return SiteDataset(
        site="made up", features=np.zeros((records, 0), np.float32), texts=[],
        labels=draws.integers(0, 2, records).astype(np.float32), patients=np.arange(records),
        images=draws.uniform(size=(records, 1, SIZE, SIZE)).astype(np.float32), test=np.zeros(records, bool),
        manifest=Manifest(content_sha256="made up", reader="none", records=records, patients=records, positives=0),
    )  # fmt: skip


def seconds(model: Classifier, batch: Batch, data: SiteDataset, plan: PrivacyPlan, training: object) -> float:
    """Of one epoch."""
    part, _ = local_parts(batch, data)
    arrays = model.initialise(0)
    began = time.process_time()
    train(model, part, arrays, plan=plan, training=training, source=operating_system())  # type: ignore[arg-type]
    return time.process_time() - began


def update_error(
    model: Classifier, batches: list[Batch], data: SiteDataset, run: RunConfig, plan: PrivacyPlan
) -> float:
    """The L2 norm of the difference of two updates over that of the first: the same patients, no noise."""
    found = []
    for batch in batches:
        arrays, draws = model.initialise(0), np.random.default_rng(0)
        # A head of zeros sends no gradient to the layers below it.
        arrays = {name: a + draws.normal(0, 0.02, a.shape).astype(np.float32) for name, a in arrays.items()}
        silent = replace(plan, noise_multiplier=0.0)
        part, _ = local_parts(batch, data)
        delta = train(model, part, arrays, plan=silent, training=run.training, source=seeded(0)).delta
        found.append(np.concatenate([values.ravel() for values in delta.values()]))
    return float(np.linalg.norm(found[1] - found[0]) / np.linalg.norm(found[0]))


def measured(
    folder: Path, records: int, rounds: int, *overrides: str
) -> tuple[float, float, float, int, float]:
    """Seconds of an epoch without anything stored, and from the cache; to fill it; its bytes a record; and how much
    another an update is."""
    steps = max(1, records // STEP)
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    run = compose(
        ["task=dicom", "task.path=none", f"task.declared_sizes={{a: {records * 2}}}", "task.test_fraction=0.5",
         f"task.image_size={SIZE}", "model=hf_image", f"model.path={folder}", f"model.sha256={digest}",
         "tracking=none", "privacy.epsilon=null", "privacy.noise_multiplier=1", "rounds=1",
         f"training.steps_per_round={steps}", f"training.sample_rate={STEP / records}", *overrides]
    )  # fmt: skip
    model, data = build(run.task, run.model, run.adapter), made_up(records)
    plan = make_plan(run, "a")
    with tempfile.TemporaryDirectory() as place:
        cache = ActivationCache(Path(place), 10**11)
        began = time.process_time()
        model.prepare(data, cache=cache)
        fill = time.process_time() - began
        stored = model.prepare(data, cache=cache)
        size = (cache.entries()[0].stat().st_size - 4096) // records
        plain = {"images": model.preprocessor.cut(torch.from_numpy(data.images))}  # type: ignore[attr-defined]
        # The first epoch pays for the accountant as well.
        seconds(model, stored, data, plan, run.training)
        sides = [
            [seconds(model, batch, data, plan, run.training) for batch in (plain, stored)]
            for _ in range(rounds)
        ]
        error = update_error(model, [plain, stored], data, run, plan)
    without, with_cache = (statistics.median(side) for side in zip(*sides, strict=True))
    return without, with_cache, fill, size, error


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--records", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", default="", help="kinds whose name holds this")
    asked = parser.parse_args()
    one_thread()
    print(
        f"{'':<34} {'without':>9} {'cached':>9} {'ratio':>7} {'to fill':>9} {'bytes a record':>15} {'update error':>13}"
    )
    kinds = {
        "LoRA, last 2 of 12 blocks, fp32": ["adapter=lora", "adapter.last_blocks=2"],
        "LoRA, last 2 of 12 blocks, fp16": [
            "adapter=lora",
            "adapter.last_blocks=2",
            "model.activations=fp16",
        ],
        "head": ["adapter=head"],
    }
    with tempfile.TemporaryDirectory() as folder:
        place = encoder(Path(folder) / "vit-tiny")
        for name, overrides in ((name, kind) for name, kind in kinds.items() if asked.only in name):
            without, cached, fill, size, error = measured(place, asked.records, asked.rounds, *overrides)
            print(
                f"{name:<34} {without:>8.2f}s {cached:>8.3f}s {without / cached:>7.1f} {fill:>8.2f}s "
                f"{size:>15,} {error:>13.1e}",
                flush=True,
            )


if __name__ == "__main__":
    main()
