"""One file's pixels as frames ready to show or to train on: the grey-scale and colour pipelines of PS3.4 N.2."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset

from fedmed.dicom.decode import stored_frames
from fedmed.dicom.elements import Elements
from fedmed.dicom.layout import PixelLayout, read_layout
from fedmed.dicom.lookup import read_palette
from fedmed.dicom.modality import Rescale, frame_rescales, frame_windows, read_padding
from fedmed.dicom.reasons import Quarantined, Reason
from fedmed.dicom.resample import resample, resample_colour, target_shape
from fedmed.dicom.spacing import PixelSpacing, read_spacing
from fedmed.dicom.window import Window, to_display

__all__ = ["Frames", "Window", "read_frames", "to_display"]

MAX_RESULT_BYTES = 1 << 28
"""Bytes of a file's frames after resampling, working copies included."""


@dataclass(frozen=True, kw_only=True)
class Frames:
    """A file's frames after resampling.

    `values`: (frames, rows, columns), or (frames, rows, columns, 3) for colour.
    - `kind="display"`: uint16, 0 black to 65535 white, window applied, MONOCHROME1 inverted, padding 0.
    - `kind="modality"`: float32, rescaled (e.g. Hounsfield units), window not applied, padding NaN.
    `window`: of the first frame, applied or to apply with `to_display(values, window, inverted=inverted)`; None for
    colour. `row_spacing`, `column_spacing`: mm between the centres of rows and of columns after resampling, None
    where the file states none. `spacing_source`: which element they are from.
    """

    values: NDArray
    kind: Literal["display", "modality"]
    window: Window | None
    inverted: bool
    row_spacing: float | None
    column_spacing: float | None
    spacing_source: Literal["pixel", "imager", "nominal-scanned", "none"]

    @property
    def colour(self) -> bool:
        """Whether the values have three channels, red, green and blue."""
        return self.values.ndim == 4


def read_frames(
    dataset: Dataset, *, size: int, modality_values: bool, window: Window | None = None
) -> Frames:
    """Every frame of a file, decoded, rescaled, with square pixels, the longest side at most `size` pixels (0: any).

    `modality_values`: leave the window to the caller (grey images only; colour is always `display`). `window`: apply
    this one instead of the file's. Never enlarges. Grey values are resampled before the window and after a modality
    table, so `display` values equal `to_display` of the `modality` values. Raises `Quarantined` only; nothing is
    decoded unless every element that decides the result is understood.
    """
    elements = Elements(dataset)
    layout = read_layout(dataset, elements)
    spacing = read_spacing(elements)
    shape = target_shape(layout.rows, layout.columns, aspect=spacing.aspect, size=size)
    if layout.samples == 3 or layout.photometric == "PALETTE COLOR":
        _check_result(layout, shape, bytes_per_value=6)
        values = _colour_frames(dataset, elements, layout, shape)
        return _frames(values, layout, spacing, kind="display", window=None)
    # A stored value outside the file's range of colours is grey; one inside is a palette's (PS3.3 C.8.16.2.1.1.1).
    if elements.text(0x00089205) in ("COLOR", "MIXED"):
        raise Quarantined(Reason.PHOTOMETRIC_INTERPRETATION)
    windows: list[Window | None] = [window] * layout.frames if window else frame_windows(elements, layout)
    no_window = any(one is None for one in windows)
    _check_result(layout, shape, bytes_per_value=6 if no_window else 4 if modality_values else 2)
    frames = _modality_frames(dataset, elements, layout, shape)
    return _grey(frames, layout, spacing, shape, windows, modality_values=modality_values)


def _check_result(layout: PixelLayout, shape: tuple[int, int], *, bytes_per_value: int) -> None:
    if layout.frames * shape[0] * shape[1] * bytes_per_value > MAX_RESULT_BYTES:
        raise Quarantined(Reason.TOO_LARGE)


def _grey(
    frames: Iterator[NDArray[np.float32]],
    layout: PixelLayout,
    spacing: PixelSpacing,
    shape: tuple[int, int],
    windows: list[Window | None],
    *,
    modality_values: bool,
) -> Frames:
    inverted = layout.photometric == "MONOCHROME1"
    keep = modality_values or None in windows
    values = np.empty((layout.frames, *shape), np.float32 if keep else np.uint16)
    for index, frame in enumerate(frames):
        one = windows[index]
        values[index] = frame if keep or one is None else to_display(frame, one, inverted=inverted)
    if None in windows:
        whole = _range(values)
        windows = [one or whole for one in windows]
    if modality_values:
        return _frames(values, layout, spacing, kind="modality", window=windows[0])
    if keep:
        grey = np.empty(values.shape, np.uint16)
        for index, one in enumerate(windows):
            assert one is not None
            grey[index] = to_display(values[index], one, inverted=inverted)
        values = grey
    return _frames(values, layout, spacing, kind="display", window=windows[0])


def _range(values: NDArray[np.float32]) -> Window:
    """The window of an image without one: over all frames, so that a clip does not flicker."""
    low, high = float(np.fmin.reduce(values, axis=None)), float(np.fmax.reduce(values, axis=None))
    return (
        Window.of_range(low, high)
        if math.isfinite(low) and math.isfinite(high)
        else Window.of_range(0.0, 0.0)
    )


def _modality_frames(
    dataset: Dataset, elements: Elements, layout: PixelLayout, shape: tuple[int, int]
) -> Iterator[NDArray[np.float32]]:
    rescales: list[Rescale] = frame_rescales(elements, layout)
    padding = read_padding(elements, layout)
    for stored, rescale in zip(stored_frames(dataset, elements, layout), rescales, strict=True):
        values = rescale.table_values(stored)
        mask = padding.mask(stored)
        if mask is not None:
            values[mask] = np.nan
        yield rescale.linear(resample(values, shape))


def _colour_frames(
    dataset: Dataset, elements: Elements, layout: PixelLayout, shape: tuple[int, int]
) -> NDArray[np.uint16]:
    result = np.empty((layout.frames, *shape, 3), np.uint16)
    palette = read_palette(dataset, elements, layout) if layout.samples == 1 else None
    for index, stored in enumerate(stored_frames(dataset, elements, layout)):
        if palette is not None:
            result[index] = resample_colour(palette[0].apply(stored, palette[1]), shape)
        elif layout.bits_stored == 8 and stored.dtype == np.uint8:
            np.multiply(resample_colour(stored, shape), 257, out=result[index], dtype=np.uint16)
        else:
            white = (1 << layout.bits_stored) - 1
            wide = np.rint(stored.clip(0, white) * (65535 / white)).astype(np.uint16)
            result[index] = resample_colour(wide, shape)
    return result


def _frames(
    values: NDArray,
    layout: PixelLayout,
    spacing: PixelSpacing,
    *,
    kind: Literal["display", "modality"],
    window: Window | None,
) -> Frames:
    rows, columns = values.shape[1:3]
    return Frames(
        values=values,
        kind=kind,
        window=window,
        inverted=layout.photometric == "MONOCHROME1",
        row_spacing=None if spacing.rows is None else spacing.rows * layout.rows / rows,
        column_spacing=None if spacing.columns is None else spacing.columns * layout.columns / columns,
        spacing_source=spacing.source,
    )
