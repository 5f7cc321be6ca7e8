"""Which updates are used: what is wrong with a reply is found by looking at it, not by trusting it."""

import dataclasses
from functools import lru_cache
from typing import Any

import numpy as np
import pytest

from fedmed.compose import compose
from fedmed.config import RunConfig
from fedmed.data.readers import made_up
from fedmed.models.build import build
from fedmed.privacy.plan import PrivacyPlan, make_plan
from fedmed.privacy.randomness import seeded
from fedmed.records import Receipt
from fedmed.training import local_parts, train
from strategies.base import Arrays
from strategies.replies import SLACK, Checks, norm, norm_bounds, plan_bound

EXPECTED = {"w": np.zeros((2, 3), np.float32), "b": np.zeros((), np.float32)}
WEIGHTS = {"a": 100, "b": 50}


def receipt(site: str = "a", **changes: int) -> Receipt:
    values = {"round": 4, "declared_size": WEIGHTS[site], "noise_draws": 2} | changes
    return Receipt(site=site, **values)


def delta(**changes: np.ndarray) -> Arrays:
    return {"w": np.ones((2, 3), np.float32), "b": np.float32(1).reshape(()), **changes}


def filled(value: float) -> np.ndarray:
    values = np.ones((2, 3), np.float32)
    values[1, 2] = value
    return values


def without(name: str) -> Arrays:
    return {key: values for key, values in delta().items() if key != name}


BAD: dict[str, tuple[Receipt, Arrays, str]] = {
    "one NaN": (receipt(), delta(w=filled(np.nan)), "non-finite"),
    "one infinity": (receipt(), delta(w=filled(np.inf)), "non-finite"),
    "one minus infinity": (receipt(), delta(w=filled(-np.inf)), "non-finite"),
    "transposed": (receipt(), delta(w=np.ones((3, 2), np.float32)), "misshapen"),
    "one axis more": (receipt(), delta(w=np.ones((1, 2, 3), np.float32)), "misshapen"),
    "would broadcast": (receipt(), delta(w=np.ones((1, 3), np.float32)), "misshapen"),
    "empty": (receipt(), delta(w=np.ones((0, 3), np.float32)), "misshapen"),
    "a vector for a scalar": (receipt(), delta(b=np.ones(1, np.float32)), "misshapen"),
    "an array missing": (receipt(), without("w"), "misnamed"),
    "an array more": (receipt(), delta(other=np.ones(1, np.float32)), "misnamed"),
    "no array at all": (receipt(), {}, "misnamed"),
    "another name": (receipt(), {"W": delta()["w"], "b": delta()["b"]}, "misnamed"),
    "float64": (receipt(), delta(w=np.ones((2, 3))), "another type"),
    "float16": (receipt(), delta(w=np.ones((2, 3), np.float16)), "another type"),
    "whole numbers": (receipt(), delta(w=np.ones((2, 3), np.int32)), "another type"),
    "complex numbers": (receipt(), delta(w=np.ones((2, 3), np.complex64)), "another type"),
    "text": (receipt(), delta(w=np.full((2, 3), "1")), "another type"),
    "the other byte order": (receipt(), delta(w=np.ones((2, 3), ">f4")), "another type"),
    "the last round": (receipt(round=3), delta(), "an answer to round 3"),
    "a round to come": (receipt(round=5), delta(), "an answer to round 5"),
    "an inflated size": (receipt(declared_size=100_000), delta(), "another declared size"),
    "a smaller size": (receipt(declared_size=99), delta(), "another declared size"),
    "half of the noise": (receipt(noise_draws=1), delta(), "1 noise draws instead of 2"),
    "noise that was not asked for": (receipt(noise_draws=3), delta(), "3 noise draws instead of 2"),
    "too large": (receipt(), delta(w=filled(1e6)), "norm 1e+06 above 10 (strategy.norm_bound"),
    "too large for float32's square": (receipt(), delta(w=filled(3e38)), "norm 3e+38 above"),
}


def checks(**changes: Any) -> Checks:
    values = {"expected": EXPECTED, "round": 4, "weights": WEIGHTS, "norm_bounds": {}} | changes
    return Checks(**values)


