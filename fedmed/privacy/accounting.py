"""Epsilon from events, by dp-accounting. An event that it cannot compose is refused, never treated as free."""

import math
from collections import Counter
from collections.abc import Callable, Iterable
from functools import lru_cache, partial

import absl.logging
import dp_accounting
from dp_accounting import DpEvent, NeighboringRelation, UnsupportedEventError
from dp_accounting.pld import PLDAccountant, privacy_loss_distribution
from dp_accounting.rdp import RdpAccountant

from fedmed.errors import PrivacyError

# PLD binds for a plan that is fixed in advance; RDP is shown beside it (privacy.md, rule 11).
ACCOUNTANTS = {"pld": PLDAccountant, "rdp": RdpAccountant}
# dp-accounting's own choice; and one that is looked at first, ten times cheaper and a little too large.
PLD_INTERVAL, ROUGH_INTERVAL = 1e-4, 1e-3
BINDING = "pld"
# A larger one protects nobody, and PLD would take minutes to say how large it is. RDP at these orders is an upper
# bound, a few percent above RDP at all orders where it comes near.
LARGEST_EPSILON, ROUGH_ORDERS = 1000.0, (1.1, 1.25, 1.5, 2, 4, 16)
# Of every delta this share is kept for the numerical error of the Gaussian sampler (`plan.check_sampler`), and
# epsilon is that of the ideal mechanism at the rest.
NUMERICAL_SHARE = 0.01

# The RDP accountant warns about each order that it leaves out of its minimum; leaving one out is sound.
absl.logging.set_verbosity(absl.logging.ERROR)


def epsilon_of(
    event: DpEvent, *, delta: float, accountant: str = BINDING, interval: float = PLD_INTERVAL
) -> float:
    """The epsilon of an event under adding or removing one unit, with `NUMERICAL_SHARE` of delta set aside.

    Args:
        interval: of PLD's grid; a coarser one is cheaper and gives a little more, never less.

    Raises:
        PrivacyError: the accountant does not support the event, or it costs more than `LARGEST_EPSILON`.
    """
    return _epsilon_of(_merged(event), delta=delta, accountant=accountant, interval=interval)


def _merged(event: DpEvent) -> DpEvent:
    """The same composition with equal steps counted together: three sites' 24 steps are 72, and one site's are 24."""
    steps: Counter[DpEvent] = Counter()

    def count(part: DpEvent, times: int) -> None:
        if isinstance(part, dp_accounting.SelfComposedDpEvent):
            count(part.event, times * part.count)
        elif isinstance(part, dp_accounting.ComposedDpEvent):
            for one in part.events:
                count(one, times)
        else:
            steps[part] += times

    count(event, 1)
    merged = [dp_accounting.SelfComposedDpEvent(step, times) for step, times in steps.items()]
    return merged[0] if len(merged) == 1 else dp_accounting.ComposedDpEvent(tuple(merged))


@lru_cache(maxsize=4096)
def _epsilon_of(event: DpEvent, *, delta: float, accountant: str, interval: float) -> float:
    # Without noise both are infinite, at once.
    rough = _composed(RdpAccountant(ROUGH_ORDERS), event).get_epsilon(delta) if accountant == BINDING else 0.0
    if LARGEST_EPSILON < rough < math.inf:
        raise PrivacyError(
            f"an epsilon above {LARGEST_EPSILON:g} (RDP says {rough:.0f}) protects nobody: add noise, do fewer rounds, "
            "or take privacy=off, which says NOT PRIVATE"
        )
    if accountant == BINDING and _is_noisy_step(event):
        composed = _one_step(event.event, interval).self_compose(event.count)
        return float(composed.get_epsilon_for_delta(delta * (1 - NUMERICAL_SHARE)))
    made = ACCOUNTANTS[accountant](neighboring_relation=NeighboringRelation.ADD_OR_REMOVE_ONE)
    return float(_composed(made, event).get_epsilon(delta * (1 - NUMERICAL_SHARE)))


