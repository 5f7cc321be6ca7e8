"""Metrics of a binary score from noisy histograms: post-processing, which costs no further epsilon.

A histogram is (2, bins): negative patients in row 0, positive ones in row 1, in public bins of the score. Intervals
and suppression read the noisy cells and the public noise, never a true count (privacy.md, rule 17).
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

# A class or bin whose noisy count is below this many standard deviations of its noise gives no figure.
SUPPRESSED_BELOW = 3.0
Z_95 = 1.959964
SPECIFICITY = 0.9


def bin_edges(bins: int, prevalence: float = 0.5) -> NDArray[np.float64]:
    """(bins + 1,) public edges in probability from 0 to 1, with 0.5 among them; evenly spaced at prevalence 0.5.

    At another one they are shifted by its log-odds, as scores are that know it: of an outcome that one patient in
    twenty has, most scores lie below 0.1. The edge nearest to 0.5 is then moved there.

    >>> bin_edges(4).tolist()
    [0.0, 0.25, 0.5, 0.75, 1.0]
    """
    inner = np.arange(1, bins) / bins
    shifted = inner * prevalence / (inner * prevalence + (1 - inner) * (1 - prevalence))
    edges = np.concatenate([[0.0], shifted, [1.0]])
    edges[1 + int(np.argmin(np.abs(shifted - 0.5)))] = 0.5
    return edges


def consistent(counts: NDArray[np.float64]) -> NDArray[np.float64]:
    """(..., bins) the nearest cells (L2) with none negative and, in each row, the row's noisy total, or 0 where that
    is negative: "norm-sub" of Wang et al. (2020), "Locally differentially private frequency estimation with
    consistency", section 4. Clipping at 0 alone would add patients to every row.

    >>> consistent(np.array([[4.0, 3.0, -1.0]]))
    array([[3.5, 2.5, 0. ]])
    """
    total = np.maximum(counts.sum(axis=-1, keepdims=True), 0.0)
    descending = -np.sort(-counts, axis=-1)
    shift = (np.cumsum(descending, axis=-1) - total) / np.arange(1, counts.shape[-1] + 1)
    # The last cell that stays above its shift; with a total of 0 there is none, and every row becomes zeros.
    kept = np.maximum((descending > shift).sum(axis=-1, keepdims=True), 1)
    return np.maximum(counts - np.take_along_axis(shift, kept - 1, axis=-1), 0.0)


def auc_of(counts: NDArray[np.float64]) -> NDArray[np.float64]:
    """(...,) the area under the ROC curve of (..., 2, bins) cells that are not negative, the Mann-Whitney statistic
    with patients of one bin counted as ties; 0.5 where a class is empty."""
    negative, positive = counts[..., 0, :], counts[..., 1, :]
    below = np.cumsum(negative, axis=-1) - negative
    pairs = negative.sum(axis=-1) * positive.sum(axis=-1)
    won = (positive * (below + 0.5 * negative)).sum(axis=-1)
    return np.asarray(np.where(pairs > 0, won / np.where(pairs > 0, pairs, 1.0), 0.5))


@dataclass(frozen=True)
class Estimate:
    """A figure with its 95% interval, of patients' sampling and noise together."""

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, value: float, variance: float, *, most: float = 1.0) -> "Estimate":
        """A normal interval, cut off at 0 and `most`."""
        half = Z_95 * float(np.sqrt(variance))
        return cls(float(value), float(max(0.0, value - half)), float(min(most, value + half)))


