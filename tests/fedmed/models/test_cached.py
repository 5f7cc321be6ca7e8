"""Classifiers with a cache: the second time the frozen part is not run, and every update is the same."""

import dataclasses
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedmed.compose import compose
from fedmed.config import RunConfig
from fedmed.data import images, table
from fedmed.data.dataset import SiteDataset
from fedmed.models.activations import ActivationCache
from fedmed.models.build import build
from fedmed.models.classifier import Batch, Classifier
from fedmed.models.prefix import transformer_blocks
from fedmed.privacy.plan import make_plan
from fedmed.privacy.randomness import seeded
from fedmed.training import Arrays, local_parts, train
from tests.conftest import sha256
from tests.evidence import some
from tests.fedmed.models.encoders import FAMILIES, image_encoder, image_overrides, modernbert
from tests.stores import hospital

HEAD = ["adapter=head"]
LAST = ["adapter=lora", "adapter.rank=4", "adapter.last_blocks=1"]
Setting = tuple[RunConfig, SiteDataset]


@pytest.fixture
def setting(tmp_path: Path, hf_overrides: list[str]) -> Callable[..., Setting]:
    """The run and the records of one site, for an encoder of a family."""

    def made(family: str, *overrides: str) -> Setting:
        if family in FAMILIES:
            folder = image_encoder(tmp_path / family, family)
            hospital(tmp_path / "data" / "a", patients=40, most=2)
            run = compose(image_overrides(folder, family, tmp_path / "data", *overrides))
            return run, images.read_site(run.task, "a", seed=0)
        base = ["tracking=none", "privacy.epsilon=null", "privacy.noise_multiplier=1"]
        if family == "modernbert":
            path = modernbert(tmp_path / family)
            digest = f"model.sha256={sha256(path / 'model.safetensors')}"
            chosen = ["model=hf", f"model.path={path}", digest, "model.max_tokens=32"]
        else:
            chosen = hf_overrides
        run = compose([*base, *chosen, *overrides])
        return run, table.read_site(run.task, "Switzerland", seed=0)

    return made


def network(run: RunConfig) -> Classifier:
    return build(run.task, run.model, run.adapter)


@contextmanager
def counted(model: Any) -> Iterator[list[str]]:
    """How often the first block of the encoder is run."""
    calls: list[str] = []
    handle = transformer_blocks(model.encoder)[1][0].register_forward_hook(lambda *_: calls.append("block"))
    try:
        yield calls
    finally:
        handle.remove()


def update(run: RunConfig, model: Classifier, batch: Batch, data: SiteDataset) -> Arrays:
    site = next(iter(run.task.declared_sizes))
    plan = make_plan(run, site)
    part, _ = local_parts(batch, data)
    arrays = model.initialise(0)
    # A head of zeros sends no gradient to the layers below it.
    draws = np.random.default_rng(0)
    arrays = {name: a + draws.normal(0, 0.2, a.shape).astype(np.float32) for name, a in arrays.items()}
    source = seeded(0, 0, 1)
    return train(model, part, arrays, plan=plan, training=run.training, source=source).delta


@pytest.mark.parametrize(
    ("family", "adapter"),
    some([(family, adapter) for family in ("bert", "modernbert", *FAMILIES) for adapter in (HEAD, LAST)], 3),
)
def test_the_second_time_comes_from_the_file_bit_for_bit(
    family: str, adapter: list[str], tmp_path: Path, setting: Callable[..., Setting]
) -> None:
    run, data = setting(family, *adapter)
    model, kept = network(run), ActivationCache(tmp_path / "cache", 10**8)
    plain = model.prepare(data)
    with counted(model) as calls:
        model.prepare(data, cache=kept)
        assert calls
        calls.clear()
        found = model.prepare(data, cache=kept)
        assert calls == []
    assert len(kept.entries()) == 1
    assert found.keys() == plain.keys()
    for name, tensor in plain.items():
        assert torch.equal(found[name], tensor), name
    expected, got = (update(run, model, batch, data) for batch in (plain, found))
    for name, values in expected.items():
        assert np.array_equal(got[name], values), name
        assert np.any(values), name


@pytest.mark.parametrize("family", ["bert", "vit", "convnext"])
def test_half_precision_takes_half_the_space_and_updates_are_within_a_thousandth(
    family: str, tmp_path: Path, setting: Callable[..., Setting]
) -> None:
    sizes, updates = {}, {}
    for dtype in ("fp32", "fp16"):
        run, data = setting(family, *LAST, f"model.activations={dtype}", "privacy=off")
        model, kept = network(run), ActivationCache(tmp_path / dtype, 10**8)
        batch = model.prepare(data, cache=kept)
        sizes[dtype] = kept.entries()[0].stat().st_size - 4096
        updates[dtype] = update(run, model, batch, data)
        # The same with no cache at all.
        again = update(run, model, model.prepare(data), data)
        assert all(np.array_equal(values, updates[dtype][name]) for name, values in again.items())
    assert sizes["fp16"] * 2 == sizes["fp32"]
    whole, half = (np.concatenate([a.ravel() for a in updates[dtype].values()]) for dtype in sizes)
    assert 0 < np.linalg.norm(half - whole) / np.linalg.norm(whole) < 1e-3


