"""The integers on which clipped gradients are summed and noised, so that no floating-point sum is released.

No torch here: a plan has a grid, and is made before torch is loaded.

Gradients truncated to whole cells (`fedmed.privacy.clipping`), summed and noised as integers are post-processing
of the ideal Gaussian mechanism (`fedmed.privacy.gaussian`); a sum of floats is not (Mironov 2012, "On significance
of the least significant bits for differential privacy"; Haney et al. 2022).
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedmed.errors import PrivacyError, require
from fedmed.privacy.gaussian import BLOCK, LARGEST_CELLS, SIGMA_CELLS
from fedmed.privacy.randomness import RandomSource

# Sums end here, so that the noise still fits into int64.
LARGEST_SUM = 2**63 - 1 - LARGEST_CELLS
# The squares of what lies between are ordinary float64 numbers.
SMALLEST, LARGEST = 1e-100, 1e100


@dataclass(frozen=True, kw_only=True)
class Grid:
    """Cells of (`noise_multiplier` * `max_grad_norm`) / 2^20, so that the noise has a deviation of 2^20 cells.

    Raises:
        PrivacyError: a patient's clipped gradient does not fit into `LARGEST_SUM` cells, or the clip is absurd.
    """

    noise_multiplier: float
    max_grad_norm: float

    def __post_init__(self) -> None:
        require(self.noise_multiplier > 0, "grid.noise_multiplier", self.noise_multiplier, "> 0")
        for name, value in (("max_grad_norm", self.max_grad_norm), ("cell", self.cell)):
            if not SMALLEST <= value <= LARGEST:
                raise PrivacyError(
                    f"grid.{name}={value:g}: expected {SMALLEST:g} to {LARGEST:g}; change privacy.max_grad_norm"
                )
        if self.bound > LARGEST_SUM:
            raise PrivacyError(
                f"grid.noise_multiplier={self.noise_multiplier:g}: one gradient would overflow 64 bits; add noise"
            )

    @property
    def cell(self) -> float:
        """The side of a cell, in the gradient's unit."""
        return self.noise_multiplier * self.max_grad_norm / SIGMA_CELLS

    @property
    def bound(self) -> float:
        """`max_grad_norm` in cells: the L2 sensitivity of the sum."""
        return SIGMA_CELLS / self.noise_multiplier

    @property
    def most_patients(self) -> int:
        """Clipped gradients that a sum holds without overflow: 8 * 10^12 * noise multiplier."""
        return LARGEST_SUM // math.ceil(self.bound)

    def check_fits(self, patients: int) -> None:
        """Refuse a sum that could overflow."""
        if patients > self.most_patients:
            raise PrivacyError(
                f"noise multiplier {self.noise_multiplier:g}: the sum of {patients} gradients would overflow 64 "
                f"bits, that of {self.most_patients} would not; add noise, or lower training.sample_rate"
            )

    def noise(self, count: int, source: RandomSource) -> NDArray[np.int64]:
        """(count,) int64 cells: the Gaussian of deviation `noise_multiplier` * `max_grad_norm`, on the grid."""
        cells = np.empty(count, dtype=np.int64)
        for start in range(0, count, BLOCK):
            block = cells[start : start + BLOCK]
            # A no-operation but for a source that is not on the grid already.
            block[:] = np.rint(source.normal(len(block)) * SIGMA_CELLS)
        return cells