def _composed(accountant: PLDAccountant | RdpAccountant, event: DpEvent) -> PLDAccountant | RdpAccountant:
    try:
        return accountant.compose(event)
    except UnsupportedEventError:
        raise PrivacyError(
            f"the {type(accountant).__name__} cannot compose {type(event).__name__}; refused"
        ) from None


def _is_noisy_step(event: DpEvent) -> bool:
    """Whether it is DP-SGD's step some times over, and nothing besides."""
    return (
        isinstance(event, dp_accounting.SelfComposedDpEvent)
        and isinstance(event.event, dp_accounting.PoissonSampledDpEvent)
        and isinstance(event.event.event, dp_accounting.GaussianDpEvent)
        and event.event.event.noise_multiplier > 0
        and event.event.sampling_probability > 0
    )


@lru_cache(maxsize=32)
def _one_step(
    step: dp_accounting.PoissonSampledDpEvent, interval: float
) -> privacy_loss_distribution.PrivacyLossDistribution:
    """What PLDAccountant makes of one step, anew for each number of steps: that costs a second, composing little."""
    return privacy_loss_distribution.from_gaussian_mechanism(
        standard_deviation=step.event.noise_multiplier,
        value_discretization_interval=interval,
        sampling_prob=step.sampling_probability,
        neighboring_relation=NeighboringRelation.ADD_OR_REMOVE_ONE,
    )


def composed_epsilon(events: Iterable[DpEvent], *, delta: float, accountant: str = BINDING) -> float:
    """Epsilon for a patient who took part at every site: the composition of all events."""
    return epsilon_of(dp_accounting.ComposedDpEvent(tuple(events)), delta=delta, accountant=accountant)


@lru_cache(maxsize=1024)
def calibrate_noise(*, epsilon: float, delta: float, sample_rate: float, steps: int) -> float:
    """The noise multiplier at which `steps` Poisson-sampled Gaussian steps cost at most `epsilon`, and at
    least 99.9% of it.

    Raises:
        PrivacyError: none between 0.01 and 10,000 does.
    """

    def cost(noise: float, interval: float) -> float:
        step = dp_accounting.PoissonSampledDpEvent(sample_rate, dp_accounting.GaussianDpEvent(noise))
        event = dp_accounting.SelfComposedDpEvent(step, steps)
        return _epsilon_of(event, delta=delta, accountant=BINDING, interval=interval)

    start = max(0.3, sample_rate * math.sqrt(steps * 2 * math.log(1.25 / delta)) / epsilon)
    near = _solve(partial(cost, interval=ROUGH_INTERVAL), epsilon, start=start) or start
    noise = _solve(partial(cost, interval=PLD_INTERVAL), epsilon, start=near)
    if noise is not None:
        return noise
    raise PrivacyError(
        f"privacy.epsilon={epsilon}: no noise multiplier between 0.01 and 10000 gives it at delta {delta} "
        f"in {steps} steps; change privacy.epsilon, rounds or training.sample_rate"
    )


def _solve(cost: Callable[[float], float], epsilon: float, *, start: float) -> float | None:
    """A noise multiplier whose cost lies in [0.999 epsilon, epsilon], or None.

    Secant steps on log-log axes, where the cost is nearly a line; the aim lies inside the accepted band.
    """
    noise, tried = start, []
    for _ in range(40):
        try:
            spent = cost(noise)
        except PrivacyError:
            noise *= 1.5
            continue
        if 0.999 * epsilon <= spent <= epsilon:
            return noise
        if not 0 < spent < math.inf:
            # Less than delta alone covers, or more than the accountant can hold.
            return None
        tried.append((noise, spent))
        slope = -1.0
        if len(tried) > 1:
            (a, cost_a), (b, cost_b) = tried[-2:]
            slope = math.log(cost_b / cost_a) / math.log(b / a) if a != b and cost_a != cost_b else slope
        noise *= math.exp(max(-1.5, min(1.5, math.log(0.9996 * epsilon / spent) / min(slope, -0.2))))
        if not 1e-2 < noise < 10_000:
            return None
    return None
