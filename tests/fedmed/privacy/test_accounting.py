"""Epsilon against dp-accounting called independently, and against the closed form of Gaussian DP."""

import math

import dp_accounting
import pytest
from dp_accounting.pld import PLDAccountant
from dp_accounting.rdp import RdpAccountant
from scipy.optimize import brentq
from scipy.stats import norm

from fedmed.errors import PrivacyError
from fedmed.privacy.accounting import (
    NUMERICAL_SHARE,
    calibrate_noise,
    composed_epsilon,
    epsilon_of,
)
from fedmed.privacy.in_words import round_up
from fedmed.privacy.plan import PrivacyPlan
from tests.evidence import figure, some
from tests.timing import best


def make(**changes: object) -> PrivacyPlan:
    values: dict[str, object] = {
        "unit": "patient", "declared_size": 200, "sample_rate": 0.2, "records_per_patient": 1, "max_grad_norm": 0.5,
        "noise_multiplier": 2.0, "steps_per_round": 5, "rounds": 8, "delta": 1e-4,
    }  # fmt: skip
    return PrivacyPlan(**(values | changes))  # type: ignore[arg-type]


def independent(plan: PrivacyPlan, accountant: type) -> float:
    """The same claim, composed step by step by a caller who knows nothing of PrivacyPlan."""
    ledger = accountant(neighboring_relation=dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE)
    step = dp_accounting.PoissonSampledDpEvent(
        plan.sample_rate, dp_accounting.GaussianDpEvent(plan.noise_multiplier)
    )
    ledger.compose(step, plan.rounds * plan.steps_per_round)
    return float(ledger.get_epsilon(plan.delta))


@pytest.mark.parametrize("changes", [{}, {"sample_rate": 1.0}, {"noise_multiplier": 5.0, "delta": 1e-5}])
@pytest.mark.parametrize(("name", "accountant"), [("pld", PLDAccountant), ("rdp", RdpAccountant)])
def test_epsilon_agrees_with_dp_accounting(changes: dict[str, float], name: str, accountant: type) -> None:
    plan = make(**changes)
    alone = independent(plan, accountant)
    assert plan.epsilon(accountant=name) == pytest.approx(alone, rel=0.01)
    figure(f"{name} {changes}", f"epsilon {plan.epsilon(accountant=name):.5f}, called alone {alone:.5f}")


@pytest.mark.parametrize("sites", some([3, 1], 2))
def test_equal_steps_counted_together_cost_what_the_accountant_says_of_each(sites: int) -> None:
    """What is kept from one question to the next may not change an answer."""
    step = dp_accounting.PoissonSampledDpEvent(0.1, dp_accounting.GaussianDpEvent(1.3))
    other = dp_accounting.PoissonSampledDpEvent(0.3, dp_accounting.GaussianDpEvent(4.0))
    for events in (
        [dp_accounting.SelfComposedDpEvent(step, 17)] * sites,
        [dp_accounting.SelfComposedDpEvent(step, 17)] * sites + [dp_accounting.SelfComposedDpEvent(other, 3)],
    ):
        ledger = PLDAccountant(neighboring_relation=dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE)
        for event in events:
            ledger.compose(event)
        alone = ledger.get_epsilon(1e-5 * (1 - NUMERICAL_SHARE))
        assert composed_epsilon(events, delta=1e-5) == pytest.approx(alone, rel=1e-6)


def gaussian_epsilon(noise: float, steps: int, delta: float) -> float:
    """Dong, Roth and Su 2022, corollary 2.13, with mu = sqrt(steps) / noise."""
    mu = math.sqrt(steps) / noise

    def excess(epsilon: float) -> float:
        return norm.cdf(-epsilon / mu + mu / 2) - math.exp(epsilon) * norm.cdf(-epsilon / mu - mu / 2) - delta

    return float(brentq(excess, 0, 400))


@pytest.mark.parametrize(("noise", "steps"), [(10.0, 10), (4.0, 10), (2.4, 20)])
def test_full_batches_agree_with_the_closed_form_of_gaussian_dp(noise: float, steps: int) -> None:
    exact = gaussian_epsilon(noise, steps, 1e-4)
    plan = make(sample_rate=1.0, noise_multiplier=noise, steps_per_round=1, rounds=steps)
    assert plan.epsilon() == pytest.approx(exact, rel=0.01)
    assert plan.epsilon() >= exact * 0.9999


