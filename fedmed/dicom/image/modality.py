"""From stored to modality values: rescaling, modality tables, padding (PS3.3 C.11.1, C.7.5.1.1.2)."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedmed.dicom.image.elements import Elements
from fedmed.dicom.image.groups import frame_items
from fedmed.dicom.image.layout import DOUBLE_PIXEL_DATA, FLOAT_PIXEL_DATA, PixelLayout
from fedmed.dicom.image.lookup import LookupTable, read_table
from fedmed.dicom.image.window import Window, read_window
from fedmed.dicom.reasons import Quarantined, Reason

_INTERCEPT, _SLOPE, _TABLES = 0x00281052, 0x00281053, 0x00283000
_TRANSFORMATION, _FRAME_WINDOW = 0x00289145, 0x00289132
_PADDING = {FLOAT_PIXEL_DATA: (0x00280122, 0x00280124), DOUBLE_PIXEL_DATA: (0x00280123, 0x00280125)}


@dataclass(frozen=True, kw_only=True)
class Rescale:
    """Stored values to modality values: a table, or slope and intercept."""

    slope: float = 1.0
    intercept: float = 0.0
    table: LookupTable | None = None

    def before_mean(self, stored: NDArray) -> NDArray:
        """`stored` values through the table, as float32: what must come before averaging. Without one, as they are."""
        if self.table is None:
            return stored
        return self.table.apply(stored, self.table.values.astype(np.float32))

    def after_mean(self, values: NDArray[np.float32]) -> None:
        """Slope and intercept, in place: these commute with averaging."""
        if self.slope != 1.0:
            values *= np.float32(self.slope)
        if self.intercept != 0.0:
            values += np.float32(self.intercept)


@dataclass(frozen=True, kw_only=True)
class Padding:
    """Stored values that mark places outside the picture, from `low` to `high`; both None where there are none."""

    low: float | None
    high: float | None

    def mask(self, stored: NDArray) -> NDArray[np.bool_] | None:
        """Where `stored` is padding, of its shape; None where it is nowhere."""
        if self.low is None or self.high is None:
            mask = None if stored.dtype.kind != "f" else ~np.isfinite(stored)
        else:
            mask = (
                stored == self.low if self.low == self.high else (stored >= self.low) & (stored <= self.high)
            )
            if stored.dtype.kind == "f":
                mask |= ~np.isfinite(stored)
        return mask if mask is not None and mask.any() else None


def frame_rescales(elements: Elements, layout: PixelLayout) -> list[Rescale]:
    """One for each frame: of its functional groups where there are some, else of the file."""
    items = frame_items(elements, _TRANSFORMATION)
    if not any(items):
        return [_rescale(elements, layout)] * layout.frames
    return [_rescale(item or elements, layout) for item in _for_each_frame(items, layout)]


def frame_windows(elements: Elements, layout: PixelLayout) -> list[Window | None]:
    """One for each frame, None where the file states none: of its functional groups, else of the file."""
    items = frame_items(elements, _FRAME_WINDOW)
    # A table starts at a modality value, which is negative where stored values are, or Hounsfield units.
    signed = layout.signed or any(intercept < 0 for intercept in elements.numbers(_INTERCEPT))
    if not any(items):
        return [read_window(elements, layout, signed=signed)] * layout.frames
    return [read_window(item or elements, layout, signed=signed) for item in _for_each_frame(items, layout)]


def _for_each_frame(items: list[Elements | None], layout: PixelLayout) -> list[Elements | None]:
    if len(items) == 1:
        return items * layout.frames
    if len(items) != layout.frames:
        raise Quarantined(Reason.MALFORMED_VALUE)
    return items


def _rescale(elements: Elements, layout: PixelLayout) -> Rescale:
    item = elements.item(_TABLES)
    if item is not None:
        if layout.tag in _PADDING:
            raise Quarantined(Reason.LOOKUP_TABLE)
        return Rescale(table=read_table(item, layout, signed=layout.signed))
    slope, intercept = elements.numbers(_SLOPE), elements.numbers(_INTERCEPT)
    if not slope and not intercept:
        return Rescale()
    usable = len(slope) == len(intercept) == 1 and 0 < abs(slope[0]) < 1e30 and abs(intercept[0]) < 1e30
    if not usable:
        raise Quarantined(Reason.RESCALE)
    return Rescale(slope=slope[0], intercept=intercept[0])


def read_padding(elements: Elements, layout: PixelLayout) -> Padding:
    """Pixel Padding Value and, where there is one, Range Limit; they bound a range in either order."""
    value_tag, limit_tag = _PADDING.get(layout.tag, (0x00280120, 0x00280121))
    value, limit = elements.number(value_tag), elements.number(limit_tag)
    if value is None:
        return Padding(low=None, high=None)
    ends = (value, value if limit is None else limit)
    if layout.tag not in _PADDING:
        ends = (_stored(ends[0], layout), _stored(ends[1], layout))
    return Padding(low=min(ends), high=max(ends))


def _stored(value: float, layout: PixelLayout) -> float:
    """A padding value with the sign of the pixels: files state -2000 as 63536 and the reverse."""
    word = int(value) & ((1 << layout.bits_allocated) - 1)
    return (
        word - (1 << layout.bits_allocated) if layout.signed and word >> (layout.bits_allocated - 1) else word
    )
