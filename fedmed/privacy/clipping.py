"""Clipped gradients of patients, truncated toward zero onto the grid and summed as integers (privacy.md, rule 10).

float32 is wide enough for the work between: a whole number of cells up to 2^24 is exact in it, and so is a sum that
stays below. Where it is not (a noise multiplier below 1/16, gradients of float64) the same is done in float64.
"""

import torch
from torch import Tensor

from fedmed.privacy.grid import Grid
from fedmed.privacy.randomness import RandomSource

# Entries whose squares are added up in the gradient's own type; the sums of such pieces are added in float64.
PIECE = 512
# Entries that are divided and truncated at once: they stay in the cache of one core.
CACHED_ENTRIES = 2**17
# Whole numbers up to here are exact in float32.
EXACT = 2**24


class ClippedSum:
    """Every patient's gradient clipped over all parameters, truncated toward zero and added up.

    In exact arithmetic the truncated gradient of each patient has an L2 norm of at most `grid.bound` cells,
    whatever it was. One with a NaN or infinite entry, or whose squares overflow its type, is zero. The sum is
    exact, so that it depends neither on the order of the patients nor on how a batch was split.
    """

    def __init__(self, entries: int, *, grid: Grid, device: torch.device) -> None:
        self._grid = grid
        self._patients = 0
        self._total = torch.zeros(entries, dtype=torch.int64, device=device)
        # Whole numbers: of as many patients as surely stay below 2^24.
        self._partial = torch.zeros(entries, dtype=torch.float32, device=device)
        self._room = self._most = int(EXACT // grid.bound) if 1e-30 < grid.cell < 1e30 else 0
        self._quotients = torch.empty(0, device=device)

    def add(self, gradients: Tensor) -> None:
        """Add patients.

        Args:
            gradients: (patients, entries) float32 or float64.

        Raises:
            PrivacyError: they are more than `grid.most_patients`, with those before.
        """
        self._patients += len(gradients)
        self._grid.check_fits(self._patients)
        if len(gradients) == 0:
            return
        narrow = self._most > 0 and gradients.dtype == torch.float32
        gradients = gradients if narrow else gradients.double()
        norms = norm_bounds(gradients)
        finite = torch.isfinite(norms)
        # On an accelerator to ask would be to wait.
        if gradients.is_cuda or not bool(finite.all()):
            gradients = gradients.masked_fill(~finite[:, None], 0)
            norms = norms.masked_fill(~finite, 0)
        # A quotient is rounded once, and so is what it is divided by.
        slack = 1 + 2 * torch.finfo(gradients.dtype).eps
        cells = (norms / self._grid.bound).clamp(min=self._grid.cell) * slack
        cells = cells.to(gradients.dtype)[:, None]
        first = 0
        while first < len(gradients):
            rows = slice(first, first + (self._room if narrow else len(gradients)))
            self._add(gradients[rows], cells[rows], narrow)
            first = rows.stop

    def _add(self, gradients: Tensor, cell: Tensor, narrow: bool) -> None:
        """Add (patients, entries) in units of each patient's own cell (patients, 1)."""
        patients, entries = gradients.shape
        width = min(entries, entries if gradients.is_cuda else max(1, CACHED_ENTRIES // patients))
        if self._quotients.dtype != gradients.dtype or self._quotients.numel() < patients * width:
            self._quotients = gradients.new_empty(patients * width)
        quotients = self._quotients[: patients * width].view(patients, width)
        for first in range(0, entries, width):
            piece = gradients[:, first : first + width]
            whole = torch.div(piece, cell, rounding_mode="trunc", out=quotients[:, : piece.shape[1]])
            if narrow:
                # A sum of whole numbers below 2^24, exact in any order.
                self._partial[first : first + width] += whole.sum(dim=0)
            else:
                self._total[first : first + width] += whole.to(torch.int64).sum(dim=0)
        if narrow:
            self._room -= patients
            if self._room == 0:
                self._flush()

    def _flush(self) -> None:
        self._total += self._partial.to(torch.int64)
        self._partial.zero_()
        self._room = self._most

    def cells(self) -> Tensor:
        """(entries,) int64: the sum so far."""
        self._flush()
        return self._total


def norm_bounds(gradients: Tensor) -> Tensor:
    """(patients,) float64: no less than each row's L2 norm, and about 1.6e-5 of it more for float32.

    A row's bits do not tell what is beside it. Squares of a piece that are added in any order, each with its root,
    are off by a relative (`PIECE` + 3) * u at most, u the unit roundoff (Higham 2002, section 4.2), half of that
    after the root; a product or partial sum below the smallest normal number may be lost.
    """
    entries = gradients.shape[1]
    numbers = torch.finfo(gradients.dtype)
    whole = entries - entries % PIECE
    squares = torch.linalg.vector_norm(gradients[:, whole:], dim=1).double().square()
    if whole:
        pieces = torch.linalg.vector_norm(gradients[:, :whole].unflatten(1, (-1, PIECE)), dim=2)
        squares = squares + pieces.double().square().sum(dim=1)
    lost = 2 * entries * numbers.tiny
    error = (PIECE / 2 + 16) * numbers.eps / 2 + (entries / PIECE + 16) * 2.0**-53
    return (squares + lost).sqrt() * (1 + error)


def clipped_sum(gradients: list[Tensor], *, grid: Grid) -> list[Tensor]:
    """`ClippedSum` of gradients that are at hand: (*shape) int64 for each (patients, *shape)."""
    flat = torch.cat([g.flatten(1) for g in gradients], dim=1)
    total = ClippedSum(flat.shape[1], grid=grid, device=flat.device)
    total.add(flat)
    parts = total.cells().split([g[0].numel() if len(g) else g.flatten(1).shape[1] for g in gradients])
    return [cells.view(g.shape[1:]) for cells, g in zip(parts, gradients, strict=True)]


def noised(cells: Tensor, *, grid: Grid, source: RandomSource) -> Tensor:
    """A sum of clipped gradients with its noise, as float64 in the gradient's unit.

    What happens after the integer addition is post-processing.
    """
    noise = torch.from_numpy(grid.noise(cells.numel(), source)).view(cells.shape)
    return (cells + noise.to(cells.device)).double() * grid.cell
