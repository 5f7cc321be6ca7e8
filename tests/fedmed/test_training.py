"""Local training: what an update depends on, and what it must not."""

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch.nn import functional

from fedmed.compose import compose
from fedmed.config import RunConfig
from fedmed.data.table import read_site
from fedmed.models.build import build
from fedmed.models.classifier import Arrays, Classifier
from fedmed.privacy.plan import PrivacyPlan, make_plan
from fedmed.privacy.randomness import RandomSource, operating_system, seeded
from fedmed.training import (
    GRADIENT_BYTES,
    LARGEST_PIECE,
    LocalData,
    LocalUpdate,
    _physical_batch,
    local_parts,
    logits,
    set_adapter,
    train,
)

SITE = "Switzerland"


def setting(*overrides: str) -> tuple[RunConfig, Classifier, LocalData, PrivacyPlan]:
    config = compose(
        ["model=logistic", "tracking=none", "privacy.epsilon=null", "privacy.noise_multiplier=1", *overrides]
    )
    model = build(config.task, config.model, config.adapter)
    data = read_site(config.task, SITE, seed=0)
    training, _ = local_parts(model.prepare(data), data)
    return config, model, training, make_plan(config, SITE)


def update(
    run: tuple[RunConfig, Classifier, LocalData, PrivacyPlan], source: RandomSource, **changes: object
) -> LocalUpdate:
    config, model, data, plan = run
    return train(
        model,
        data,
        model.initialise(0),
        plan=plan,
        training=config.training,
        source=source,
        **changes,  # type: ignore[arg-type]
    )


def same(a: Arrays, b: Arrays, tolerance: float = 0.0) -> bool:
    return all(np.abs(a[name] - b[name]).max() <= tolerance for name in a)


def test_noise_draws_equal_the_events_that_are_composed() -> None:
    """privacy.md, rule 24: counted where the noise is drawn, over a whole run."""
    run = setting("training.steps_per_round=3", "rounds=4")
    drawn = sum(update(run, operating_system()).noise_draws for _ in range(4))
    event = run[3].event()
    assert drawn == event.count == run[3].steps == 12


def test_without_clipping_in_reach_and_noise_the_private_step_is_the_plain_one() -> None:
    for overrides in (["training.sample_rate=0.5", "training.steps_per_round=2"], ["model=mlp"]):
        wide = ["privacy.max_grad_norm=1000", "privacy.noise_multiplier=1e-9", *overrides]
        private = update(setting(*wide), seeded(4))
        off = setting(*wide)
        plain = update((*off[:3], dataclasses.replace(off[3], noise_multiplier=0.0)), seeded(4))
        # The sources differ once noise has been drawn, so only the first step's sample is shared.
        if "training.steps_per_round=2" not in overrides:
            assert same(private.delta, plain.delta, 1e-5)
        assert plain.noise_draws == 0


def test_the_plain_step_is_gradient_descent_on_the_mean_over_patients() -> None:
    config, model, data, plan = setting("training.learning_rate=1.0")
    plain = update((config, model, data, dataclasses.replace(plan, noise_multiplier=0.0)), seeded(0))
    model.initialise(0)
    model.zero_grad()
    loss = functional.binary_cross_entropy_with_logits(model(**data.batch), data.labels, reduction="sum")
    (loss / plan.declared_size).backward()
    for name, parameter in model.adapter().items():
        assert parameter.grad is not None
        assert np.allclose(plain.delta[name], -parameter.grad.numpy(), atol=1e-6)
    model.zero_grad()


def test_the_proximal_term_is_added_after_clipping_and_noise() -> None:
    """With mu > 0 the second step is pulled towards the start by exactly lr * mu * distance."""
    run = setting("training.steps_per_round=2", "training.learning_rate=0.1", "privacy.noise_multiplier=50")
    free, pulled = update(run, seeded(8)), update(run, seeded(8), proximal_mu=0.5)
    one_step = dataclasses.replace(run[3], steps_per_round=1)
    first = update((*run[:3], one_step), seeded(8))
    for name in free.delta:
        # The gradients of the two differ a little as well, since the second step starts elsewhere only later.
        assert np.allclose(pulled.delta[name], free.delta[name] - 0.1 * 0.5 * first.delta[name], atol=1e-5)


