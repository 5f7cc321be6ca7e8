"""What compiled functions are to do for each patient of a block."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedmed.privacy import compiled
from fedmed.privacy.block_gradients import BlockGradients, Gradient, Product

# What a patient's entries from `first` on are: the product of (rows, span) at `left`, which lies there `transposed` or
# as (span, rows), and (span, columns) at `right`; or, where `right` is 0, the `columns` values at `left`. Onto what is
# there where `add` is 1. A stride is how many float32 further the next patient's lie.
_COLUMNS = (
    "left", "left_stride", "right", "right_stride", "span", "rows", "columns", "first", "add", "transposed",
)  # fmt: skip
_JOB = np.dtype([(name, np.int64) for name in _COLUMNS])


class Jobs:
    """A block's gradients, as `fedmed.privacy.compiled` computes them."""

    def __init__(self, gradients: BlockGradients) -> None:
        self.patients, self.entries = gradients.patients, gradients.entries
        self._own = np.empty(self.entries, dtype=np.float32)
        # Where jobs point.
        self._kept: list[Tensor] = []
        rows: list[tuple[int, ...]] = []
        first = 0
        for own in gradients.sums:
            for number, gradient in enumerate(own):
                rows += self._jobs(gradient, gradients, first, add=number > 0)
            pieces, entries = own[0].shape
            first += pieces * entries
        self._table = np.array(rows, dtype=np.int64).view(_JOB).ravel()

    def _jobs(
        self, gradient: Gradient, gradients: BlockGradients, first: int, *, add: bool
    ) -> list[tuple[int, ...]]:
        block = gradients.block
        if isinstance(gradient, Product):
            left, right = (block.of(values).flatten(1, 2) for values in (gradient.left, gradient.right))
            transposed = not left.is_contiguous() and left.mT.is_contiguous() and not gradient.reach
            left, right = self._keep(left.mT).mT if transposed else self._keep(left), self._keep(right)
            rows, columns = left.shape[2], right.shape[2]
            span = left.shape[1] - gradient.reach
            # What lies beyond would be read.
            assert 0 <= min(gradient.offsets) <= max(gradient.offsets) <= gradient.reach <= left.shape[1]
            assert left.shape[1] == right.shape[1]
            return [
                (
                    left.data_ptr() + 4 * offset * rows, left.stride(0), right.data_ptr(), right.stride(0),
                    span, rows, columns, first + number * rows * columns, add, transposed,
                )
                for number, offset in enumerate(gradient.offsets)
            ]  # fmt: skip
        _, entries = gradient.shape
        values = torch.empty(1, block.patients, entries)
        gradient.write(block, values, add=False)
        return [(self._keep(values).data_ptr(), entries, 0, 0, 0, 0, entries, first, add, False)]

    def _keep(self, values: Tensor) -> Tensor:
        values = values.to(torch.float32).contiguous()
        self._kept.append(values)
        return values

    def gradient(self, patient: int) -> NDArray[np.float32]:
        """(entries,) of one patient; the next one's are written over them."""
        compiled.gradient(self._table, patient, self._own)
        return self._own

    def add_clipped(self, total: NDArray[np.int64], **limits: float) -> None:
        """Add every patient's whole cells to (entries,) int64.

        Args:
            limits: of `fedmed.privacy.compiled.add_clipped`.
        """
        compiled.add_clipped(self._table, self.patients, self._own, total, **limits)
