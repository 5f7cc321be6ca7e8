"""Metrics of a binary score as functions of counts, so that sites can be merged without their records."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

# Logits are counted in cells of 0.001 from -20 to 20; values beyond fall in the outermost cells. In cells of 0.01
# enough pairs share one to move the AUC of 100 records by 0.002.
CELL = 0.001
CELLS = 40_000


@dataclass(frozen=True)
class ScoreCounts:
    """How many negative and positive records have a logit in each cell: (2, CELLS) int64.

    This is an exact release: it is not covered by any epsilon.
    """

    counts: NDArray[np.int64]

    @classmethod
    def of(cls, logits: NDArray[np.float32], labels: NDArray[np.float32]) -> "ScoreCounts":
        """The counts of a set of records; non-finite logits count as 0."""
        finite = np.nan_to_num(logits.astype(np.float64), nan=0.0, posinf=np.inf, neginf=-np.inf)
        cells = np.clip(np.floor(np.clip(finite, -1e3, 1e3) / CELL) + CELLS // 2, 0, CELLS - 1).astype(
            np.int64
        )
        counts = np.zeros((2, CELLS), dtype=np.int64)
        np.add.at(counts, (labels.astype(np.int64), cells), 1)
        return cls(counts)

    def __add__(self, other: "ScoreCounts") -> "ScoreCounts":
        return ScoreCounts(self.counts + other.counts)

    @property
    def records(self) -> int:
        """How many records were counted."""
        return int(self.counts.sum())

    def auc(self) -> float | None:
        """Area under the ROC curve, the Mann-Whitney statistic with ties counted half; None for one class.

        >>> ScoreCounts.of(np.array([-1.0, 0.5, 2.0]), np.array([0.0, 0.0, 1.0])).auc()
        1.0
        """
        negative, positive = self.counts
        if not negative.sum() or not positive.sum():
            return None
        below = np.cumsum(negative) - negative
        return float((positive * (below + 0.5 * negative)).sum() / (negative.sum() * positive.sum()))

    def accuracy(self) -> float | None:
        """The fraction on the right side of logit 0 (probability 0.5); None without records."""
        negative, positive = self.counts
        right = negative[: CELLS // 2].sum() + positive[CELLS // 2 :].sum()
        return float(right / self.records) if self.records else None
