"""Does the code keep the claim? An audit with canaries, and the checks that see what an audit cannot.

The training function is an argument, and all that is known of it is what it returns and what it reads from its
random source, so that what is checked is what runs (privacy.md, rules 23 to 25).
"""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import dp_accounting
import numpy as np
import torch

from fedmed.devices import CPU
from fedmed.errors import PrivacyError, require
from fedmed.privacy.checks import (
    FAILED,
    Bench,
    Check,
    Train,
    check_canaries,
    check_clipping,
    check_counting,
    check_coupled,
    check_variance,
    whole_run,
)
from fedmed.privacy.plan import PrivacyPlan
from fedmed.privacy.randomness import RandomSource
from fedmed.training import train

CAUTION = "A low bound is not evidence of privacy."


@dataclass(frozen=True, kw_only=True)
class Audit:
    """All checks of one claim.

    Attributes:
        epsilon: what the accountant says of the plan.
    """

    epsilon: float
    delta: float
    noise_multiplier: float
    steps: int
    canaries: int
    private_randomness: bool
    checks: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        """No check failed. That one proves nothing is no failure, and no evidence either."""
        return all(check.result != FAILED for check in self.checks)

    def report(self) -> dict[str, Any]:
        """Everything, as JSON holds it, with the sentence that no report may lack."""
        values = asdict(self)
        for check in values["checks"]:
            # JSON has no NaN, and broken code may give one.
            check["figures"] = {k: v if math.isfinite(v) else None for k, v in check["figures"].items()}
        return {**values, "passed": self.passed, "caution": CAUTION}

    def check(self, name: str) -> Check:
        """The check of that name."""
        return next(check for check in self.checks if check.name == name)


def audit(
    plan: PrivacyPlan,
    *,
    source: RandomSource,
    canaries: int = 1000,
    guesses: int = 200,
    confidence: float = 0.95,
    train: Train = train,
    device: torch.device = CPU,
    progress: Callable[[str], None] = lambda _: None,
) -> Audit:
    """Hold a training function against the claim of a plan, on made-up patients alone.

    The adversary chooses the weights of every round, sees every round's update, and knows all but the secret
    coins by which the canaries are included.

    Args:
        plan: with noise; `declared_size` is the number of canaries, the size that is public.
        source: coins, sampling and noise come from it.
        guesses: fixed before anything is run; even.
        device: where training runs.

    Raises:
        ConfigError: a number is out of range.
        PrivacyError: the plan has no noise, or its event is not made of Poisson-sampled Gaussians.
    """
    require(100 <= canaries <= 3000, "canaries", canaries, "100 to 3000")
    require(
        2 <= guesses <= canaries and guesses % 2 == 0,
        "guesses",
        guesses,
        f"even, from 2 to canaries={canaries}",
    )
    require(0.5 < confidence < 1, "confidence", confidence, "between 0.5 and 1")
    require(
        plan.declared_size == canaries, "plan.declared_size", plan.declared_size, f"the {canaries} canaries"
    )
    if plan.noise_multiplier <= 0:
        raise PrivacyError("plan.noise_multiplier=0: there is no claim to audit; set an epsilon")
    # From the event and not from the plan's fields: it is the event that epsilon is computed of.
    steps, variance = composed_noise(plan.event())
    bench = Bench(train, plan, canaries, progress, device)
    included = source.uniform(canaries) < 0.5
    rounds, counted, reported = whole_run(bench, np.flatnonzero(included), source)
    checks = (
        check_canaries(bench, rounds.sum(axis=0), included, guesses, confidence),
        check_variance(bench, rounds, variance),
        check_counting(bench, steps, counted, reported, source),
        check_coupled(bench, source),
        check_clipping(bench, source),
    )
    return Audit(
        epsilon=plan.epsilon(), delta=plan.delta, noise_multiplier=plan.noise_multiplier, steps=plan.steps,
        canaries=canaries, private_randomness=source.private, checks=checks,
    )  # fmt: skip


def composed_noise(event: dp_accounting.DpEvent) -> tuple[int, float]:
    """How many noised steps an event composes, and the sum of their variances in units of the clipping norm.

    Raises:
        PrivacyError: it holds anything but Poisson-sampled Gaussians.
    """
    if isinstance(event, dp_accounting.SelfComposedDpEvent):
        steps, variance = composed_noise(event.event)
        return int(event.count) * steps, event.count * variance
    if isinstance(event, dp_accounting.ComposedDpEvent):
        parts = [composed_noise(part) for part in event.events]
        return sum(steps for steps, _ in parts), sum(variance for _, variance in parts)
    if isinstance(event, dp_accounting.PoissonSampledDpEvent):
        return composed_noise(event.event)
    if isinstance(event, dp_accounting.GaussianDpEvent):
        return 1, float(event.noise_multiplier) ** 2
    raise PrivacyError(f"{type(event).__name__} cannot be audited; expected Poisson-sampled Gaussians")