@dataclass(frozen=True, eq=False)
class NoisyHistogram:
    """Cells as they were drawn, of one site or the sum of several.

    Attributes:
        counts: (2, bins) float64; a cell may be negative. Figures come from `consistent` cells, which are made once,
            after the sites are added: sites' noise cancels, what clipping adds would not.
        noise: standard deviation of each cell's noise.
        edges: (bins + 1,) public edges in probability.
    """

    counts: NDArray[np.float64]
    noise: float
    edges: NDArray[np.float64]

    def __add__(self, other: "NoisyHistogram") -> "NoisyHistogram":
        if not np.array_equal(self.edges, other.edges):
            raise ValueError("histograms of different bins cannot be added")
        noise = float(np.hypot(self.noise, other.noise))
        return NoisyHistogram(self.counts + other.counts, noise, self.edges)

    @cached_property
    def _cells(self) -> NDArray[np.float64]:
        return consistent(self.counts)

    @property
    def bins(self) -> int:
        """How many bins a class has."""
        return self.counts.shape[1]

    def count(self, label: int) -> Estimate | None:
        """How many patients have this label; None where that is within the noise."""
        total = float(self._cells[label].sum())
        if self._within_noise(total, self.bins):
            return None
        return Estimate.of(total, self.bins * self.noise**2, most=np.inf)

    def prevalence(self) -> Estimate | None:
        """The fraction of patients with label 1; None where the count is within the noise."""
        return self._mean(self._of_label(1), np.ones_like(self._cells))

    def auc(self) -> Estimate | None:
        """Area under the ROC curve; None where a class is within the noise.

        The interval is by the delta method: DeLong's variance (1988) of the binned scores, and the noise's.
        """
        negative, positive = self._cells
        if self.count(0) is None or self.count(1) is None:
            return None
        area = float(auc_of(self._cells))
        below = (np.cumsum(negative) - 0.5 * negative) / negative.sum()
        above = 1.0 - (np.cumsum(positive) - 0.5 * positive) / positive.sum()
        variance = 0.0
        for cells, placement in ((positive, below), (negative, above)):
            variance += float(((cells + self.noise**2) * (placement - area) ** 2).sum() / cells.sum() ** 2)
        return Estimate.of(area, variance)

    def auc_bin_width(self) -> float | None:
        """The most by which the bins alone can have moved the AUC: half of the pairs that share a bin."""
        negative, positive = self._cells
        if self.count(0) is None or self.count(1) is None:
            return None
        return float(0.5 * (negative * positive).sum() / (negative.sum() * positive.sum()))

    def accuracy(self, threshold: float = 0.5) -> Estimate | None:
        """The fraction on the right side of a threshold; None where the count is within the noise.

        Raises:
            ValueError: the threshold is no edge of a bin.
        """
        cut = self._cut(threshold)
        right = np.zeros_like(self._cells)
        right[0, :cut] = 1.0
        right[1, cut:] = 1.0
        return self._mean(right, np.ones_like(right))

    def sensitivity(self, threshold: float) -> Estimate | None:
        """The fraction of positive patients at or above a threshold that is an edge of a bin."""
        right = np.zeros_like(self._cells)
        right[1, self._cut(threshold) :] = 1.0
        return self._mean(right, self._of_label(1))

    def specificity(self, threshold: float) -> Estimate | None:
        """The fraction of negative patients below a threshold that is an edge of a bin."""
        right = np.zeros_like(self._cells)
        right[0, : self._cut(threshold)] = 1.0
        return self._mean(right, self._of_label(0))

    def threshold_at(self, specificity: float) -> float | None:
        """The least edge at which the noisy specificity is at least `specificity`; None within the noise."""
        for edge in self.edges:
            reached = self.specificity(float(edge))
            if reached is None:
                return None
            if reached.value >= specificity - 1e-12:
                return float(edge)
        return 1.0

    def brier(self) -> Estimate | None:
        """The mean squared distance of score and label, every score taken to be in the middle of its bin."""
        middles = (self.edges[:-1] + self.edges[1:]) / 2
        return self._mean(np.stack([middles**2, (1 - middles) ** 2]), np.ones_like(self._cells))

    def calibration(self) -> list[dict[str, Any]]:
        """For each bin its edges and the fraction of patients in it that are positive, None within the noise."""
        curve = []
        for index in range(self.bins):
            mask = np.zeros_like(self._cells)
            mask[:, index] = 1.0
            observed = self._mean(self._of_label(1), mask)
            low, high = self.edges[index : index + 2]
            curve.append({"from": float(low), "to": float(high), "positive": _written(observed)})
        return curve

    def figures(self) -> dict[str, Any]:
        """AUC and accuracy as a run's summary has them, with intervals; null where the count is within the noise."""
        auc, accuracy = self.auc(), self.accuracy()
        return {
            "auc": None if auc is None else auc.value,
            "auc_interval": None if auc is None else [auc.low, auc.high],
            "accuracy": None if accuracy is None else accuracy.value,
            "accuracy_interval": None if accuracy is None else [accuracy.low, accuracy.high],
        }

    def all_figures(self) -> dict[str, Any]:
        """Everything that is derived from the histogram, for a run's summary."""
        threshold = self.threshold_at(SPECIFICITY)
        at = None
        if threshold is not None:
            at = {
                "wanted_specificity": SPECIFICITY,
                "threshold": threshold,
                "specificity": _written(self.specificity(threshold)),
                "sensitivity": _written(self.sensitivity(threshold)),
            }
        return {
            **self.figures(),
            "auc_bin_width": self.auc_bin_width(),
            "brier": _written(self.brier()),
            "at_specificity": at,
            "calibration": self.calibration(),
            "negative_patients": _written(self.count(0)),
            "positive_patients": _written(self.count(1)),
            "prevalence": _written(self.prevalence()),
        }

    def _mean(self, values: NDArray[np.float64], mask: NDArray[np.float64]) -> Estimate | None:
        """The mean of `values` over the patients in the cells of `mask`, with its delta-method interval."""
        total = float((self._cells * mask).sum())
        if self._within_noise(total, int(mask.sum())):
            return None
        mean = float((self._cells * mask * values).sum() / total)
        spread = mask * (values - mean) ** 2
        return Estimate.of(mean, float(((self._cells + self.noise**2) * spread).sum()) / total**2)

    def _within_noise(self, total: float, cells: int) -> bool:
        return total <= 0 or total < SUPPRESSED_BELOW * self.noise * cells**0.5

    def _of_label(self, label: int) -> NDArray[np.float64]:
        rows = np.zeros_like(self._cells)
        rows[label] = 1.0
        return rows

    def _cut(self, threshold: float) -> int:
        cut = int(np.argmin(np.abs(self.edges - threshold)))
        if abs(self.edges[cut] - threshold) > 1e-9:
            raise ValueError(f"threshold={threshold}: expected an edge of a bin: {self.edges.tolist()}")
        return cut


def _written(estimate: Estimate | None) -> dict[str, float] | None:
    return None if estimate is None else {"value": estimate.value, "low": estimate.low, "high": estimate.high}
