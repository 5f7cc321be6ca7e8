"""Images to square pixels and to at most a given size, by area averages, a few rows at a time."""

from collections.abc import Callable, Iterator
from functools import lru_cache

import numpy as np
import scipy.sparse
from numpy.typing import NDArray

from fedmed.dicom.reasons import Quarantined, Reason

MAX_ASPECT = 16.0
"""A pixel's height over its width, or the reverse, beyond which the spacing is not believed."""
_SQUARE = 0.01
_BLOCK_VALUES = 1 << 15

ReadRows = Callable[[int, int], tuple[NDArray[np.float32], NDArray[np.bool_] | None]]
"""(first, last) -> rows first to last - 1 as float32, (rows, columns * channels), and where they are padding.

Padding holds 0 in the values; None where no value is padding.
"""


def target_shape(rows: int, columns: int, *, aspect: float, size: int) -> tuple[int, int]:
    """Rows and columns after resampling to square pixels with the longest side at most `size` (0: no limit).

    `aspect`: a pixel's height over its width. Never more rows or columns than before; at least 1 of each.

    >>> target_shape(400, 512, aspect=1.0, size=256), target_shape(300, 400, aspect=0.5, size=0)
    ((200, 256), (150, 400))
    """
    if not 1 / MAX_ASPECT <= aspect <= MAX_ASPECT:
        raise Quarantined(Reason.PIXEL_SPACING)
    height, width = float(rows), float(columns)
    if abs(aspect - 1) > _SQUARE:
        # The finer direction is made as coarse as the other: nothing is invented.
        height, width = (height * aspect, width) if aspect < 1 else (height, width / aspect)
    factor = min(1.0, size / max(height, width)) if size else 1.0
    return max(1, round(height * factor)), max(1, round(width * factor))


def row_blocks(rows: int, values_per_row: int) -> Iterator[tuple[int, int]]:
    """(first, last) of runs of rows that fit the processor's cache: fresh memory costs more than the arithmetic."""
    step = max(1, _BLOCK_VALUES // values_per_row)
    for first in range(0, rows, step):
        yield first, min(first + step, rows)


def resample(
    read: ReadRows, rows: int, columns: int, shape: tuple[int, int], *, channels: int = 1
) -> NDArray[np.float32]:
    """The image that `read` yields, (rows, columns), at `shape` = (fewer rows, fewer columns); channels last if not 1.

    Each result is the mean over its area of the image (partly covered pixels by their part), so that nothing aliases.
    Padding takes no part in a mean; a result of which at least half is padding is NaN.
    """
    total = np.zeros((shape[0], columns * channels), np.float32)
    padded: NDArray[np.float32] | None = None
    for first, last, top, bottom, means in _row_means(rows, shape[0], columns * channels):
        values, padding = read(first, last)
        total[top:bottom] += means @ values
        if padding is not None:
            padded = np.zeros_like(total) if padded is None else padded
            padded[top:bottom] += means @ padding.astype(np.float32)
    result = _across(total, columns, shape, channels)
    if padded is not None:
        present = 1 - _across(padded, columns, shape, channels)
        result = np.where(present > 0.5, result / np.maximum(present, 0.5), np.float32(np.nan))
    return result if channels > 1 else result[:, :, 0]


def _across(
    values: NDArray[np.float32], columns: int, shape: tuple[int, int], channels: int
) -> NDArray[np.float32]:
    """Means along rows: (shape[0], columns * channels) to (shape[0], shape[1], channels)."""
    if columns == shape[1]:
        return values.reshape(*shape, channels)
    upright = values.reshape(shape[0], columns, channels).transpose(1, 0, 2).reshape(columns, -1)
    return (_means(columns, shape[1]) @ upright).reshape(shape[1], shape[0], channels).transpose(1, 0, 2)


@lru_cache(maxsize=16)
def _means(count: int, fewer: int) -> scipy.sparse.csr_array:
    """(fewer, count): each row averages its share of `count` equal cells; rows sum to 1."""
    edges = np.arange(fewer + 1) * (count / fewer)
    most = int(np.ceil(count / fewer)) + 1
    cells = np.minimum(np.floor(edges[:-1]).astype(np.int64)[:, None] + np.arange(most), count - 1)
    parts = np.minimum(cells + 1, edges[1:, None]) - np.maximum(cells, edges[:-1, None])
    # The last cell may be named twice where a share ends at the border: its part counts once.
    parts[:, 1:][cells[:, 1:] == cells[:, :-1]] = 0
    parts = np.maximum(parts, 0)
    parts /= parts.sum(axis=1, keepdims=True)
    rows = np.repeat(np.arange(fewer), most)
    matrix = scipy.sparse.csr_array(
        (parts.ravel().astype(np.float32), (rows, cells.ravel())), shape=(fewer, count)
    )
    matrix.eliminate_zeros()
    return matrix


@lru_cache(maxsize=16)
def _row_means(
    rows: int, fewer: int, values_per_row: int
) -> list[tuple[int, int, int, int, scipy.sparse.csr_array]]:
    """(first, last, top, bottom, means): `means` times rows first … last - 1 adds to results top … bottom - 1."""
    matrix = _means(rows, fewer)
    blocks = []
    for first, last in row_blocks(rows, values_per_row):
        top, bottom = first * fewer // rows, min(fewer, -(-last * fewer // rows))
        blocks.append((first, last, top, bottom, matrix[top:bottom, first:last]))
    return blocks
