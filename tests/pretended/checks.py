"""A site on an accelerator: the same figures as on the processor, and nobody waits inside a step.

`tests/fedmed/test_devices.py` runs these in a process of their own.
"""

import dataclasses
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from numpy.typing import NDArray

from fedmed import training
from fedmed.compose import compose
from fedmed.config import RunConfig
from fedmed.data import images, table
from fedmed.data.dataset import SiteDataset
from fedmed.data.readers import read_site
from fedmed.devices import CPU
from fedmed.model import ImageModelConfig
from fedmed.models.activations import ActivationCache
from fedmed.models.build import build
from fedmed.models.classifier import Classifier
from fedmed.models.image_text import ImageTextEncoder
from fedmed.models.sound import SoundEncoder
from fedmed.privacy import step_noise
from fedmed.privacy.audit import Audit, audit
from fedmed.privacy.checks import FAILED
from fedmed.privacy.clipping import ClippedSum
from fedmed.privacy.grid import Grid
from fedmed.privacy.plan import PrivacyPlan, make_plan
from fedmed.privacy.randomness import RandomSource, operating_system, seeded
from fedmed.privacy.step_noise import StepNoise
from fedmed.task import ImageTaskConfig
from fedmed.training import LocalData, LocalUpdate, local_parts, logits, patient_logits, train
from tests.conftest import sha256
from tests.evidence import some
from tests.fedmed.models.encoders import FAMILIES, image_encoder, image_overrides, modernbert, moved
from tests.fedmed.models.test_sound import hear
from tests.fedmed.models.test_sound import run as sound_run
from tests.pretended.device import PRETENDED, Watch, pretended
from tests.recordings import recordings
from tests.stores import hospital, settings

PRIVATE = ["tracking=none", "privacy.epsilon=null", "privacy.noise_multiplier=1"]
# Several pieces a step, several records of some patients.
STEPS = ["training.physical_batch_size=16", "training.steps_per_round=2"]
NETWORKS = [
    "mlp", "cnn",
    *(f"{family} {adapter}" for family in ("bert", "modernbert", *FAMILIES) for adapter in ("head", "lora", "full")),
    "bert embeddings", "vit embeddings",
]  # fmt: skip
Setting = tuple[RunConfig, SiteDataset]


@pytest.fixture(autouse=True)
def _as_on_an_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    """The processor adds up gradients as an accelerator does: what is left to differ is the device."""
    monkeypatch.setattr(ClippedSum, "_add_compiled", lambda own, g: own._add(g.computed(), narrow=True))


@pytest.fixture
def setting(tmp_path: Path, hf_overrides: list[str]) -> Callable[..., Setting]:
    """A run, and one site's records."""

    def made(network: str, *more: str) -> Setting:
        family, _, adapter = network.partition(" ")
        chosen = [f"adapter={'full' if adapter == 'embeddings' else adapter}"] if adapter else []
        chosen += ["adapter.rank=4", "adapter.last_blocks=1"] if adapter == "lora" else []
        chosen += ["adapter.embeddings=true"] if adapter == "embeddings" else []
        if family in ("cnn", *FAMILIES):
            hospital(tmp_path / "data" / "a", patients=24, most=3)
            overrides = settings(tmp_path / "data", "model=cnn")
            if family in FAMILIES:
                folder = image_encoder(tmp_path / family, family)
                size = ["task.image_size=16"] if adapter == "embeddings" else []
                overrides = image_overrides(folder, family, tmp_path / "data", *size)
            run = compose([*overrides, *chosen, *STEPS, "privacy.records_per_patient=2", *more])
            return run, images.read_site(run.task, "a", seed=0)
        models = {"mlp": ["model=mlp"], "bert": hf_overrides}
        if family == "modernbert":
            folder = modernbert(tmp_path / family)
            models[family] = [
                "model=hf",
                f"model.path={folder}",
                "model.max_tokens=32",
                f"model.sha256={sha256(folder / 'model.safetensors')}",
            ]
        run = compose([*PRIVATE, *models[family], *chosen, *STEPS, *more])
        return run, table.read_site(run.task, "Switzerland", seed=0)

    return made


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Iterator[Watch]:
    """What is noted while steps are taken; `device.waits` around it is of no interest."""
    with pretended() as device:
        seen = Watch()

        def within(function: Callable[..., Any]) -> Callable[..., Any]:
            def call(*values: Any) -> Any:
                before, copies = len(device.waits), device.copies
                try:
                    return function(*values)
                finally:
                    seen.waits += device.waits[before:]
                    seen.copies += device.copies - copies

            return call

        for name in ("_train_private", "_train_plain"):
            monkeypatch.setattr(training, name, within(getattr(training, name)))
        yield seen


def update(
    run: RunConfig, model: Classifier, part: LocalData, source: RandomSource, **changes: Any
) -> LocalUpdate:
    plan = dataclasses.replace(
        make_plan(run, next(iter(run.task.declared_sizes))), sample_rate=0.5, **changes
    )
    return train(model, part, moved(model), plan=plan, training=run.training, source=source, proximal_mu=0.1)


