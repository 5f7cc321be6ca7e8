"""One stored frame to grey or colour values at the size asked for, a few rows at a time."""

import numpy as np
from numpy.typing import NDArray

from fedmed.dicom.image.decode import stored_bits
from fedmed.dicom.image.layout import PixelLayout
from fedmed.dicom.image.modality import Padding, Rescale
from fedmed.dicom.image.resample import resample, row_blocks
from fedmed.dicom.image.window import Window, to_display

_WORTH_A_TABLE = 1 << 18
"""Pixels of a frame from which a table of all 65,536 words costs less than computing each pixel."""


def grey_frame(
    stored: NDArray,
    layout: PixelLayout,
    rescale: Rescale,
    padding: Padding,
    *,
    window: Window | None,
    out: NDArray,
) -> None:
    """Write one grey frame at `out`'s shape: modality values with NaN for padding, or display values with a window.

    `stored`: (rows, columns); `out`: (fewer rows, fewer columns), uint16 with a window and float32 without.
    """
    rows, columns = stored.shape
    inverted = layout.photometric == "MONOCHROME1"

    def read(first: int, last: int) -> tuple[NDArray, NDArray[np.bool_] | None]:
        values = stored_bits(stored[first:last], layout)
        mask = padding.mask(values)
        values = rescale.before_mean(values)
        if mask is None:
            return values, None
        # Padding of floats may be infinite. `values` may be the file's own bytes.
        values = values.astype(values.dtype.newbyteorder("="))
        np.copyto(values, 0, where=mask)
        return values, mask

    def finish(values: NDArray[np.float32], at: slice) -> None:
        rescale.after_mean(values)
        if window is None:
            out[at] = values
        else:
            to_display(values, window, inverted=inverted, out=out[at])

    if out.shape != stored.shape:
        # What a decoder yields may hold more than the bits that the file states.
        bits = layout.bits_stored if layout.native else None
        finish(resample(read, rows, columns, (out.shape[0], out.shape[1]), bits=bits), slice(None))
        return
    if (
        window is not None
        and stored.size >= _WORTH_A_TABLE
        and stored.dtype.kind in "iu"
        and stored.itemsize <= 2
    ):
        words = np.arange(1 << (8 * stored.itemsize), dtype=f"u{stored.itemsize}")
        table = _display(words.view(stored.dtype.newbyteorder("=")), layout, rescale, padding, window)
        for first, last in row_blocks(rows, columns):
            np.take(table, _unsigned(stored[first:last]), out=out[first:last], mode="clip")
        return
    for first, last in row_blocks(rows, columns):
        read_values, mask = read(first, last)
        values = read_values.astype(np.float32)
        if mask is not None:
            np.copyto(values, np.nan, where=mask)
        finish(values, slice(first, last))


def _display(
    stored: NDArray, layout: PixelLayout, rescale: Rescale, padding: Padding, window: Window
) -> NDArray[np.uint16]:
    """Display values of `stored` ones, of its shape, each by itself."""
    stored = stored_bits(stored, layout)
    values = rescale.before_mean(stored).astype(np.float32)
    mask = padding.mask(stored)
    if mask is not None:
        np.copyto(values, np.nan, where=mask)
    rescale.after_mean(values)
    return to_display(values, window, inverted=layout.photometric == "MONOCHROME1")


def colour_frame(
    stored: NDArray,
    layout: PixelLayout,
    palette: NDArray[np.float32] | None,
    *,
    out: NDArray[np.uint16],
) -> None:
    """Write one colour frame at `out`'s shape, (fewer rows, fewer columns, 3), black 0 to white 65535.

    `stored`: (rows, columns, 3), or (rows, columns) with a palette from `read_palette`.
    """
    rows, columns = stored.shape[:2]
    factor = 65535 / ((1 << layout.bits_stored) - 1)

    def read(first: int, last: int) -> tuple[NDArray[np.float32], None]:
        values = stored[first:last]
        if palette is not None:
            index = _unsigned(stored_bits(values, layout))
            return np.take(palette, index, axis=0).reshape(last - first, -1), None
        return np.multiply(values, np.float32(factor), dtype=np.float32).reshape(last - first, -1), None

    if out.shape[:2] != (rows, columns):
        means = resample(read, rows, columns, (out.shape[0], out.shape[1]), channels=3)
        out[:] = np.clip(means + 0.5, 0, 65535)
    elif palette is None and stored.dtype == np.uint8 and layout.bits_stored == 8:
        np.multiply(stored, 257, out=out, dtype=np.uint16)
    else:
        for first, last in row_blocks(rows, columns * 3):
            out[first:last] = np.clip(read(first, last)[0] + 0.5, 0, 65535).reshape(last - first, columns, 3)


def _unsigned(values: NDArray) -> NDArray:
    """Stored values as places in a table that starts at 0 and wraps to the negative ones."""
    values = np.ascontiguousarray(values, values.dtype.newbyteorder("="))
    return values if values.dtype.kind == "u" else values.view(f"u{values.itemsize}")