def test_what_changes_the_values_is_another_entry(tmp_path: Path, setting: Callable[..., Setting]) -> None:
    kept = ActivationCache(tmp_path / "cache", 10**8)
    variants = [
        (), ("model.activations=fp16",), ("model.image_size=24",), ("model.feature_norm=2",), ("model.pooling=mean",),
        ("adapter.last_blocks=2",), ("task.image_size=24",), ("task.slices=2",), ("task.modalities=[DX]",),
    ]  # fmt: skip
    for number, overrides in enumerate(variants[:-1], start=1):
        run, data = setting("vit", *LAST, *overrides)
        network(run).prepare(data, cache=kept)
        assert len(kept.entries()) == number, overrides
    # The same images, however the task says so.
    run, data = setting("vit", *LAST, *variants[-1])
    network(run).prepare(data, cache=kept)
    assert len(kept.entries()) == len(variants) - 1


def test_the_adapter_s_kind_and_rank_do_not_matter(tmp_path: Path, setting: Callable[..., Setting]) -> None:
    """What enters the first trainable block is the same for every adapter of the same blocks."""
    kept = ActivationCache(tmp_path / "cache", 10**8)
    for overrides in (["adapter=lora"], ["adapter=ffa_lora"], ["adapter=lora", "adapter.rank=2"]):
        run, data = setting("vit", *LAST, *overrides)
        network(run).prepare(data, cache=kept)
    assert len(kept.entries()) == 1


@pytest.mark.parametrize("family", ["bert", "vit"])
def test_where_something_before_the_blocks_is_trained_nothing_is_stored(
    family: str, tmp_path: Path, setting: Callable[..., Setting]
) -> None:
    overrides = ["adapter=full", "adapter.embeddings=true"]
    if family == "vit":
        overrides += ["task.image_size=16"]
    run, data = setting(family, *overrides)
    kept = ActivationCache(tmp_path / "cache", 10**8)
    batch = network(run).prepare(data, cache=kept)
    assert "state" not in batch
    assert "features" not in batch
    assert kept.entries() == []


def test_a_record_by_itself_does_not_depend_on_the_others(setting: Callable[..., Setting]) -> None:
    """Weights that were made for it would blow up the last bits that a batch leaves."""
    run, data = setting("bert", *LAST)
    model = network(run)
    longest = max(range(len(data.texts)), key=lambda index: len(data.texts[index].split()))
    kept = [longest, *(index for index in range(40) if index != longest)]
    texts = [data.texts[index] for index in kept]
    few = dataclasses.replace(data, texts=texts, labels=data.labels[kept])
    fewer = dataclasses.replace(few, texts=texts[:-1], labels=few.labels[:-1])
    every, without = (model.prepare(part, alone=True)["state"] for part in (few, fewer))
    assert torch.equal(every[:-1], without)


@pytest.mark.parametrize("adapter", [HEAD, LAST])
def test_other_settings_of_the_same_weights_are_another_entry(
    adapter: list[str], tmp_path: Path, setting: Callable[..., Setting]
) -> None:
    """config.json says how the weights are used, and the weights' digest does not pin it."""
    run, data = setting("vit", *adapter)
    kept = ActivationCache(tmp_path / "cache", 10**8)
    network(run).prepare(data, cache=kept)
    shutil.copytree(tmp_path / "vit", tmp_path / "other")
    path = tmp_path / "other" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_attention_heads": 4}))
    other = dataclasses.replace(run, model=dataclasses.replace(run.model, path=str(path.parent)))
    model = network(other)
    [(name, found)], [(_, expected)] = (model.prepare(data, cache=c).items() for c in (kept, None))
    assert torch.equal(found, expected), name
    assert len(kept.entries()) == 2


@pytest.mark.parametrize("family", ["bert", "vit"])
def test_when_everybody_has_left_nothing_is_kept_of_them(
    family: str, tmp_path: Path, setting: Callable[..., Setting]
) -> None:
    run, data = setting(family, *LAST)
    kept = ActivationCache(tmp_path / "cache", 10**8)
    network(run).prepare(data, cache=kept)
    assert len(kept.entries()) == 1
    manifest = dataclasses.replace(data.manifest, content_sha256="0" * 64, records=0, patients=0, positives=0)
    nobody = dataclasses.replace(
        data, texts=[], images=data.images[:0], labels=data.labels[:0], patients=data.patients[:0],
        test=data.test[:0], manifest=manifest,
    )  # fmt: skip
    assert all(len(tensor) == 0 for tensor in network(run).prepare(nobody, cache=kept).values())
    assert kept.entries() == []
