"""One frozen plan yields the sampler, the noise and the events, so that what is accounted is what is run."""

import dataclasses
import math
from collections.abc import Iterable
from dataclasses import dataclass

import dp_accounting
import numpy as np
from numpy.typing import NDArray

from fedmed.config import PrivacyConfig, RunConfig
from fedmed.errors import PrivacyError, require
from fedmed.privacy.accounting import (
    NUMERICAL_SHARE,
    PLD_INTERVAL,
    ROUGH_INTERVAL,
    calibrate_noise,
    composed_epsilon,
    epsilon_of,
)
from fedmed.privacy.gaussian import SAMPLER_ERROR
from fedmed.privacy.grid import Grid
from fedmed.privacy.randomness import RandomSource
from fedmed.task import TaskConfig


@dataclass(frozen=True, kw_only=True)
class PrivacyPlan:
    """DP-SGD at one site over a whole run. Every number is public and fixed before launch.

    The neighbouring relation adds or removes one `unit` with all of its records. `noise_multiplier` is
    the standard deviation of the noise in units of `max_grad_norm` (0: none, NOT PRIVATE).
    """

    unit: str
    declared_size: int
    sample_rate: float
    records_per_patient: int
    max_grad_norm: float
    noise_multiplier: float
    steps_per_round: int
    rounds: int
    delta: float

    def __post_init__(self) -> None:
        units = ("patient", "record", "image")
        require(self.unit in units, "plan.unit", self.unit, "patient, record or image")
        require(self.declared_size >= 1, "plan.declared_size", self.declared_size, ">= 1")
        require(0 < self.sample_rate <= 1, "plan.sample_rate", self.sample_rate, "0 < rate <= 1")
        require(0 <= self.noise_multiplier < math.inf, "plan.noise_multiplier", self.noise_multiplier, ">= 0")
        require(self.max_grad_norm > 0, "plan.max_grad_norm", self.max_grad_norm, "> 0")
        require(0 < self.delta < 1, "plan.delta", self.delta, "between 0 and 1")
        for name in ("records_per_patient", "steps_per_round", "rounds"):
            require(getattr(self, name) >= 1, f"plan.{name}", getattr(self, name), ">= 1")

    @property
    def adjacency(self) -> str:
        """The neighbouring relation, in words."""
        return (
            "add or remove one patient with all of its records"
            if self.unit == "patient"
            else f"add or remove one {self.unit}"
        )

    @property
    def steps(self) -> int:
        """Optimizer steps, and so noise draws, over the whole run."""
        return self.steps_per_round * self.rounds

    @property
    def expected_batch(self) -> float:
        """The divisor of every step: a constant, from the declared size, whatever the batch turns out to be."""
        return self.sample_rate * self.declared_size

    @property
    def grid(self) -> Grid:
        """The integers on which a step's gradients are clipped, summed and noised.

        Raises:
            PrivacyError: a gradient, or as many as the declared size, would not fit.
        """
        grid = Grid(noise_multiplier=self.noise_multiplier, max_grad_norm=self.max_grad_norm)
        grid.check_fits(self.declared_size)
        return grid

    def event(self, rounds: int | None = None) -> dp_accounting.DpEvent:
        """What the first `rounds` (default: all) rounds cost one patient, as dp-accounting composes it."""
        steps = self.steps_per_round * (self.rounds if rounds is None else rounds)
        step = dp_accounting.PoissonSampledDpEvent(
            self.sample_rate, dp_accounting.GaussianDpEvent(self.noise_multiplier)
        )
        return dp_accounting.SelfComposedDpEvent(step, steps)

    def epsilon(self, *, rounds: int | None = None, accountant: str = "pld") -> float:
        """Epsilon at the plan's delta after `rounds` (default: all) rounds; infinite without noise.

        It covers the sampler's numerical error, where `check_sampler` lets the plan run. Of a part of the rounds, which
        is charged nobody and only tells where a run stands, it is taken from a coarser grid: at most 0.1% more.
        """
        if rounds == 0:
            return 0.0
        interval = PLD_INTERVAL if rounds in (None, self.rounds) else ROUGH_INTERVAL
        return epsilon_of(self.event(rounds), delta=self.delta, accountant=accountant, interval=interval)

    def calibrate(self, *, epsilon: float) -> "PrivacyPlan":
        """The plan with the least noise whose whole run costs at most `epsilon`.

        Raises:
            PrivacyError: no usable noise multiplier reaches it.
        """
        noise = calibrate_noise(
            epsilon=epsilon, delta=self.delta, sample_rate=self.sample_rate, steps=self.steps
        )
        return dataclasses.replace(self, noise_multiplier=noise)

    def sample_patients(self, patients: int, source: RandomSource) -> NDArray[np.int64]:
        """The patients of one step: each of the `patients` that the site holds, independently, with
        probability `sample_rate`."""
        return np.flatnonzero(source.uniform(patients) < self.sample_rate)