def both(setting: Setting) -> dict[str, tuple[Classifier, LocalData]]:
    """The network on either device, and what it has prepared there."""
    run, data = setting
    found = {}
    for name, device in (("here", CPU), ("away", PRETENDED)):
        model = build(run.task, run.model, run.adapter, device=device)
        part, _ = local_parts(model.prepare(data), data)
        found[name] = model, part
    return found


def assert_same(a: dict[str, NDArray[Any]], b: dict[str, NDArray[Any]]) -> None:
    """But for rounding: PyTorch has other ways for convolutions and attention on the processor."""
    assert a.keys() == b.keys()
    for name in a:
        assert np.isfinite(a[name]).all()
        assert np.allclose(a[name], b[name], rtol=1e-4, atol=1e-5), name


@pytest.mark.parametrize("network", some(NETWORKS, 4))
def test_a_round_gives_what_it_gives_on_the_processor(
    network: str, setting: Callable[..., Setting], watch: Watch
) -> None:
    chosen = setting(network)
    pairs = both(chosen)
    (here, part), (away, part_away) = pairs["here"], pairs["away"]
    assert away.device == PRETENDED
    # What was prepared is on the host, wherever it was computed.
    assert_same(
        {n: v.numpy() for n, v in part.batch.items()}, {n: v.numpy() for n, v in part_away.batch.items()}
    )
    updates = [update(chosen[0], model, own, seeded(5)) for model, own in ((here, part), (away, part_away))]
    assert_same(updates[0].delta, updates[1].delta)
    assert any(values.any() for values in updates[0].delta.values())
    assert updates[0].noise_draws == updates[1].noise_draws == 2
    assert watch.copies
    assert watch.waits == []
    arrays = moved(here)
    for scored in (logits, patient_logits):
        assert np.allclose(scored(here, part, arrays), scored(away, part_away, arrays), atol=1e-5)


@pytest.mark.parametrize("network", ["mlp", "cnn", "bert lora", "vit lora"])
def test_nor_does_anybody_wait_without_privacy(
    network: str, setting: Callable[..., Setting], watch: Watch
) -> None:
    run, data = chosen = setting(network)
    pairs = both((run, data))
    updates = [update(run, *pairs[where], seeded(5), noise_multiplier=0.0) for where in ("here", "away")]
    assert_same(updates[0].delta, updates[1].delta)
    assert watch.copies
    assert watch.waits == []
    del chosen


