"""Private metrics: one noisy histogram of held-out patients' scores a run (privacy.md, rules 16 and 17)."""

import dataclasses
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import dp_accounting
import numpy as np
from numpy.typing import NDArray

from fedmed.config import PrivacyConfig
from fedmed.errors import PrivacyError, require
from fedmed.privacy.accounting import calibrate_noise, epsilon_of
from fedmed.privacy.events import to_json
from fedmed.privacy.expected_error import ASSUMED_AUC, expected_auc_error
from fedmed.privacy.gaussian import SIGMA_CELLS
from fedmed.privacy.plan import PrivacyPlan, declared_delta
from fedmed.privacy.randomness import RandomSource
from fedmed.private_metrics import bin_edges
from fedmed.task import TaskConfig

MOST_BINS = 20
LARGEST_AUC_ERROR = 0.05


@dataclass(frozen=True, kw_only=True)
class HistogramPlan:
    """One release of (label x bin) counts of patients at one site. Every number is public and fixed before launch.

    Adding or removing one unit with all of its records changes one cell by 1: the L2 sensitivity is 1.
    `noise_multiplier` is the standard deviation of each cell's noise (0: none, NOT PRIVATE).
    """

    unit: str
    bins: int
    # Assumed, declared: where the bins are densest.
    prevalence: float
    noise_multiplier: float
    delta: float

    def __post_init__(self) -> None:
        units = ("patient", "record", "image")
        require(self.unit in units, "histogram.unit", self.unit, "patient, record or image")
        noise = self.noise_multiplier
        require(0 <= noise < math.inf, "histogram.noise_multiplier", noise, ">= 0")
        require(self.bins >= 2, "histogram.bins", self.bins, ">= 2")
        few = self.bins <= MOST_BINS or noise == 0
        require(few, "histogram.bins", self.bins, f"at most {MOST_BINS} with noise: every cell has its own")
        require(0 < self.prevalence < 1, "histogram.prevalence", self.prevalence, "between 0 and 1")
        require(0 < self.delta < 1, "histogram.delta", self.delta, "between 0 and 1")

    @property
    def edges(self) -> NDArray[np.float64]:
        """(bins + 1,) public edges in probability; a score at an edge is above it."""
        return bin_edges(self.bins, self.prevalence)

    def event(self) -> dp_accounting.DpEvent:
        """What the release costs one unit: one Gaussian draw, however many cells there are."""
        return dp_accounting.GaussianDpEvent(self.noise_multiplier)

    def epsilon(self, *, accountant: str = "pld") -> float:
        """Epsilon of the release alone, at the plan's delta."""
        return epsilon_of(self.event(), delta=self.delta, accountant=accountant)

    def calibrate(self, *, epsilon: float) -> "HistogramPlan":
        """The plan with the least noise whose release costs at most `epsilon`.

        Raises:
            PrivacyError: no usable noise multiplier reaches it.
        """
        noise = calibrate_noise(epsilon=epsilon, delta=self.delta, sample_rate=1.0, steps=1)
        return dataclasses.replace(self, noise_multiplier=noise)

    def count(
        self,
        probabilities: NDArray[np.floating],
        labels: NDArray[np.floating],
        records_of: Sequence[NDArray[np.int64]],
    ) -> NDArray[np.int64]:
        """(2, bins) int64: each patient once, in the row of the patient's label and the bin of the patient's score.

        The score is the mean probability of the patient's records, a non-finite one taken as 0.5; the label is that of
        most of them, and positive where they are even.

        Args:
            probabilities: (records,) in [0, 1].
            labels: (records,) 0 or 1.
            records_of: for each patient, the indices of the patient's records.
        """
        counts = np.zeros((2, self.bins), dtype=np.int64)
        edges = self.edges
        finite = np.where(np.isfinite(probabilities), probabilities, 0.5).astype(np.float64)
        for records in records_of:
            score = float(np.clip(finite[records].mean(), 0.0, 1.0))
            cell = min(int(np.searchsorted(edges, score, side="right")) - 1, self.bins - 1)
            counts[int(labels[records].mean() >= 0.5), cell] += 1
        return counts

    def release(self, counts: NDArray[np.int64], source: RandomSource) -> NDArray[np.float64]:
        """(2, bins) float64: every cell plus Gaussian noise of its own, also the empty ones.

        A patient is a whole number of the noise's cells, rounded down: the noise is never less than the plan's, and
        more by at most a share of `noise_multiplier` / 2^20. The sum is one of integers, so that it is the ideal
        Gaussian mechanism, randomly rounded, as in `fedmed.privacy.gaussian`. Noise that is scaled and rounded before
        it is added has values of unlike weight: low bits would then tell counts apart (Mironov 2012).

        It is charged when it is called: whoever calls keeps the answer and never asks again.
        """
        if self.noise_multiplier == 0:
            return counts.astype(np.float64)
        patient = max(1, math.floor(SIGMA_CELLS / self.noise_multiplier))
        noise = np.rint(source.normal(counts.size) * SIGMA_CELLS).astype(np.int64)
        return (counts * patient + noise.reshape(counts.shape)) / patient


