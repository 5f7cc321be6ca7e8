"""What image-level accounting means for a patient with several images, against what can be computed otherwise."""

import math

import numpy as np
import pytest
from scipy.optimize import brentq
from scipy.stats import binom, norm

from fedmed.errors import ConfigError
from fedmed.privacy.accounting import NUMERICAL_SHARE
from fedmed.privacy.group import group_epsilon
from fedmed.privacy.plan import PrivacyPlan


def plan(*, noise: float, rate: float = 1.0, steps: int = 1, delta: float = 1e-5) -> PrivacyPlan:
    return PrivacyPlan(
        unit="image", declared_size=100, sample_rate=rate, records_per_patient=1, max_grad_norm=1.0,
        noise_multiplier=noise, steps_per_round=steps, rounds=1, delta=delta,
    )  # fmt: skip


def gaussian_epsilon(mu: float, delta: float) -> float:
    """The Gaussian mechanism's epsilon in closed form (Balle and Wang 2018, theorem 8), mu = sensitivity / sigma."""
    return float(
        brentq(lambda e: norm.cdf(mu / 2 - e / mu) - math.exp(e) * norm.cdf(-mu / 2 - e / mu) - delta, 0, 400)
    )


@pytest.mark.parametrize(
    ("noise", "units", "steps"), [(4.0, 2, 1), (8.0, 4, 10), (3.0, 5, 2), (40.0, 20, 30)]
)
def test_with_full_participation_it_is_the_gaussian_of_k_images(noise: float, units: int, steps: int) -> None:
    """Every step moves by k C: a Gaussian of sensitivity k sqrt(steps) over sigma."""
    exact = gaussian_epsilon(units * math.sqrt(steps) / noise, 1e-5 * (1 - NUMERICAL_SHARE))
    got = group_epsilon(plan(noise=noise, steps=steps), units=units)
    assert exact <= got <= exact * 1.001 + 0.001


@pytest.mark.parametrize(("noise", "rate", "units"), [(1.0, 0.25, 4), (2.0, 0.5, 3)])
def test_one_step_is_the_hockey_stick_divergence_of_the_mixture(
    noise: float, rate: float, units: int
) -> None:
    """By numerical integration, in both directions."""
    delta = 1e-5 * (1 - NUMERICAL_SHARE)
    x = np.linspace(-12 * noise, units + 12 * noise, 400_001)
    mixture = sum(binom.pmf(i, units, rate) * norm.pdf(x, i, noise) for i in range(units + 1))
    plain = norm.pdf(x, 0, noise)

    def divergence(epsilon: float) -> float:
        ways = (mixture - math.exp(epsilon) * plain, plain - math.exp(epsilon) * mixture)
        return max(np.trapezoid(way.clip(0), x) for way in ways)

    exact = brentq(lambda epsilon: divergence(epsilon) - delta, 0, 100)
    assert group_epsilon(plan(noise=noise, rate=rate), units=units) == pytest.approx(
        exact, rel=2e-3, abs=2e-3
    )


def test_one_image_costs_what_the_run_says_and_more_images_cost_more() -> None:
    run = plan(noise=2.0, rate=0.25, steps=20)
    costs = [group_epsilon(run, units=units) for units in (1, 2, 3, 5)]
    assert costs[0] == run.epsilon()
    assert costs == sorted(costs)
    # More than in proportion: k images are also drawn k times as often.
    assert costs[1] > 2 * costs[0] * 0.99
    assert costs[3] > 5 * costs[0]


def test_what_protects_nobody_is_infinite_and_quick() -> None:
    assert group_epsilon(plan(noise=0.0), units=2) == math.inf
    assert group_epsilon(plan(noise=0.5, rate=0.5, steps=1000), units=100) == math.inf
    with pytest.raises(ConfigError, match="units"):
        group_epsilon(plan(noise=1.0), units=0)