def make_plan(config: RunConfig, site: str) -> PrivacyPlan:
    """The plan of a run at one site, from declared values alone. Without privacy its noise is zero.

    Raises:
        PrivacyError: the site's declared size is missing or below the minimum.
    """
    task, privacy, training = config.task, config.privacy, config.training
    if site not in task.declared_sizes:
        raise PrivacyError(
            f"task.declared_sizes: no public size for site '{site}'; add task.declared_sizes.{site}=…"
        )
    size = task.declared_train(site)
    plan = PrivacyPlan(
        unit=task.unit,
        declared_size=size,
        sample_rate=training.sample_rate,
        records_per_patient=privacy.records_per_patient,
        max_grad_norm=privacy.max_grad_norm,
        noise_multiplier=0.0,
        steps_per_round=training.steps_per_round,
        rounds=config.rounds,
        delta=declared_delta(task, privacy, site),
    )
    if privacy.kind == "off":
        return plan
    if size < privacy.min_declared_size:
        raise PrivacyError(
            f"site '{site}' declares {size} training {task.unit}s; privacy.min_declared_size="
            f"{privacy.min_declared_size}: leave the site out of task.declared_sizes, or lower the minimum"
        )
    if privacy.epsilon is not None:
        return plan.calibrate(epsilon=privacy.epsilon)
    return dataclasses.replace(plan, noise_multiplier=privacy.noise_multiplier)


def check_sampler(plans: Iterable[PrivacyPlan], *, parameters: int) -> None:
    """Refuse runs whose draws could differ from the ideal Gaussian by more than delta has kept for it.

    If every output is within a total variation distance e of an (epsilon, d)-private one, it is
    (epsilon, d + (1 + exp(epsilon)) e)-private. e is at most the number of draws (steps times trainable
    `parameters`, over all plans) times `SAMPLER_ERROR`; epsilon is that of a patient in all the plans, by RDP: a bound
    as good as PLD's, a little larger, that takes no second to compute.

    Raises:
        PrivacyError: the smallest delta's `NUMERICAL_SHARE` does not cover it.
    """
    plans = list(plans)
    delta = min(plan.delta for plan in plans)
    epsilon = composed_epsilon([plan.event() for plan in plans], delta=delta, accountant="rdp")
    draws = parameters * sum(plan.steps for plan in plans)
    # As logarithms: exp(1000) is no float.
    error = float(np.logaddexp(0, epsilon)) + math.log(draws * SAMPLER_ERROR)
    if error > math.log(NUMERICAL_SHARE * delta):
        added, kept = math.exp(min(error, 0)), NUMERICAL_SHARE * delta
        raise PrivacyError(
            f"at epsilon {epsilon:.3g} the numerical error of {draws} Gaussian draws adds {added:.1g} to delta, of "
            f"which {kept:.1g} was kept for it: lower privacy.epsilon, rounds or the adapter's size"
        )


def declared_delta(task: TaskConfig, privacy: PrivacyConfig, site: str) -> float:
    """The delta of a site: what is declared, else by the site's declared size (privacy.md, rule 15)."""
    if privacy.delta is not None:
        return privacy.delta
    return 1e-4 if task.public_benchmark else min(1e-5, 1 / (10 * task.declared_sizes[site]))
