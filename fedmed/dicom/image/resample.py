"""Images to square pixels and to at most a given size, by area averages, a few rows at a time."""

from collections.abc import Callable, Iterator
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from fedmed.dicom.reasons import Quarantined, Reason

MAX_ASPECT = 16.0
"""A pixel's height over its width, or the reverse, beyond which the spacing is not believed."""
_SQUARE = 0.01
_BLOCK_VALUES = 1 << 15
# Up to so many values at once where boxes are added up.
_WHOLE = 1 << 21
_BAND = 16

ReadRows = Callable[[int, int], tuple[NDArray, NDArray[np.bool_] | None]]
"""(first, last) -> rows first to last - 1 as numbers, (rows, columns * channels), and where they are padding.

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
    read: ReadRows,
    rows: int,
    columns: int,
    shape: tuple[int, int],
    *,
    channels: int = 1,
    bits: int | None = None,
) -> NDArray[np.float32]:
    """The image that `read` yields, (rows, columns), at `shape` = (fewer rows, fewer columns); channels last if not 1.

    Each result is the mean over its area of the image (partly covered pixels by their part), so that nothing aliases.
    Padding takes no part in a mean; a result of which at least half is padding is NaN. `bits`: where what `read` yields
    are integers, how many of their bits are in use at most; None: any.
    """
    if channels == 1 and rows % shape[0] == columns % shape[1] == 0 and rows * columns <= _WHOLE:
        values, padding = read(0, rows)
        means = _boxes(values, rows // shape[0], columns // shape[1], bits=bits)
        if padding is None:
            return means
        return _without(means, _boxes(padding, rows // shape[0], columns // shape[1], bits=1))
    total = np.zeros((shape[0], columns * channels), np.float32)
    padded: NDArray[np.float32] | None = None
    for first, last, top, bottom, weights in _row_bands(rows, shape[0], columns * channels):
        values, padding = read(first, last)
        total[top:bottom] += weights @ values.astype(np.float32, copy=False)
        if padding is not None:
            padded = np.zeros_like(total) if padded is None else padded
            padded[top:bottom] += weights @ padding.astype(np.float32)
    result = _across(total, columns, shape[1], channels)
    if padded is not None:
        result = _without(result, _across(padded, columns, shape[1], channels))
    return result.reshape(*shape, channels) if channels > 1 else result


def _boxes(values: NDArray, height: int, width: int, *, bits: int | None) -> NDArray[np.float32]:
    """Means of boxes of `height` x `width` values: where the size is a whole part of the image's, as of most CT."""
    if values.dtype == np.bool_:
        values = values.view(np.uint8)
    # Sums of a column that fit the type are added up in it, several at once; a product adds up columns twice as fast as
    # slices do.
    fits = (
        bits is not None
        and values.dtype.kind in "iu"
        and bits + (height - 1).bit_length() <= 8 * values.itemsize
    )
    kind = values.dtype.newbyteorder("=") if fits else np.dtype(np.float32)
    rows = [values[row::height] for row in range(height)]
    total: NDArray = np.add(rows[0], rows[1], dtype=kind) if height > 1 else rows[0].astype(kind)
    for row in rows[2:]:
        total += row
    weights = np.full(width, 1 / (height * width), np.float32)
    return total.astype(np.float32, copy=False).reshape(len(total), -1, width) @ weights


def _without(means: NDArray[np.float32], padded: NDArray[np.float32]) -> NDArray[np.float32]:
    """Means in which padding counted as 0, without it; `padded` is its part in each."""
    present = 1 - padded
    means /= np.maximum(present, np.float32(0.5))
    np.copyto(means, np.nan, where=present <= 0.5)
    return means


def _across(values: NDArray[np.float32], columns: int, fewer: int, channels: int) -> NDArray[np.float32]:
    """Means along rows: (rows, columns * channels) to (rows, fewer * channels)."""
    if columns == fewer:
        return values
    result = np.empty((len(values), fewer * channels), np.float32)
    for first, last, top, bottom, weights in _column_bands(columns, fewer, channels):
        np.matmul(values[:, first:last], weights, out=result[:, top:bottom])
    return result


_Band = tuple[int, int, int, int, NDArray[np.float32]]
"""(first, last, top, bottom, weights): cells first … last - 1 count towards means top … bottom - 1."""


@lru_cache(maxsize=16)
def _row_bands(rows: int, fewer: int, values_per_row: int) -> list[_Band]:
    bands = []
    for first, last in row_blocks(rows, values_per_row):
        top, bottom = first * fewer // rows, -(-last * fewer // rows)
        bands.append(
            (first, last, top, bottom, _weights(rows, fewer, slice(first, last), slice(top, bottom)))
        )
    return bands


@lru_cache(maxsize=16)
def _column_bands(columns: int, fewer: int, channels: int) -> list[_Band]:
    # Products of small dense bands: no transposed copies, and few zeros.
    bands = []
    for top in range(0, fewer, _BAND):
        means = slice(top, min(top + _BAND, fewer))
        cells = slice(top * columns // fewer, -(-means.stop * columns // fewer))
        weights = _weights(columns, fewer, cells, means).T
        spread = np.ascontiguousarray(np.kron(weights, np.eye(channels, dtype=np.float32)))
        ends = (cells.start * channels, cells.stop * channels, means.start * channels, means.stop * channels)
        bands.append((*ends, spread))
    return bands


def _weights(count: int, fewer: int, cells: slice, means: slice) -> NDArray[np.float32]:
    """(means, cells): how much of each of `fewer` equal shares of `count` cells each cell is."""
    share = count / fewer
    left = np.arange(cells.start, cells.stop)
    low = np.arange(means.start, means.stop)[:, None] * share
    common = np.minimum(left + 1, low + share) - np.maximum(left, low)
    return np.ascontiguousarray(np.maximum(common, 0) / share, np.float32)
