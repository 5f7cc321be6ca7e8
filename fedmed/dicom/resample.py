"""Images to square pixels and to at most a given size, antialiased."""

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fedmed.dicom.reasons import Quarantined, Reason

MAX_ASPECT = 16.0
"""A pixel's height over its width, or the reverse, beyond which the spacing is not believed."""
_SQUARE = 0.01


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


def resample(values: NDArray[np.float32], shape: tuple[int, int]) -> NDArray[np.float32]:
    """(rows, columns) float32 to `shape`: averages of areas, so that noise and edges do not alias.

    NaN is padding: it takes no part in an average, and a result of which more than half is padding is NaN.
    """
    if values.shape == shape:
        return values
    padding = np.isnan(values)
    if not padding.any():
        return _shrink(values, shape)
    weight = _shrink((~padding).astype(np.float32), shape)
    total = _shrink(np.where(padding, np.float32(0), values), shape)
    return np.where(weight > 0.5, total / np.maximum(weight, 0.5), np.float32(np.nan))


def resample_colour(values: NDArray, shape: tuple[int, int]) -> NDArray:
    """(rows, columns, 3) uint8 or uint16 to `shape`, of the same type."""
    if values.shape[:2] == shape:
        return values
    if values.dtype == np.uint8:
        image = Image.fromarray(np.ascontiguousarray(values))
        return np.asarray(image.resize(shape[::-1], Image.Resampling.BILINEAR, reducing_gap=1.0))
    channels = [_shrink(values[..., channel].astype(np.float32), shape) for channel in range(3)]
    return np.rint(np.stack(channels, axis=-1)).clip(0, 65535).astype(values.dtype)


def _shrink(values: NDArray[np.float32], shape: tuple[int, int]) -> NDArray[np.float32]:
    rows, columns = values.shape
    down, across = rows // shape[0], columns // shape[1]
    # Whole factors by sums, four times as fast as Pillow's filter; what is left, less than 2, by the filter.
    if down > 1 and rows % down == 0:
        values = _sum(values.reshape(rows // down, down, columns).transpose(1, 0, 2), down)
    if across > 1 and columns % across == 0:
        values = _sum(values.reshape(len(values), columns // across, across).transpose(2, 0, 1), across)
    if values.shape == shape:
        return values
    image = Image.fromarray(np.ascontiguousarray(values))
    return np.asarray(image.resize(shape[::-1], Image.Resampling.BILINEAR, reducing_gap=1.0))


def _sum(parts: NDArray[np.float32], count: int) -> NDArray[np.float32]:
    total = parts[0] + parts[1]
    for part in parts[2:]:
        total += part
    total *= np.float32(1 / count)
    return total
