"""What a run whose unit is one image costs a patient who has several of them."""

import math
from functools import lru_cache

from dp_accounting import SelfComposedDpEvent
from dp_accounting.dp_event import MixtureOfGaussiansDpEvent
from dp_accounting.pld import PLDAccountant
from scipy.stats import binom

from fedmed.errors import require
from fedmed.privacy.accounting import NUMERICAL_SHARE
from fedmed.privacy.plan import PrivacyPlan

# Beyond it an epsilon protects nobody, and PLD would take minutes to say how little.
LARGEST_GROUP_EPSILON = 500.0


@lru_cache(maxsize=64)
def group_epsilon(plan: PrivacyPlan, *, units: int) -> float:
    """At most this is the epsilon of a person with `units` units, under a plan that clips and samples each by itself.

    In a step in which i of them were drawn, the sum moves by at most i times `max_grad_norm`; i is binomial, as each
    unit enters by itself with probability `sample_rate`. Where all of the person's clipped gradients point the same way
    this is the scalar mixture of Gaussians that dominates every other case (Ganesh 2024, arXiv:2401.10294, section 3),
    so that the epsilon is that of the worst case, not a bound on top of one. PLD composes the steps; it rounds up, by
    less than a thousandth of epsilon or 0.001.

    Returns:
        epsilon at the plan's delta; infinite without noise, or where it would be about `LARGEST_GROUP_EPSILON` or more.
    """
    require(units >= 1, "units", units, ">= 1")
    if plan.noise_multiplier == 0:
        return math.inf
    # What as many steps would cost that move by the expected number: how fine the accountant's grid has to be.
    rough = plan.steps * (plan.sample_rate * units / plan.noise_multiplier) ** 2 / 2
    if rough > LARGEST_GROUP_EPSILON:
        return math.inf
    if units == 1:
        return plan.epsilon()
    drawn = range(units + 1)
    step = MixtureOfGaussiansDpEvent(
        standard_deviation=plan.noise_multiplier,
        sensitivities=tuple(float(i) for i in drawn),
        sampling_probs=tuple(float(p) for p in binom.pmf(drawn, units, plan.sample_rate)),
    )
    ledger = PLDAccountant(value_discretization_interval=min(0.1, max(1e-3, rough / 200)))
    ledger.compose(SelfComposedDpEvent(step, plan.steps))
    return float(ledger.get_epsilon(plan.delta * (1 - NUMERICAL_SHARE)))
