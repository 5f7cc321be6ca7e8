"""Clipped gradients of patients, truncated toward zero onto the grid and summed as integers (privacy.md, rule 10)."""

from collections.abc import Iterator

import torch
from torch import Tensor

from fedmed.privacy.grid import Grid
from fedmed.privacy.randomness import RandomSource

# Gradients that are in work at once, as float64 in the cache of one core.
BLOCK_ENTRIES = 2**17


def clipped_sum(gradients: list[Tensor], *, grid: Grid) -> list[Tensor]:
    """Every patient's gradient clipped over all parameters, truncated toward zero, summed: int64 cells.

    In exact arithmetic the truncated gradient of each patient has an L2 norm of at most `grid.bound` cells,
    whatever it was; one with a NaN or infinite entry is zero. The sum is exact, so that it depends neither
    on the order of the patients nor on how a batch was split.

    Args:
        gradients: one tensor (patients, *shape) a parameter, float32 or float64.

    Returns:
        one tensor (*shape) int64 a parameter.

    Raises:
        PrivacyError: more than `grid.most_patients` patients.
    """
    patients = len(gradients[0])
    grid.check_fits(patients)
    if patients == 0:
        return [torch.zeros(g.shape[1:], dtype=torch.int64, device=g.device) for g in gradients]
    blocks = _blocks([g.reshape(patients, -1) for g in gradients])
    scale = _cells_per_unit(blocks, grid).tolist()
    sums = []
    for block in blocks:
        cells = torch.zeros(sum(piece.shape[1] for piece in block), dtype=torch.int64, device=block[0].device)
        for own, row in zip(scale, _rows(block), strict=True):
            # NaN times zero is NaN: a patient who counts as zero is left out.
            if own > 0:
                # The conversion of a float to an integer truncates toward zero.
                cells += row.mul_(own).to(torch.int64)
        sums.append(cells)
    ends = torch.cat(sums).split([g[0].numel() for g in gradients])
    return [cells.view(g.shape[1:]) for cells, g in zip(ends, gradients, strict=True)]


def noised(cells: Tensor, *, grid: Grid, source: RandomSource) -> Tensor:
    """A sum of clipped gradients with its noise, as float64 in the gradient's unit.

    What happens after the integer addition is post-processing.
    """
    noise = torch.from_numpy(grid.noise(cells.numel(), source)).view(cells.shape)
    return (cells + noise.to(cells.device)).double() * grid.cell


def _cells_per_unit(blocks: list[list[Tensor]], grid: Grid) -> Tensor:
    """(patients,) float64: what clips a gradient and turns it into cells; zero for one that is not finite.

    The shrinking covers the rounding of a float64 sum of `entries` squares in any order (relative error at
    most entries * 2^-53; Higham 2002, section 4.2), of its root, and of six products and quotients. Truncation
    alone would not do: an entry that is a whole number of cells already stays where it is.
    """
    entries = sum(piece.shape[1] for block in blocks for piece in block)
    squares = torch.stack([_squares(block) for block in blocks]).sum(dim=0)
    # The squares of float32 gradients stay finite; one of float64 that does not is no gradient.
    scale = (grid.bound / squares.sqrt()).clamp(max=1 / grid.cell)
    scale = scale * (1 - (entries + 16) * 2.0**-52)
    return torch.where(torch.isfinite(squares), scale, torch.zeros_like(scale))


def _squares(block: list[Tensor]) -> Tensor:
    """(patients,) float64: each row's squares, added by itself, so that its bits do not tell what is beside it."""
    return torch.stack([torch.dot(row, row) for row in _rows(block)])


def _blocks(flat: list[Tensor]) -> list[list[Tensor]]:
    """(patients, entries) tensors cut up and put together again to about `BLOCK_ENTRIES` entries a patient."""
    blocks: list[list[Tensor]] = [[]]
    size = 0
    for piece in (piece for g in flat for piece in g.split(BLOCK_ENTRIES, dim=1)):
        if size and size + piece.shape[1] > BLOCK_ENTRIES:
            blocks.append([])
            size = 0
        blocks[-1].append(piece)
        size += piece.shape[1]
    return blocks


def _rows(block: list[Tensor]) -> Iterator[Tensor]:
    """One patient's entries after the other, (entries,) float64 and nobody else's memory."""
    for row in zip(*(piece.unbind() for piece in block), strict=True):
        yield torch.cat(row).double() if row[0].dtype != torch.float64 else torch.cat(row)