@pytest.mark.parametrize("name", BAD)
def test_a_bad_reply_is_dropped_and_the_others_are_used(name: str) -> None:
    bad, sent, reason = BAD[name]
    held = checks(norm_bounds=dict.fromkeys(WEIGHTS, 10.0), noise_draws=2)
    assert held.reason("b", receipt("b"), delta()) is None
    assert reason in (held.reason("a", bad, sent) or "")


def test_a_site_without_a_bound_has_none() -> None:
    for bounds, kept in (({}, True), ({"b": 1.0}, True), ({"a": 1.0}, False)):
        found = checks(norm_bounds=bounds).reason("a", receipt(), delta(w=filled(1e6)))
        assert (found is None) is kept


def test_the_bound_is_on_the_norm_of_the_whole_update() -> None:
    """Each array lies below the bound, together they lie above it."""
    sent = {"w": np.full((2, 3), 1, np.float32), "b": np.float32(2).reshape(())}
    assert norm(sent) == pytest.approx(10**0.5)
    for bound, kept in ((3.2, True), (3.1, False)):
        found = checks(norm_bounds={"a": bound}).reason("a", receipt(), sent)
        assert (found is None) is kept


@lru_cache
def honest(*overrides: str) -> tuple[RunConfig, PrivacyPlan, Arrays, Arrays]:
    """What a site of these settings sends, trained on made-up records: settings, plan, the adapter and its change."""
    config = compose(
        ["task=heart10", "tracking=none", "strategy=fedavg", "model=mlp", "adapter=full", *overrides]
    )
    plan = make_plan(config, "Hungary")
    data = made_up(config.task, plan.declared_size)
    model = build(config.task, config.model, config.adapter)
    training, _ = local_parts(model.prepare(data), data)
    arrays = model.initialise(config.seed)
    update = train(model, training, arrays, plan=plan, training=config.training, source=seeded(5),
                   proximal_mu=config.strategy.proximal_mu)  # fmt: skip
    return config, plan, arrays, update.delta


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("privacy.epsilon=0.05",),
        ("privacy.epsilon=8", "training.steps_per_round=20"),
        ("training.steps_per_round=20", "training.momentum=0.9"),
        ("training.optimizer=adam", "training.steps_per_round=20"),
        ("training.sample_rate=0.05", "training.steps_per_round=5"),
        ("training.weight_decay=0.5", "training.steps_per_round=5"),
        ("strategy=fedprox", "strategy.proximal_mu=2", "training.steps_per_round=5"),
    ],
)
def test_an_honest_update_stays_well_below_the_bound_of_its_plan(overrides: tuple[str, ...]) -> None:
    """Privacy rule 22; and a norm of 1e9 does not."""
    config, plan, arrays, delta = honest(*overrides)
    bound = plan_bound(config, plan, arrays)
    assert 0 < norm(delta) <= bound / SLACK
    assert bound < 1e6


def test_the_bound_grows_with_the_noise_and_would_refuse_honest_sites_without_it() -> None:
    config, plan, arrays, delta = honest("privacy.epsilon=0.05")
    silent = dataclasses.replace(plan, noise_multiplier=0.0)
    assert norm(delta) > plan_bound(config, silent, arrays) / SLACK


def test_only_a_consortium_bounds_norms_unasked() -> None:
    config, plan, arrays, _ = honest()
    plans = {"a": plan}
    assert norm_bounds(config, plans, arrays) == {}
    set_here = dataclasses.replace(config, strategy=dataclasses.replace(config.strategy, norm_bound=7.0))
    assert norm_bounds(set_here, plans, arrays) == {"a": 7.0}
    elsewhere = dataclasses.replace(
        config, federation=dataclasses.replace(config.federation, kind="consortium")
    )
    assert norm_bounds(elsewhere, plans, arrays) == {"a": plan_bound(config, plan, arrays)}
    off = dataclasses.replace(elsewhere, privacy=dataclasses.replace(config.privacy, kind="off"))
    assert norm_bounds(off, plans, arrays) == {}
