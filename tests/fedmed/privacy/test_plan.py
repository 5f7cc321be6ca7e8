"""The plan comes from declared values alone, and what it yields is what it says."""

import dataclasses

import numpy as np
import pytest

from fedmed.compose import compose
from fedmed.errors import ConfigError, PrivacyError
from fedmed.privacy.accounting import NUMERICAL_SHARE
from fedmed.privacy.gaussian import SAMPLER_ERROR
from fedmed.privacy.plan import check_sampler, make_plan
from fedmed.privacy.randomness import seeded
from tests.conftest import count
from tests.fedmed.privacy.test_accounting import make

TABLE = [
    "task=csv",
    "task.path=/nowhere.csv",
    "task.site_column=s",
    "task.label=y",
    "tracking=none",
    "model=logistic",
]


def test_the_plan_reads_no_data() -> None:
    """privacy.md, rule 5: there is no file at all, and there is a plan."""
    config = compose([*TABLE, "task.declared_sizes={a: 100, b: 1000}", "task.patient_column=p"])
    a, b = make_plan(config, "a"), make_plan(config, "b")
    assert (a.declared_size, b.declared_size) == (66, 660)
    assert a.expected_batch == a.sample_rate * 66
    assert a.steps == config.rounds * config.training.steps_per_round


def test_delta_defaults_by_the_size_of_the_site_and_by_who_publishes() -> None:
    """privacy.md, rule 15."""
    config = compose([*TABLE, "task.declared_sizes={a: 100, b: 1000000}"])
    assert make_plan(config, "a").delta == 1e-5
    assert make_plan(config, "b").delta == pytest.approx(1 / (10 * 1_000_000))
    assert make_plan(compose(["tracking=none"]), "Cleveland").delta == 1e-4
    assert make_plan(compose(["tracking=none", "privacy.delta=1e-6"]), "Cleveland").delta == 1e-6


def test_the_unit_is_the_record_without_a_patient_column() -> None:
    """privacy.md, rule 1: and the adjacency says so."""
    config = compose([*TABLE, "task.declared_sizes={a: 100}"])
    plan = make_plan(config, "a")
    assert plan.unit == "record"
    assert "one record" in plan.adjacency
    with_patients = compose([*TABLE, "task.declared_sizes={a: 100}", "task.patient_column=p"])
    assert "one patient with all of its records" in make_plan(with_patients, "a").adjacency


def test_a_site_below_the_smallest_cohort_is_refused_by_its_declared_size() -> None:
    config = compose([*TABLE, "task.declared_sizes={a: 12}"])
    with pytest.raises(PrivacyError, match=r"declares 8 training records.*min_declared_size=20"):
        make_plan(config, "a")


def test_patients_are_sampled_independently_with_the_plan_s_rate() -> None:
    """privacy.md, rule 4: Poisson, not fixed-size batches; the counts' variance tells them apart."""
    plan, source = make(sample_rate=0.3), seeded(5)
    draws = count(4_000, 100_000)
    drawn = [plan.sample_patients(50, source) for _ in range(draws)]
    sizes = np.array([len(batch) for batch in drawn])
    assert sizes.mean() == pytest.approx(15, abs=5 * np.sqrt(10.5 / draws))
    assert sizes.var() == pytest.approx(10.5, rel=0.1)
    share = np.bincount(np.concatenate(drawn), minlength=50) / draws
    assert np.abs(share - 0.3).max() < 6 * np.sqrt(0.21 / draws)


def test_the_noise_has_the_plan_s_deviation() -> None:
    plan = make(noise_multiplier=3.0, max_grad_norm=0.5)
    noise = plan.grid.noise(count(200_000, 2_000_000), seeded(7)) * plan.grid.cell
    assert noise.std() == pytest.approx(1.5, rel=0.01)
    assert abs(noise.mean()) < 6 * 1.5 / np.sqrt(noise.size)


def test_a_plan_whose_sums_could_overflow_is_refused() -> None:
    with pytest.raises(PrivacyError, match="overflow 64 bits"):
        _ = make(noise_multiplier=1e-10, declared_size=100_000).grid
    assert make(noise_multiplier=0.1, declared_size=10**11).grid.most_patients > 10**11


def test_numerical_error_beyond_what_delta_keeps_is_refused() -> None:
    """privacy.md, rule 10: the error is (1 + e^epsilon) * steps * parameters * error of a draw, of 1% of delta."""
    plan = make(sample_rate=1.0)
    share = NUMERICAL_SHARE * plan.delta
    most = int(share / (1 + np.exp(plan.epsilon(accountant="rdp"))) / plan.steps / SAMPLER_ERROR)
    check_sampler([plan], parameters=int(most * 0.999))
    with pytest.raises(PrivacyError, match=r"lower privacy\.epsilon, rounds or the adapter's size"):
        check_sampler([plan], parameters=int(most * 1.001))
    # A patient at two sites meets twice the draws, and the epsilon of both.
    with pytest.raises(PrivacyError, match="numerical error"):
        check_sampler([plan, plan], parameters=most // 2)
    # A large model at a large epsilon is far from it, and so is a small one at one that protects nobody.
    check_sampler([make(sample_rate=1.0, noise_multiplier=3.0, delta=1e-7)], parameters=10**9)
    check_sampler([make(sample_rate=1.0, noise_multiplier=1.0)], parameters=10_000)


def test_a_plan_cannot_be_changed_in_place() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        make().noise_multiplier = 0.1  # type: ignore[misc]


@pytest.mark.parametrize(
    "changes",
    [{"sample_rate": 0.0}, {"delta": 1.0}, {"max_grad_norm": -1.0}, {"rounds": 0}, {"unit": "ward"}],
)
def test_a_plan_out_of_range_is_refused(changes: dict[str, object]) -> None:
    name = next(iter(changes))
    with pytest.raises(ConfigError, match=f"plan.{name}=.*expected"):
        make(**changes)
