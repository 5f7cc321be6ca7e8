"""One file's pixels as frames ready to show or to train on: the grey-scale and colour pipelines of PS3.4 N.2."""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset

from fedmed.dicom.image.decode import stored_frames
from fedmed.dicom.image.elements import Elements
from fedmed.dicom.image.layout import PixelLayout, read_layout
from fedmed.dicom.image.lookup import read_palette
from fedmed.dicom.image.modality import frame_rescales, frame_windows, read_padding
from fedmed.dicom.image.planes import colour_frame, grey_frame
from fedmed.dicom.image.resample import target_shape
from fedmed.dicom.image.spacing import PixelSpacing, read_spacing
from fedmed.dicom.image.window import Window, to_display
from fedmed.dicom.reasons import Quarantined, Reason

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
    return _grey(dataset, elements, layout, spacing, shape, windows, modality_values=modality_values)


def _check_result(layout: PixelLayout, shape: tuple[int, int], *, bytes_per_value: int) -> None:
    if layout.frames * shape[0] * shape[1] * bytes_per_value > MAX_RESULT_BYTES:
        raise Quarantined(Reason.TOO_LARGE)


def _grey(
    dataset: Dataset,
    elements: Elements,
    layout: PixelLayout,
    spacing: PixelSpacing,
    shape: tuple[int, int],
    windows: list[Window | None],
    *,
    modality_values: bool,
) -> Frames:
    keep = modality_values or None in windows
    values = np.empty((layout.frames, *shape), np.float32 if keep else np.uint16)
    rescales, padding = frame_rescales(elements, layout), read_padding(elements, layout)
    frames = stored_frames(dataset, elements, layout)
    for stored, rescale, one, out in zip(frames, rescales, windows, values, strict=True):
        grey_frame(stored, layout, rescale, padding, window=None if keep else one, out=out)
    whole = _range(values) if None in windows else None
    used = [one or whole for one in windows]
    if modality_values or not keep:
        return _frames(
            values, layout, spacing, kind="modality" if modality_values else "display", window=used[0]
        )
    grey = np.empty(values.shape, np.uint16)
    for one, frame, out in zip(used, values, grey, strict=True):
        assert one is not None
        to_display(frame, one, inverted=layout.photometric == "MONOCHROME1", out=out)
    return _frames(grey, layout, spacing, kind="display", window=used[0])


def _range(values: NDArray[np.float32]) -> Window:
    """The window of an image without one: over all frames, so that a clip does not flicker."""
    low, high = float(np.fmin.reduce(values, axis=None)), float(np.fmax.reduce(values, axis=None))
    return (
        Window.of_range(low, high)
        if math.isfinite(low) and math.isfinite(high)
        else Window.of_range(0.0, 0.0)
    )


def _colour_frames(
    dataset: Dataset, elements: Elements, layout: PixelLayout, shape: tuple[int, int]
) -> NDArray[np.uint16]:
    values = np.empty((layout.frames, *shape, 3), np.uint16)
    palette = read_palette(dataset, elements, layout) if layout.samples == 1 else None
    for stored, out in zip(stored_frames(dataset, elements, layout), values, strict=True):
        colour_frame(stored, layout, palette, out=out)
    return values


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
