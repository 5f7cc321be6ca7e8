"""Where each patient is computed alone, the sum before noise is that of the patients, in integers: nobody else's part
of it moves when one leaves, whatever weights a coordinator sends."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from fedmed.compose import compose
from fedmed.config import RunConfig
from fedmed.data.dataset import SiteDataset
from fedmed.data.images import read_site as read_images
from fedmed.data.table import read_site
from fedmed.models.build import build
from fedmed.models.classifier import Batch, Classifier, TextClassifier
from fedmed.privacy.plan import make_plan
from fedmed.training import Arrays, LocalData, one_thread, patient_logits
from tests.fedmed.models.encoders import image_encoder, image_overrides, moved
from tests.fedmed.test_training import pre_noise_sums
from tests.stores import hospital, settings

PATIENTS = 6
NOISE = ("tracking=none", "privacy.epsilon=null", "privacy.noise_multiplier=1")
APART = ("training.physical_batch_size=1", "training.sample_rate=1", "privacy.records_per_patient=3")
TEXT = {
    "head": ("adapter=head",),
    "lora": ("adapter=lora", "adapter.rank=4", "adapter.last_blocks=2"),
    "full": ("adapter=full", "adapter.embeddings=true"),
}


def some_texts(run: RunConfig) -> SiteDataset:
    """Of 8 to 14 words, two of a patient; of 26 one of the first patient's."""
    data = read_site(run.task, "Switzerland", seed=0)
    kept = slice(0, 2 * PATIENTS)
    texts = [" ".join(text.split()[: 8 + n % 7]) for n, text in enumerate(data.texts[kept])]
    texts[0] = " ".join(data.texts[0].split()[:26])
    return dataclasses.replace(
        data, texts=texts, labels=np.arange(2 * PATIENTS, dtype=np.float32) // 2 % 2,
        patients=np.arange(2 * PATIENTS) // 2,
        test=np.zeros(2 * PATIENTS, dtype=bool),
    )  # fmt: skip


def without(data: SiteDataset, patient: int) -> SiteDataset:
    keep = np.flatnonzero(data.patients != patient)
    texts = [data.texts[n] for n in keep] if data.texts else []
    images = data.images[keep] if len(data.images) else data.images
    features = data.features[keep]
    rest = {name: getattr(data, name)[keep] for name in ("labels", "patients", "test")}
    return dataclasses.replace(data, texts=texts, images=images, features=features, **rest)


def local(batch: Batch, data: SiteDataset, patients: list[int]) -> LocalData:
    records_of = [np.flatnonzero(data.patients == patient) for patient in patients]
    return LocalData(batch, torch.from_numpy(data.labels), records_of)


def sums(run: RunConfig, model: Classifier, data: SiteDataset, arrays: Arrays, alone: bool) -> np.ndarray:
    """Before noise, in cells, of a site that holds these patients and no others."""
    plan = make_plan(run, next(iter(run.task.declared_sizes)))
    part = local(model.prepare(data, alone=alone), data, sorted(set(data.patients.tolist())))
    return pre_noise_sums((run, model, part, plan), arrays)


def loud(model: Classifier, data: SiteDataset, pick: int = 1) -> Arrays:
    """Weights of a head whose products with the features cancel, so that rounding decides the scores."""
    arrays = moved(model)
    seen: list[np.ndarray] = []
    handle = model.head.register_forward_hook(lambda _m, given, _o: seen.append(given[0].double().numpy()))
    patient_logits(model, local(model.prepare(data, alone=True), data, [0, 1, 2, 3]), arrays)
    handle.remove()
    arrays["head.weight"] = (1e12 * np.linalg.svd(np.concatenate(seen))[2][-pick][None]).astype(np.float32)
    return arrays


def check_additive(run: RunConfig, data: SiteDataset) -> None:
    one_thread()
    model = build(run.task, run.model, run.adapter)
    arrays = loud(model, data)
    patients = sorted(set(data.patients.tolist()))
    everybody = sums(run, model, data, arrays, True)
    assert everybody.any()
    for patient in (0, 3):
        own = data
        for other in patients:
            own = own if other == patient else without(own, other)
        parts = [sums(run, model, part, arrays, True) for part in (without(data, patient), own)]
        assert np.array_equal(everybody, parts[0] + parts[1])


@pytest.mark.parametrize("adapter", TEXT)
def test_the_sum_of_texts_is_that_of_the_patients(adapter: str, hf_overrides: list[str]) -> None:
    run = compose([*NOISE, *APART, *hf_overrides, "model.max_tokens=64", *TEXT[adapter]])
    check_additive(run, some_texts(run))


@pytest.mark.parametrize(("family", "slices"), [("vit", 2), ("convnext", 1)])
@pytest.mark.parametrize("adapter", ["head", "lora", "full"])
def test_the_sum_of_images_is_that_of_the_patients(
    family: str, slices: int, adapter: str, tmp_path: Path
) -> None:
    hospital(tmp_path / "data" / "a", patients=PATIENTS)
    folder = image_encoder(tmp_path / "encoder", family)
    chosen = () if adapter == "full" else TEXT[adapter]
    run = compose(
        image_overrides(
            folder, family, tmp_path / "data", *APART, f"task.slices={slices}", f"adapter={adapter}", *chosen
        )
    )
    check_additive(run, read_images(run.task, "a", seed=0, maybe_empty=True))


def test_the_sum_of_the_small_network_is_that_of_the_patients(tmp_path: Path) -> None:
    hospital(tmp_path / "data" / "a", patients=PATIENTS)
    run = compose(settings(tmp_path / "data", *APART))
    check_additive(run, read_images(run.task, "a", seed=0, maybe_empty=True))


def test_the_longest_text_of_a_site_is_no_matter_to_the_others(
    hf_overrides: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights for it would blow up the last bits of a sentence that is padded otherwise, in updates and in scores."""
    run = compose([*NOISE, *APART, *hf_overrides, "model.max_tokens=64", *TEXT["lora"]])
    data = some_texts(run)
    model = build(run.task, run.model, run.adapter)
    clip = make_plan(run, "Switzerland").grid.bound

    def moved_by(pick: int) -> tuple[float, int]:
        """How far the first patient's removal moves the sum, in clips, and how many others' scores it changes."""
        one_thread()
        scores, found = [], []
        arrays = loud(model, data, pick)
        for part in (data, without(data, 0)):
            batch = model.prepare(part, alone=True)
            others = local(batch, part, sorted(set(part.patients.tolist()) - {0}))
            scores.append(patient_logits(model, others, arrays)[part.patients > 0])
            found.append(sums(run, model, part, arrays, True))
        return float(np.linalg.norm(found[0] - found[1])) / clip, int((scores[0] != scores[1]).sum())

    distance, changed = moved_by(2)
    assert distance <= 1
    assert changed == 0
    # The deliberately broken variant: padded to the longest.
    padded = TextClassifier.tokenize
    monkeypatch.setattr(TextClassifier, "tokenize", lambda model, texts, **_: padded(model, texts))
    assert any(moved_by(pick)[0] > 1 for pick in range(2, 12)), "the weights are not made well enough"
    assert moved_by(2)[1] > 0