def metrics_plans(task: TaskConfig, privacy: PrivacyConfig) -> dict[str, HistogramPlan]:
    """The histogram plan of each site, from declared values alone; none unless `privacy.metrics=private`.

    Raises:
        PrivacyError: the AUC would be further off than it is worth, or the epsilon cannot be reached.
    """
    if privacy.metrics != "private":
        return {}
    plans = _plans(task, privacy, privacy.metrics_epsilon)
    error = expected_error(task, privacy, plans.values())
    if error > LARGEST_AUC_ERROR:
        raise PrivacyError(
            f"privacy.metrics=private: expected error of the AUC {error:.3f} at privacy.metrics_epsilon="
            f"{privacy.metrics_epsilon:g}, {privacy.metrics_bins} bins, {_held_out(task)} declared held-out "
            f"{task.unit}s at {len(plans)} site(s), prevalence {privacy.metrics_prevalence:g}; above "
            f"{LARGEST_AUC_ERROR} it is refused; {_what_would_help(task, privacy, plans.values())}"
        )
    return plans


def expected_error(task: TaskConfig, privacy: PrivacyConfig, plans: Iterable[HistogramPlan]) -> float:
    """`expected_auc_error` of these plans together, at the declared sizes and prevalence."""
    return _error(task, privacy, noise=math.hypot(*(plan.noise_multiplier for plan in plans)))


def site_events(plan: PrivacyPlan, histogram: HistogramPlan | None) -> list[dp_accounting.DpEvent]:
    """What a run costs one unit at a site: the training, and the metrics where they are private.

    A patient is either trained on or held out, and so pays for one of the two; charging both to each is the
    conservative claim.
    """
    return [plan.event()] if histogram is None else [plan.event(), histogram.event()]


def site_charges(plan: PrivacyPlan, histogram: HistogramPlan | None) -> Counter[str]:
    """What a site's ledger holds for a whole run: how often each event, as JSON, may run."""
    charges = Counter({to_json(plan.event(rounds=1)): plan.rounds})
    if histogram is not None:
        charges[to_json(histogram.event())] += 1
    return charges


def site_epsilon(plan: PrivacyPlan, histogram: HistogramPlan | None, *, accountant: str = "pld") -> float:
    """Epsilon of `site_events` at the plan's delta."""
    if histogram is None:
        return plan.epsilon(accountant=accountant)
    event = dp_accounting.ComposedDpEvent(tuple(site_events(plan, histogram)))
    return epsilon_of(event, delta=plan.delta, accountant=accountant)


def run_events(
    plans: Mapping[str, PrivacyPlan], histograms: Mapping[str, HistogramPlan]
) -> list[dp_accounting.DpEvent]:
    """What a run costs a patient with records at every site."""
    return [event for site, plan in plans.items() for event in site_events(plan, histograms.get(site))]


def _plans(task: TaskConfig, privacy: PrivacyConfig, epsilon: float) -> dict[str, HistogramPlan]:
    plans = {}
    for site in task.declared_sizes:
        plan = HistogramPlan(
            unit=task.unit,
            bins=privacy.metrics_bins,
            prevalence=privacy.metrics_prevalence,
            noise_multiplier=0.0,
            delta=declared_delta(task, privacy, site),
        )
        plans[site] = plan.calibrate(epsilon=epsilon)
    return plans


def _held_out(task: TaskConfig) -> int:
    return sum(task.declared_held_out(site) for site in task.declared_sizes)


def _error(task: TaskConfig, privacy: PrivacyConfig, *, noise: float) -> float:
    return expected_auc_error(
        held_out=_held_out(task),
        bins=privacy.metrics_bins,
        noise=noise,
        prevalence=privacy.metrics_prevalence,
        auc=ASSUMED_AUC,
    )


def _what_would_help(task: TaskConfig, privacy: PrivacyConfig, plans: Iterable[HistogramPlan]) -> str:
    general = "more sites, a larger task.test_fraction or another privacy.metrics_bins may help"
    noise = math.hypot(*(plan.noise_multiplier for plan in plans))
    for epsilon in (1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0):
        # Noise falls more slowly than epsilon grows: where even this much less is too much, nothing is calibrated.
        hopeless = _error(task, privacy, noise=noise * privacy.metrics_epsilon / epsilon) > LARGEST_AUC_ERROR
        if epsilon > privacy.metrics_epsilon and not hopeless:
            error = expected_error(task, privacy, _plans(task, privacy, epsilon).values())
            if error <= LARGEST_AUC_ERROR:
                return f"privacy.metrics_epsilon={epsilon:g} would give {error:.3f}; {general}"
    return f"{general}; or take privacy.metrics=none"