@pytest.mark.parametrize(
    ("epsilon", "sample_rate", "steps"),
    some(
        [
            (8.0, 1.0, 10),
            (1.0, 1.0, 10),
            (1.0, 0.1, 100),
            (8.0, 0.1, 100),
            (1.0, 0.02, 300),
            (8.0, 0.02, 300),
        ],
        2,
    ),
)
def test_calibration_never_exceeds_its_target_and_wastes_less_than_one_percent(
    epsilon: float, sample_rate: float, steps: int
) -> None:
    plan = make(sample_rate=sample_rate, steps_per_round=1, rounds=steps).calibrate(epsilon=epsilon)
    spent = independent(plan, PLDAccountant)
    assert 0.99 * epsilon <= spent <= epsilon * (1 + 1e-9)


def test_calibrating_for_fewer_steps_than_are_run_is_caught() -> None:
    """The deliberately broken variant: noise for half of the steps."""
    broken = calibrate_noise(epsilon=3.0, delta=1e-4, sample_rate=1.0, steps=5)
    plan = make(sample_rate=1.0, steps_per_round=1, rounds=10, noise_multiplier=broken)
    assert independent(plan, PLDAccountant) > 3.3


def test_later_rounds_cost_more_and_all_rounds_cost_the_whole_plan() -> None:
    plan = make()
    spent = [plan.epsilon(rounds=r) for r in range(plan.rounds + 1)]
    assert spent[0] == 0
    assert spent == sorted(spent)
    assert spent[-1] == plan.epsilon()


@pytest.mark.parametrize(("noise", "sample_rate"), [(1.0, 1 / 16), (3.0, 0.5), (8.0, 1.0)])
def test_what_some_rounds_cost_is_no_less_than_the_accountant_says(noise: float, sample_rate: float) -> None:
    plan = make(noise_multiplier=noise, sample_rate=sample_rate)
    for rounds in (1, plan.rounds - 1):
        exact = epsilon_of(plan.event(rounds), delta=plan.delta)
        assert exact <= plan.epsilon(rounds=rounds) <= 1.001 * exact


def test_a_patient_at_two_sites_pays_for_both() -> None:
    plan = make(sample_rate=1.0)
    both = composed_epsilon([plan.event(), plan.event()], delta=plan.delta)
    assert both == pytest.approx(independent(make(sample_rate=1.0, rounds=16), PLDAccountant), rel=0.01)
    assert both > plan.epsilon()


def test_no_noise_is_infinite_epsilon() -> None:
    assert make(noise_multiplier=0.0).epsilon() == math.inf


def test_what_protects_nobody_is_refused_and_not_computed_for_minutes() -> None:
    for noise, sample_rate in ((0.1, 1.0), (0.1, 0.1)):
        plan = make(noise_multiplier=noise, sample_rate=sample_rate, rounds=100)

        def refused(plan: PrivacyPlan = plan) -> None:
            with pytest.raises(PrivacyError, match="an epsilon above 1000"):
                plan.epsilon()

        assert best(refused, enough=2) <= 2
    # A search that begins among such plans goes on from there.
    aim = {"delta": 0.09, "sample_rate": 1.0}
    noise = calibrate_noise(epsilon=120.0, steps=2500, **aim)
    assert 119 < gaussian_epsilon(noise, 2500, 0.09) <= 120
    # Where it begins: what `calibrate_noise` starts with is refused.
    with pytest.raises(PrivacyError, match="an epsilon above 1000"):
        make(noise_multiplier=0.95, steps_per_round=1, rounds=2500, **aim).epsilon()


def test_an_event_that_cannot_be_accounted_is_refused() -> None:
    with pytest.raises(PrivacyError, match="cannot compose"):
        epsilon_of(dp_accounting.UnsupportedDpEvent(), delta=1e-4)


@pytest.mark.parametrize("value", [2.9912, 3.0, 0.0049, 7.999999])
def test_a_printed_epsilon_is_never_below_what_was_spent(value: float) -> None:
    assert round_up(value) >= value - 1e-9
    assert round_up(value) < value + 0.01
