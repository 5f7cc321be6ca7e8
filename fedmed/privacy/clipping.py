"""Clipped gradients of patients, truncated toward zero onto the grid and summed as integers (privacy.md, rule 10)."""

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
    flat = [g.reshape(patients, -1) for g in gradients]
    scale = _cells_per_unit(flat, grid)
    sums = []
    for g in flat:
        own = scale.to(g.device)
        # NaN times zero is NaN: a patient who counts as zero is left out.
        kept = None if bool((own > 0).all()) else own > 0
        pieces = [
            _truncated(piece if kept is None else piece[kept], own if kept is None else own[kept])
            for piece in _blocks(g)
        ]
        sums.append(torch.cat(pieces))
    return [s.view(g.shape[1:]) for s, g in zip(sums, gradients, strict=True)]


def noised(cells: Tensor, *, grid: Grid, source: RandomSource) -> Tensor:
    """A sum of clipped gradients with its noise, as float64 in the gradient's unit.

    What happens after the integer addition is post-processing.
    """
    noise = torch.from_numpy(grid.noise(cells.numel(), source)).view(cells.shape)
    return (cells + noise.to(cells.device)).double() * grid.cell


def _cells_per_unit(flat: list[Tensor], grid: Grid) -> Tensor:
    """(patients,) float64: what clips a gradient and turns it into cells; zero for one that is not finite.

    The shrinking covers the rounding of a float64 sum of `entries` squares in any order (relative error at
    most entries * 2^-53; Higham 2002, section 4.2), of its root, and of six products and quotients. Truncation
    alone would not do: an entry that is a whole number of cells already stays where it is.
    """
    entries = sum(g.shape[1] for g in flat)
    squares = sum((_squares(g).to(flat[0].device) for g in flat[1:]), start=_squares(flat[0]))
    # The squares of float32 gradients stay finite; one of float64 that does not is no gradient.
    scale = (grid.bound / squares.sqrt()).clamp(max=1 / grid.cell)
    scale = scale * (1 - (entries + 16) * 2.0**-52)
    return torch.where(torch.isfinite(squares), scale, torch.zeros_like(scale))


def _squares(flat: Tensor) -> Tensor:
    """(patients,) float64: each row's squares, added by itself, so that its bits do not tell what is beside it."""
    rows = [torch.stack([part.double().square().sum() for part in row.split(BLOCK_ENTRIES)]) for row in flat]
    return torch.stack([row.sum() for row in rows])


def _blocks(flat: Tensor) -> tuple[Tensor, ...]:
    """(patients, entries) in pieces of some entries of all patients."""
    return flat.split(max(1, BLOCK_ENTRIES // len(flat)), dim=1)


def _truncated(piece: Tensor, scale: Tensor) -> Tensor:
    """(entries,) int64: the sum of the rows, each in cells and truncated toward zero."""
    # The conversion of a float to an integer truncates toward zero.
    return (piece.double() * scale[:, None]).to(torch.int64).sum(dim=0)
