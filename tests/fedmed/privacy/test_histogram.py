"""Private metrics (privacy.md, rules 16, 17): one patient is one count, every cell has noise, and it is charged."""

import math
import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import dp_accounting
import numpy as np
import pytest
from dp_accounting.pld import PLDAccountant

from fedmed.compose import compose
from fedmed.config import RunConfig
from fedmed.errors import ConfigError, PrivacyError
from fedmed.privacy.accounting import epsilon_of
from fedmed.privacy.gaussian import SIGMA_CELLS, bytes_for
from fedmed.privacy.histogram import (
    LARGEST_AUC_ERROR,
    HistogramPlan,
    metrics_plans,
    run_events,
    site_epsilon,
    site_events,
)
from fedmed.privacy.plan import make_plan
from fedmed.privacy.randomness import RandomSource, operating_system, seeded
from tests.conftest import count

Count = Callable[[HistogramPlan, np.ndarray, np.ndarray, list[np.ndarray]], np.ndarray]
HEART = ["task=heart", "model=logistic", "tracking=none", "rounds=2"]


def make(**changes: object) -> HistogramPlan:
    values: dict[str, object] = {
        "unit": "patient", "bins": 10, "prevalence": 0.5, "noise_multiplier": 2.0, "delta": 1e-4,
    }  # fmt: skip
    return HistogramPlan(**(values | changes))  # type: ignore[arg-type]


def patients(
    rng: np.random.Generator, number: int, most: int
) -> tuple[np.ndarray, np.ndarray, list[np.ndarray]]:
    """Scores and labels of records, and the shuffled records of each patient; some scores are broken or on an edge."""
    sizes = rng.integers(1, most + 1, size=number)
    records = int(sizes.sum())
    probabilities = rng.random(records)
    odd = rng.random(records)
    probabilities[odd < 0.05] = np.nan
    probabilities[(odd > 0.05) & (odd < 0.2)] = rng.choice([0.0, 0.1, 0.3, 0.5, 1.0])
    labels = (rng.random(records) < 0.5).astype(np.float32)
    return probabilities, labels, np.split(rng.permutation(records), np.cumsum(sizes)[:-1])


def most_changed(counted: Count) -> int:
    """Over many tables: the most that taking one patient out changes the cells, in total."""
    rng = np.random.default_rng(0)
    most = 0
    for _ in range(count(30, 300)):
        plan = make(bins=int(rng.integers(2, 21)), prevalence=float(rng.uniform(0.05, 0.95)))
        probabilities, labels, records_of = patients(rng, number=12, most=30)
        whole = counted(plan, probabilities, labels, records_of)
        for index in range(len(records_of)):
            kept = [*records_of[:index], *records_of[index + 1 :]]
            most = max(most, int(np.abs(whole - counted(plan, probabilities, labels, kept)).sum()))
    return most


def per_record(
    plan: HistogramPlan, probabilities: np.ndarray, labels: np.ndarray, of: list[np.ndarray]
) -> np.ndarray:
    """The mistake: each record is counted."""
    return plan.count(probabilities, labels, [np.array([record]) for records in of for record in records])


def test_one_patient_is_one_count_in_one_cell() -> None:
    """Adding or removing a patient with up to 30 records changes exactly one cell by exactly 1: sensitivity 1."""
    assert most_changed(HistogramPlan.count) == 1
    rng = np.random.default_rng(1)
    plan = make()
    probabilities, labels, records_of = patients(rng, number=40, most=30)
    assert plan.count(probabilities, labels, records_of).sum() == 40
    assert most_changed(per_record) > 1


def test_the_score_is_the_mean_and_the_label_that_of_most() -> None:
    plan = make()
    for scores, labels, row, cell in (
        ([0.05, 0.25], [0, 0], 0, 1),
        ([0.9, 0.2, 0.25], [1, 0, 1], 1, 4),
        # A tie counts as positive; a score on an edge lies above it.
        ([0.5, 0.5], [0, 1], 1, 5),
        ([0.0], [0], 0, 0),
        ([1.0], [1], 1, 9),
        ([np.nan], [1], 1, 5),
        ([np.inf, 0.5], [0, 0], 0, 5),
    ):
        counts = plan.count(np.array(scores), np.array(labels, np.float32), [np.arange(len(scores))])
        assert counts.tolist() == [[int((r, c) == (row, cell)) for c in range(10)] for r in range(2)]