@pytest.mark.parametrize("network", ["mlp", "cnn", "vit full"])
def test_the_operating_systems_noise_is_drawn_meanwhile(
    network: str, setting: Callable[..., Setting], watch: Watch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By other threads, once for each step."""
    run, data = setting(network, "training.optimizer=adam")
    drawn: list[tuple[int, bool]] = []
    noise = Grid.noise

    def seen(grid: Grid, count: int, source: RandomSource) -> NDArray[np.int64]:
        drawn.append((count, threading.current_thread() is threading.main_thread()))
        return noise(grid, count, source)

    monkeypatch.setattr(Grid, "noise", seen)
    monkeypatch.setattr(step_noise, "TASK", 1000)
    model, part = both((run, data))["away"]
    found = update(run, model, part, operating_system())
    live = 2 * sum(p.numel() for p in model.adapter().values())
    assert found.noise_draws == 2
    # Of a kernel that is larger than its map some weights are never noised.
    assert (
        sum(count for count, _ in drawn) == live if network != "cnn" else 0 < sum(c for c, _ in drawn) <= live
    )
    assert not any(main for _, main in drawn)
    assert watch.waits == []
    assert not any(thread.name.startswith("noise") for thread in threading.enumerate())


def audited() -> Audit:
    plan = PrivacyPlan(
        unit="patient", declared_size=100, sample_rate=1.0, records_per_patient=1, max_grad_norm=1.0,
        noise_multiplier=0.0, steps_per_round=2, rounds=4, delta=1e-4,
    ).calibrate(epsilon=3.0)  # fmt: skip
    with pretended():
        return audit(plan, source=operating_system(), canaries=100, guesses=50, device=PRETENDED)


def test_an_audit_holds_what_runs_there_against_its_claim(monkeypatch: pytest.MonkeyPatch) -> None:
    found = audited()
    assert found.passed, found.report()
    take, first = StepNoise.take, {}

    def again(noise: StepNoise) -> torch.Tensor:
        return first.setdefault(noise._count, take(noise))

    monkeypatch.setattr(StepNoise, "take", again)
    assert audited().check("variance").result == FAILED
    monkeypatch.setattr(StepNoise, "take", lambda noise: take(noise) // 10)
    assert audited().check("variance").result == FAILED


class Slow(Grid):
    """Draws one number after the other, and takes its time over each part."""

    def noise(self, count: int, source: RandomSource) -> NDArray[np.int64]:
        with LOCK:
            start = int.from_bytes(source.read(8), "little")
        time.sleep(0.02)
        return np.arange(start, start + count)


LOCK = threading.Lock()


def test_a_step_gets_noise_that_is_whole_and_that_no_other_gets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_noise, "TASK", 10)
    given = []

    def read(_: int) -> bytes:
        given.append(1 + 10 * len(given))
        return given[-1].to_bytes(8, "little")

    grid = Slow(noise_multiplier=1.0, max_grad_norm=1.0)
    with pretended() as device:
        noise = StepNoise(
            95, grid=grid, source=RandomSource(read, private=True), device=PRETENDED, steps=3
        )  # fmt: skip
        steps = [noise.take().cpu().tolist() for _ in range(3)]
        # Three times ten parts, and none for a step that will not come.
        assert len(given) == 30
        # One more than was said gets its own all the same.
        steps.append(noise.take().cpu().tolist())
        noise.close()
    values = [value for step in steps for value in step]
    assert all(len(step) == 95 and min(step) > 0 for step in steps)
    assert len(set(values)) == len(values)
    assert device.copies == 4


def test_what_fails_in_a_thread_fails_the_step() -> None:
    def broken(_: int) -> bytes:
        raise OSError("no bytes")

    grid = Grid(noise_multiplier=1.0, max_grad_norm=1.0)
    with pretended():
        noise = StepNoise(95, grid=grid, source=RandomSource(broken, private=True), device=PRETENDED, steps=1)
        with pytest.raises(OSError, match="no bytes"):
            noise.take()
        noise.close()


def test_a_piece_is_as_large_as_the_accelerators_memory_allows(
    setting: Callable[..., Setting], watch: Watch, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, data = setting("vit lora", "training.physical_batch_size=null")
    pairs = both((run, data))
    sizes: dict[int, list[int]] = {}
    losses = training._losses
    for free in (4, 2**40):
        monkeypatch.setattr(training, "free_bytes", lambda _, free=free: free)
        sizes[free] = []

        def seen(model: Any, part: Any, rows: Any, free: int = free, **settings: Any) -> torch.Tensor:
            sizes[free].append(len(rows))
            return losses(model, part, rows, **settings)

        monkeypatch.setattr(training, "_losses", seen)
        update(run, *pairs["away"], seeded(5))
    # After the first piece, which is measured.
    assert max(sizes[4][2:]) <= 2
    assert len(sizes[2**40]) < len(sizes[4])
    assert watch.waits == []


@pytest.mark.parametrize("family", ["clip", "siglip"])
def test_images_and_prompts_are_embedded_as_on_the_processor(
    family: str, setting: Callable[..., Setting], tmp_path: Path
) -> None:
    run, data = setting(f"{family} lora")
    (tmp_path / family / "vocab.txt").write_text(
        "\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "lung", "a"])
    )
    transformers.BertTokenizerFast(vocab=str(tmp_path / family / "vocab.txt")).save_pretrained(
        tmp_path / family
    )
    assert isinstance(run.task, ImageTaskConfig)
    assert isinstance(run.model, ImageModelConfig)
    with pretended():
        encoders = [ImageTextEncoder(run.task, run.model, device=device) for device in (CPU, PRETENDED)]
        for made in (
            [one.images(data) for one in encoders],
            [one.texts(["a lung", "a"]) for one in encoders],
        ):
            assert_same(*({"embeddings": rows.numpy()} for rows in made))


def test_sounds_are_embedded_as_on_the_processor(tmp_path: Path) -> None:
    recordings(tmp_path / "data" / "a", patients=2)
    run = sound_run(hear(tmp_path / "hear"), tmp_path / "data")
    data = read_site(run.task, "a", seed=0, maybe_empty=True)
    with pretended():
        here, away = (SoundEncoder(run.task, run.model, device=one).sounds(data) for one in (CPU, PRETENDED))
        assert_same({"rows": here.numpy()}, {"rows": away.numpy()})


def test_what_was_computed_elsewhere_is_another_entry(
    setting: Callable[..., Setting], tmp_path: Path
) -> None:
    run, data = setting("vit lora")
    cache = ActivationCache(tmp_path / "cache", 10**9)
    with pretended():
        for number, device in enumerate((CPU, PRETENDED, CPU, PRETENDED)):
            build(run.task, run.model, run.adapter, device=device).prepare(data, cache=cache)
            assert len(cache.entries()) == min(2, 1 + number)


def test_what_would_wait_is_noted() -> None:
    """The checks above can fail."""
    with pretended() as device:
        values = torch.ones(3, pin_memory=True).to(PRETENDED, non_blocking=True)
        total = values.sum() * 2.0 + torch.tensor(1.0)
        assert device.waits == []
        assert total.item() == 7.0
        assert bool((values > 0).all())
        values[values > 0].sum().cpu()
        torch.ones(3).to(PRETENDED)
        torch.ones(3).to(PRETENDED, non_blocking=True)
        assert len(device.waits) == 6
        with pytest.raises(RuntimeError, match="same device"):
            values + torch.ones(3)
