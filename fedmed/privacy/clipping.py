"""Clipped gradients of patients, truncated toward zero onto the grid and summed as integers (privacy.md, rule 10).

float32 is wide enough for the work between: a whole number of cells up to 2^24 is exact in it, and so is a sum that
stays below. Where it is not (a noise multiplier below 1/16, gradients of float64) the same is done in float64.
"""

import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from fedmed.errors import PrivacyError
from fedmed.privacy.block_gradients import BlockGradients
from fedmed.privacy.gaussian import draw_cells
from fedmed.privacy.grid import Grid

# Entries at most whose squares are added up in the gradient's own type; the sums of such pieces are added in float64.
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
        # Patients whose whole numbers surely add up to less than 2^24.
        self._narrow_patients = int(EXACT // grid.bound) if 1e-30 < grid.cell < 1e30 else 0
        self._quotients = torch.empty(0, device=device)

    def add(self, gradients: BlockGradients) -> None:
        """Add a block's patients.

        Raises:
            PrivacyError: they are more than `grid.most_patients`, with those before.
        """
        self._patients += gradients.patients
        self._grid.check_fits(self._patients)
        if gradients.patients == 0:
            return
        narrow = self._narrow_patients > 0 and gradients.dtype == torch.float32
        if narrow and gradients.device.type == "cpu":
            self._add_compiled(gradients)
        else:
            self._add(gradients.computed(), narrow)

    def _add_compiled(self, gradients: BlockGradients) -> None:
        # A second to load, which nobody else need spend.
        from fedmed.privacy.jobs import Jobs

        lost, error = norm_error(gradients.entries, torch.float32)
        Jobs(gradients).add_clipped(
            self._total.numpy(), bound=self._grid.bound, cell=self._grid.cell, slack=_slack(torch.float32),
            piece=PIECE, lost=lost, error=error, most=self._narrow_patients,
        )  # fmt: skip

    def _add(self, gradients: list[Tensor], narrow: bool) -> None:
        """Add parts, each (pieces, patients, entries); narrow where float32 holds their cells."""
        patients = gradients[0].shape[1]
        gradients = gradients if narrow else [part.double() for part in gradients]
        norms = norm_bounds(gradients)
        finite = torch.isfinite(norms)
        # On an accelerator to ask would be to wait.
        if norms.device.type != "cpu" or not bool(finite.all()):
            gradients = [part.masked_fill(~finite[:, None], 0) for part in gradients]
            norms = norms.masked_fill(~finite, 0)
        kind = gradients[0].dtype
        cells = (norms / self._grid.bound).clamp(min=self._grid.cell) * _slack(kind)
        cells = cells.to(kind)[:, None]
        step = self._narrow_patients if narrow else patients
        total_kind = torch.float32 if narrow else torch.int64
        summed = torch.empty(len(self._total), dtype=total_kind, device=cells.device)
        for first in range(0, patients, step):
            rows = slice(first, first + step)
            self._sum([part[:, rows] for part in gradients], cells[rows], summed)
            self._total += summed.to(torch.int64)

    def _sum(self, gradients: list[Tensor], cell: Tensor, total: Tensor) -> None:
        """Into (entries,) the sum of (pieces, patients, entries) parts in each patient's cells (patients, 1)."""
        most = max(CACHED_ENTRIES, len(cell))
        if cell.device.type != "cpu":
            most = sum(part.numel() for part in gradients)
        if self._quotients.dtype != cell.dtype or self._quotients.numel() < most:
            self._quotients = cell.new_empty(most)
        first = 0
        for part in gradients:
            for piece in _cached(part, most):
                quotients = self._quotients[: piece.numel()].view(piece.shape)
                whole = torch.div(piece, cell, rounding_mode="trunc", out=quotients).to(total.dtype)
                entries = piece.shape[0] * piece.shape[2]
                # In float32 a sum of whole numbers below 2^24: exact in any order.
                torch.sum(whole, dim=1, out=total[first : first + entries].view(len(piece), -1))
                first += entries

    def cells(self) -> Tensor:
        """(entries,) int64: the sum so far."""
        return self._total


def _cached(part: Tensor, most: int) -> Iterator[Tensor]:
    """Pieces of (pieces, patients, entries), in order, of at most so many entries."""
    patients, entries = part.shape[1:]
    if patients * entries <= most:
        yield from part.split(most // (patients * entries))
        return
    for row in part.split(1):
        yield from row.split(most // patients, dim=2)


def _slack(dtype: torch.dtype) -> float:
    """What makes a cell larger: the quotient is rounded once, and so is what an entry is divided by."""
    return 1 + 2 * torch.finfo(dtype).eps


def norm_error(entries: int, dtype: torch.dtype) -> tuple[float, float]:
    """What rounding may take from a norm: from the sum of the squares, then, relative, from its root.

    Squares of a piece that are added in any order are off by a relative (`PIECE` + 3) * u at most, u the unit roundoff
    (Higham 2002, section 4.2), half of that after the root; a product or partial sum below the smallest normal number
    may be lost.
    """
    numbers = torch.finfo(dtype)
    error = (PIECE / 2 + 16) * numbers.eps / 2 + (entries + 16) * 2.0**-53
    return 2 * entries * numbers.tiny, error


def norm_bounds(gradients: list[Tensor]) -> Tensor:
    """(patients,) float64: no less than the L2 norm of all that a patient has, 1.6e-5 of it more for float32.

    A patient's bits do not tell what is beside it.

    Args:
        gradients: parts, each (pieces, patients, entries).
    """
    squares = torch.zeros(1, dtype=torch.float64, device=gradients[0].device)
    for part in gradients:
        for pieces in _in_pieces(part):
            norms = torch.linalg.vector_norm(pieces, dim=3).double()
            # Each patient's side by side: the order of a sum over what lies apart depends on how many there are.
            squares = squares + norms.square().movedim(1, 0).flatten(1).sum(dim=1)
    lost, error = norm_error(sum(part.shape[0] * part.shape[2] for part in gradients), gradients[0].dtype)
    return (squares + lost).sqrt() * (1 + error)


def _in_pieces(part: Tensor) -> list[Tensor]:
    """(pieces, patients, entries) as (pieces, patients, more pieces, at most `PIECE`), all alike where that can be."""
    entries = part.shape[2]
    fewest = -(-entries // PIECE)
    alike = next((n for n in range(fewest, 2 * fewest) if entries % n == 0), None)
    if alike:
        return [part.unflatten(2, (alike, -1))]
    whole = entries - entries % PIECE
    return [part[..., :whole].unflatten(2, (-1, PIECE)), part[:, :, None, whole:]]


def clipped_sum(gradients: list[Tensor], *, grid: Grid) -> list[Tensor]:
    """`ClippedSum` of gradients that are at hand: (*shape) int64 for each (patients, *shape)."""
    parts = [g.reshape(len(g), math.prod(g.shape[1:])) for g in gradients]
    total = ClippedSum(sum(part.shape[1] for part in parts), grid=grid, device=parts[0].device)
    total.add(BlockGradients.at_hand(parts))
    cells = total.cells().split([part.shape[1] for part in parts])
    return [own.view(g.shape[1:]) for own, g in zip(cells, gradients, strict=True)]


def load_compiled() -> None:
    """Load, and the first time on a machine compile, what float32 on a CPU is clipped and noised with."""
    from fedmed.privacy import compiled

    clipped_sum([torch.zeros(1, 1)], grid=Grid(noise_multiplier=1.0, max_grad_norm=1.0))
    compiled.group_norm(*(np.zeros((1,) * n, dtype=np.float32) for n in (3, 3, 2, 2, 2, 2)))
    draw_cells(1, bytes)


def noised(cells: Tensor, noise: Tensor, *, grid: Grid) -> Tensor:
    """A sum of clipped gradients with its noise, both whole cells, as float64 in the gradient's unit.

    What happens after the integer addition is post-processing.

    Raises:
        PrivacyError: there is not one value of noise for each cell.
    """
    if cells.shape != noise.shape:
        # PyTorch would give one value to several.
        raise PrivacyError(f"noise of shape {tuple(noise.shape)} for {tuple(cells.shape)} cells")
    return (cells + noise).double().mul_(grid.cell)