def test_a_private_update_differs_from_run_to_run_and_a_seeded_one_does_not() -> None:
    """privacy.md, rule 8."""
    run = setting()
    torch.manual_seed(0)
    first = update(run, operating_system())
    torch.manual_seed(0)
    assert not same(first.delta, update(run, operating_system()).delta)
    assert same(update(run, seeded(1)).delta, update(run, seeded(1)).delta)


def test_an_update_depends_on_training_records_alone() -> None:
    """privacy.md, rule 7: what else the process holds does not reach it."""
    run = setting()
    config, model, _, _ = run
    before = update(run, seeded(2))
    data = read_site(config.task, SITE, seed=0)
    labels = data.labels.copy()
    labels[data.test] = 1 - labels[data.test]
    changed = dataclasses.replace(data, labels=labels)
    training, test = local_parts(model.prepare(changed), changed)
    logits(model, test, {n: v + 1 for n, v in model.initialise(0).items()})
    after = update((config, model, training, run[3]), seeded(2))
    assert same(before.delta, after.delta)


class SharedNoise:
    """Its Gaussian does not depend on how many uniforms were drawn before: a coupling of two data sets."""

    def __init__(self) -> None:
        self.uniform, self.normal = seeded(3).uniform, seeded(4).normal


def test_the_size_of_the_step_does_not_tell_how_many_patients_there_are() -> None:
    """privacy.md, rule 5: half of the patients, same declared size: the same divisor and the same noise."""
    config, model, data, plan = setting("privacy.noise_multiplier=1000")
    half = LocalData(data.batch, data.labels, data.records_of[: len(data.records_of) // 2])
    everybody = update((config, model, data, plan), SharedNoise())  # type: ignore[arg-type]
    fewer = update((config, model, half, plan), SharedNoise())  # type: ignore[arg-type]
    nobody = update((config, model, LocalData(data.batch, data.labels, []), plan), SharedNoise())  # type: ignore[arg-type]
    bound = (
        2
        * config.privacy.max_grad_norm
        * len(data.records_of)
        * config.training.learning_rate
        / plan.expected_batch
    )
    for other in (fewer, nobody):
        distance = np.sqrt(
            sum(float(np.sum((everybody.delta[n] - other.delta[n]) ** 2)) for n in other.delta)
        )
        assert distance <= bound
        assert other.noise_draws == 1


def test_at_most_k_records_of_a_patient_enter_a_step() -> None:
    config, model, data, plan = setting("privacy.records_per_patient=2", "training.physical_batch_size=3")
    crowded = LocalData(data.batch, data.labels, [np.arange(10), np.arange(10, 13), np.arange(13, 14)])
    seen: list[int] = []
    handle = model.head.register_forward_hook(lambda _m, _i, out: seen.append(len(out)))
    update((config, model, crowded, plan), seeded(5))
    handle.remove()
    assert sum(seen) == 2 + 2 + 1
    assert max(seen) <= 3


def test_splitting_into_physical_batches_changes_nothing() -> None:
    small, large = (
        update(setting(f"training.physical_batch_size={size}", "privacy.noise_multiplier=0.5"), seeded(6))
        for size in (7, 1000)
    )
    assert same(small.delta, large.delta, 1e-6)


def wrong_names(arrays: Arrays) -> Arrays:
    return {f"{name}x": values for name, values in arrays.items()}


def wrong_shapes(arrays: Arrays) -> Arrays:
    return {name: np.zeros((*values.shape, 2), dtype=np.float32) for name, values in arrays.items()}


@pytest.mark.parametrize("broken", [wrong_names, wrong_shapes])
def test_an_adapter_of_other_names_or_shapes_is_refused(broken: Callable[[Arrays], Arrays]) -> None:
    _, model, _, _ = setting()
    with pytest.raises(ValueError, match="adapter arrays"):
        set_adapter(model, broken(model.initialise(0)))


def test_a_large_adapter_is_trained_in_small_pieces_without_being_told(hf_overrides: list[str]) -> None:
    config = compose([*hf_overrides, "tracking=none", "adapter=full"])
    model = build(config.task, config.model, config.adapter)
    size = sum(p.numel() * 4 for p in model.adapter().values())
    assert _physical_batch(model, config.training) == min(LARGEST_PIECE, GRADIENT_BYTES // size)
    assert _physical_batch(model, compose(["training.physical_batch_size=3", "tracking=none"]).training) == 3
    tabular = compose(["model=logistic", "tracking=none"])
    assert (
        _physical_batch(build(tabular.task, tabular.model, tabular.adapter), tabular.training)
        == LARGEST_PIECE
    )
