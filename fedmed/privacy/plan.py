"""One frozen plan yields the sampler, the noise and the events, so that what is accounted is what is run."""

import dataclasses
import math
from dataclasses import dataclass

import dp_accounting
import numpy as np
from numpy.typing import NDArray

from fedmed.config import PrivacyConfig, RunConfig
from fedmed.errors import PrivacyError, require
from fedmed.privacy.accounting import calibrate_noise, epsilon_of
from fedmed.privacy.randomness import RandomSource
from fedmed.task import TableTaskConfig


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
        require(self.unit in ("patient", "record"), "plan.unit", self.unit, "patient or record")
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
            "add or remove one record"
            if self.unit == "record"
            else "add or remove one patient with all of its records"
        )

    @property
    def steps(self) -> int:
        """Optimizer steps, and so noise draws, over the whole run."""
        return self.steps_per_round * self.rounds

    @property
    def expected_batch(self) -> float:
        """The divisor of every step: a constant, from the declared size, whatever the batch turns out to be."""
        return self.sample_rate * self.declared_size

    def event(self, rounds: int | None = None) -> dp_accounting.DpEvent:
        """What the first `rounds` (default: all) rounds cost one patient, as dp-accounting composes it."""
        steps = self.steps_per_round * (self.rounds if rounds is None else rounds)
        step = dp_accounting.PoissonSampledDpEvent(
            self.sample_rate, dp_accounting.GaussianDpEvent(self.noise_multiplier)
        )
        return dp_accounting.SelfComposedDpEvent(step, steps)

    def epsilon(self, *, rounds: int | None = None, accountant: str = "pld") -> float:
        """Epsilon at the plan's delta after `rounds` (default: all) rounds; infinite without noise."""
        if rounds == 0:
            return 0.0
        return epsilon_of(self.event(rounds), delta=self.delta, accountant=accountant)

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

    def noise(self, shape: tuple[int, ...], source: RandomSource) -> NDArray[np.float64]:
        """The Gaussian that is added to a step's sum of clipped gradients."""
        draws = source.normal(int(np.prod(shape)))
        return (self.noise_multiplier * self.max_grad_norm * draws).reshape(shape)


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


def declared_delta(task: TableTaskConfig, privacy: PrivacyConfig, site: str) -> float:
    """The delta of a site: what is declared, else by the site's declared size (privacy.md, rule 15)."""
    if privacy.delta is not None:
        return privacy.delta
    return 1e-4 if task.public_benchmark else min(1e-5, 1 / (10 * task.declared_sizes[site]))
