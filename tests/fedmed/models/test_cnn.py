"""The small network for images: its size, its start, and that a patient's gradient is the patient's own."""

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from fedmed.compose import compose
from fedmed.config import RunConfig
from fedmed.models.build import build
from fedmed.models.classifier import Arrays, Classifier
from fedmed.models.export import export, write_card
from fedmed.privacy import dpsgd
from fedmed.privacy.dpsgd import check_sound
from fedmed.privacy.plan import make_plan
from fedmed.privacy.randomness import seeded
from fedmed.training import LocalData, set_adapter, train
from strategies.summary import exact_result, summarise
from tests.stores import settings


def network(*overrides: str) -> tuple[RunConfig, Classifier]:
    config = compose(settings("nowhere", *overrides))
    return config, build(config.task, config.model, config.adapter)


@pytest.mark.parametrize(
    ("overrides", "trained"), [((), 105_097), (("task.slices=3",), 106_297), (("adapter=head",), 97)]
)
def test_its_size_is_exact(overrides: tuple[str, ...], trained: int) -> None:
    _, model = network(*overrides)
    assert model.trainable == trained
    whole = sum(p.numel() for p in model.parameters())
    assert whole == (105_097 if "adapter=head" in overrides else trained)


def test_no_statistic_mixes_patients_and_opacus_knows_every_layer() -> None:
    _, model = network()
    assert not [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert len([m for m in model.modules() if isinstance(m, nn.GroupNorm)]) == 4
    model.training_mode()
    check_sound(model)
    images = torch.rand(5, 1, 16, 16)
    with torch.no_grad():
        model.head.weight.normal_()
        together = model(images=images)
        alone = torch.cat([model(images=image[None]) for image in images])
    assert together.std() > 1e-3
    assert torch.allclose(together, alone, atol=1e-5)


@pytest.mark.parametrize("size", [16, 17, 33, 64, 100])
def test_one_adapter_fits_every_size(size: int) -> None:
    _, model = network()
    start = model.initialise(0)
    _, other = network(f"task.image_size={size}")
    assert {n: v.shape for n, v in other.initialise(0).items()} == {n: v.shape for n, v in start.items()}
    assert torch.isfinite(other(images=torch.rand(2, 1, size, size))).all()


@pytest.mark.parametrize("adapter", ["full", "head"])
def test_its_start_comes_from_the_seed_alone(adapter: str) -> None:
    _, model = network(f"adapter={adapter}")
    first = model.initialise(3)
    whole = {name: p.detach().clone() for name, p in model.named_parameters()}
    model.initialise(4)
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, whole[name])}
    assert changed == {f"blocks.{block}.{0 if block == 0 else 1}.weight" for block in range(4)}
    again = model.initialise(3)
    assert all(np.array_equal(again[name], first[name]) for name in first)
    assert all(torch.equal(p, whole[name]) for name, p in model.named_parameters())
    # PyTorch's bound, with the fan-in of a convolution.
    values = whole["blocks.1.1.weight"].abs()
    bound = (24 * 9) ** -0.5
    assert 0.95 * bound < values.max() <= bound
    assert not whole["head.weight"].any()


@pytest.mark.parametrize("adapter", ["full", "head"])
@pytest.mark.parametrize("physical", [3, 64])
def test_a_step_is_the_clipped_mean_gradient_of_one_patient_at_a_time(adapter: str, physical: int) -> None:
    """Against plain autograd on one patient's images: several a patient, clipped at the median of their norms."""
    config, model = network(
        f"adapter={adapter}", "training.sample_rate=1", "training.steps_per_round=1", "training.learning_rate=1",
        f"training.physical_batch_size={physical}",
    )  # fmt: skip
    draws = torch.Generator().manual_seed(0)
    counts = [1, 3, 2, 1, 3, 3]
    ends = np.cumsum(counts)
    records_of = [np.arange(end - count, end) for count, end in zip(counts, ends, strict=True)]
    images = torch.rand(int(ends[-1]), 1, 16, 16, generator=draws)
    # Some patients are much brighter: their gradients differ in length.
    images[::2] *= 0.3
    labels = torch.tensor([float(p % 2) for p, count in enumerate(counts) for _ in range(count)])
    data = LocalData({"images": images}, labels, records_of)
    arrays = model.initialise(0)
    arrays = {
        n: v + np.float32(0.05) * seeded(1).normal(v.size).reshape(v.shape).astype(np.float32)
        for n, v in arrays.items()
    }
    gradients = [own_gradient(model, data, arrays, records) for records in records_of]
    norms = [float(np.sqrt(sum((g**2).sum() for g in gradient.values()))) for gradient in gradients]
    plan = dataclasses.replace(make_plan(config, "a"), max_grad_norm=float(np.median(norms)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dpsgd, "noised", lambda cells, _, grid: cells.double() * grid.cell)
        source = seeded(0)
        got = train(model, data, arrays, plan=plan, training=config.training, source=source).delta
    for name, values in got.items():
        clipped = [
            g[name] * min(1, plan.max_grad_norm / norm) for g, norm in zip(gradients, norms, strict=True)
        ]
        expected = -sum(clipped) / plan.expected_batch
        assert np.abs(values - expected).max() < 2e-6, name
    assert max(np.abs(values).max() for values in got.values()) > 1e-3


def own_gradient(
    model: Classifier, data: LocalData, arrays: Arrays, records: np.ndarray
) -> dict[str, np.ndarray]:
    """Of one patient's mean loss, by autograd alone."""
    set_adapter(model, arrays)
    model.zero_grad()
    logits = model(images=data.batch["images"][records])
    nn.functional.binary_cross_entropy_with_logits(logits, data.labels[records]).backward()
    found = {
        name: p.grad.double().numpy().copy() for name, p in model.adapter().items() if p.grad is not None
    }
    model.zero_grad(set_to_none=True)
    assert found.keys() == arrays.keys()
    return found


def test_the_card_s_snippet_gives_the_same_scores_without_fedmed(tmp_path: Path) -> None:
    for adapter, slices in (("full", 1), ("head", 3)):
        config, model = network(f"adapter={adapter}", f"task.slices={slices}")
        start = model.initialise(config.seed)
        arrays = {
            n: v + np.float32(0.1) * seeded(2).normal(v.size).reshape(v.shape).astype(np.float32)
            for n, v in start.items()
        }
        folder = tmp_path / adapter
        export(model, arrays, config, folder / "adapter")
        plans = {site: make_plan(config, site) for site in config.task.declared_sizes}
        summary = summarise(
            config, plans, test=exact_result({}), references=None, rounds=1, history=[], peak_rss_mb=1.0,
            seconds={"total": 1.0, "training": 0.5}, mlflow=None,
        )  # fmt: skip
        write_card(summary, config, folder / "MODEL_CARD.md")
        card = (folder / "MODEL_CARD.md").read_text()
        assert "convolutional network" in card
        images = torch.rand(4, slices, 16, 16, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            expected = model(images=images)
        assert expected.std() > 1e-4
        torch.save(images, folder / "images.pt")
        snippet = re.search(r"```python\n(.*?)```", card, re.S)
        assert snippet is not None
        code = (
            "import sys\nsys.modules['fedmed'] = None\n" + snippet[1]
            + "\nprint(scores('adapter', torch.load('images.pt')).tolist())"
        )  # fmt: skip
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        assert np.allclose(json.loads(done.stdout), expected.numpy(), atol=1e-5)