@pytest.mark.parametrize("noise", [0.7, 2.0, 30.0])
def test_every_cell_has_noise_of_its_own_with_the_plan_s_deviation(noise: float) -> None:
    """Also the empty ones; no two cells share it."""
    plan = make(noise_multiplier=noise)
    counts = np.zeros((2, 10), np.int64)
    counts[1, 3] = 50
    source = seeded(7)
    draws = np.array([plan.release(counts, source) - counts for _ in range(count(4_000, 40_000))])
    flat = draws.reshape(len(draws), -1) / noise
    error = 1 / math.sqrt(len(flat))
    assert np.abs(flat.mean(axis=0)).max() < 5 * error
    assert np.abs(flat.std(axis=0) - 1).max() < 5 * error
    assert np.abs(np.corrcoef(flat.T) - np.eye(20)).max() < 5 * error


@dataclass(frozen=True)
class Chosen(RandomSource):
    """Gives these normals, in order."""

    normals: np.ndarray = field(default_factory=lambda: np.zeros(0))

    def normal(self, count: int) -> np.ndarray:
        assert count == len(self.normals)
        return self.normals


@pytest.mark.parametrize("noise", [0.3, 1.7, 3.73, 50.0, 700.3, 2500.7])
def test_whichever_count_is_below_it_every_noise_gives_a_value_of_its_own(noise: float) -> None:
    """Were two cells of noise to give one value here and three there, or none, a value's low bits would tell counts
    apart by more than epsilon allows."""
    plan, cells = make(noise_multiplier=noise), np.arange(-(2**15), 2**15)

    def released(value: int) -> np.ndarray:
        counts = np.full((2, len(cells) // 2), value)
        return plan.release(counts, Chosen(os.urandom, True, cells / SIGMA_CELLS)).ravel()

    without, with_one = released(7), released(8)
    assert (np.diff(without) > 0).all()
    # One patient more is a whole number of cells: what can be released is the same.
    patient = round(1 / float(np.diff(without).mean()))
    assert np.array_equal(without[patient:], with_one[: max(0, len(cells) - patient)])
    # Never less noise than the plan's.
    assert noise <= SIGMA_CELLS / patient <= noise * (1 + 1.001 * noise / SIGMA_CELLS)


def test_a_release_is_the_count_plus_noise_that_does_not_depend_on_it() -> None:
    plan = make(noise_multiplier=1.7)
    few, many = np.zeros((2, 10), np.int64), np.full((2, 10), 123_456_789)
    noise = plan.release(few, seeded(3))
    assert np.allclose(plan.release(many, seeded(3)) - many, noise, rtol=0, atol=1e-7)


def test_the_noise_comes_from_the_source_once_for_every_cell() -> None:
    """What is drawn is what is charged: 2 x bins normals, and the operating system's are never the same."""
    read: list[int] = []

    def reading(number: int) -> bytes:
        read.append(number)
        return os.urandom(number)

    make().release(np.zeros((2, 10), np.int64), RandomSource(reading, private=True))
    assert read == [bytes_for(2 * 20)]
    drawn = [make().release(np.zeros((2, 10), np.int64), operating_system()) for _ in range(2)]
    assert not np.array_equal(*drawn)


@pytest.mark.parametrize("noise", [0.8, 2.0, 5.0])
def test_epsilon_is_dp_accounting_s_and_the_closed_form(noise: float) -> None:
    """Called independently, within 1%; and by Balle and Wang (2018), theorem 8."""
    plan = make(noise_multiplier=noise)
    ledger = PLDAccountant(neighboring_relation=dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE)
    ledger.compose(dp_accounting.GaussianDpEvent(noise))
    assert plan.epsilon() == pytest.approx(ledger.get_epsilon(1e-4), rel=0.01)
    epsilon = plan.epsilon()

    def below(x: float) -> float:
        return 0.5 * math.erfc(-x / math.sqrt(2))

    delta = below(0.5 / noise - epsilon * noise) - math.exp(epsilon) * below(-0.5 / noise - epsilon * noise)
    assert delta == pytest.approx(1e-4, rel=0.02)


def test_a_calibrated_plan_costs_what_was_asked_for() -> None:
    for epsilon in (0.5, 1.0, 4.0):
        assert 0.999 * epsilon <= make().calibrate(epsilon=epsilon).epsilon() <= epsilon


def test_more_bins_than_20_are_refused_when_noisy() -> None:
    assert make(bins=20).bins == 20
    assert make(bins=500, noise_multiplier=0.0).bins == 500
    with pytest.raises(ConfigError, match=r"histogram\.bins=21: expected at most 20 with noise"):
        make(bins=21)


@pytest.mark.parametrize(
    ("name", "value"),
    [("unit", "ward"), ("bins", 1), ("noise_multiplier", -1.0), ("noise_multiplier", math.nan), ("delta", 0.0),
     ("prevalence", 0.0)],
)  # fmt: skip
def test_a_plan_out_of_range_is_refused(name: str, value: object) -> None:
    with pytest.raises(ConfigError, match=rf"^histogram\.{name}="):
        make(**{name: value})


def heart(*overrides: str) -> RunConfig:
    return compose([*HEART, "privacy.metrics=private", "privacy.metrics_epsilon=2", *overrides])


def test_a_site_pays_for_training_and_metrics_together() -> None:
    """The composition is more than either part and at most their sum; both accountants see both events."""
    config = heart()
    plan = make_plan(config, "Hungary")
    histogram = metrics_plans(config.task, config.privacy)["Hungary"]
    training, metrics = site_events(plan, histogram)
    assert metrics == histogram.event()
    for accountant in ("pld", "rdp"):
        total = site_epsilon(plan, histogram, accountant=accountant)
        parts = [epsilon_of(event, delta=1e-4, accountant=accountant) for event in (training, metrics)]
        assert max(parts) < total < sum(parts)
    # Two steps at rate 1 and the histogram are one Gaussian: an independent value.
    single = 1 / math.sqrt(2 / plan.noise_multiplier**2 + 1 / histogram.noise_multiplier**2)
    expected = epsilon_of(dp_accounting.GaussianDpEvent(single), delta=1e-4)
    assert site_epsilon(plan, histogram) == pytest.approx(expected, rel=0.01)
    assert site_epsilon(plan, None) == plan.epsilon()
    both = {"a": plan, "b": plan}
    assert len(run_events(both, {"a": histogram})) == 3


def test_metrics_are_planned_from_declared_values_and_only_when_asked_for() -> None:
    config = heart()
    plans = metrics_plans(config.task, config.privacy)
    assert list(plans) == list(config.task.declared_sizes)
    assert {(plan.unit, plan.bins, plan.delta) for plan in plans.values()} == {("patient", 10, 1e-4)}
    for metrics in ("exact", "none"):
        assert metrics_plans(config.task, replace(config.privacy, metrics=metrics)) == {}


def test_a_release_that_is_not_worth_its_epsilon_is_refused() -> None:
    """The message names the expected error, and an epsilon that would do does."""
    config = heart("privacy.metrics_epsilon=1")
    with pytest.raises(
        PrivacyError, match=r"expected error of the AUC 0\.05\d at .*above 0\.05 it is refused"
    ) as caught:
        metrics_plans(config.task, config.privacy)
    assert "privacy.metrics_epsilon=1.5 would give 0.04" in str(caught.value)
    better = heart("privacy.metrics_epsilon=1.5")
    assert metrics_plans(better.task, better.privacy)
    rare = heart("privacy.metrics_prevalence=0.02")
    with pytest.raises(PrivacyError, match=r"prevalence 0\.02; above 0\.05"):
        metrics_plans(rare.task, rare.privacy)
    assert LARGEST_AUC_ERROR == 0.05
