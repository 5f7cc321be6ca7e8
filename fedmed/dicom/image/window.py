"""From modality values to a grey from black to white: the VOI LUT module (PS3.3 C.11.2)."""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from fedmed.dicom.image.elements import Elements
from fedmed.dicom.image.layout import PixelLayout
from fedmed.dicom.image.lookup import LookupTable, read_table, scaled
from fedmed.dicom.reasons import Quarantined, Reason

_CENTER, _WIDTH, _FUNCTION, _TABLES = 0x00281050, 0x00281051, 0x00281056, 0x00283010
_BLOCK = 1 << 14


@dataclass(frozen=True, kw_only=True)
class Window:
    """What turns modality values into grey. `center` and `width` in modality units, e.g. Hounsfield units.

    `function`: `linear`, `linear_exact` or `sigmoid` (PS3.3 C.11.2.1.2, C.11.2.1.3), `table` (C.11.2.1.1), or
    `range`: the file has no window, and the smallest to the largest value, padding aside, is black to white.
    """

    function: Literal["linear", "linear_exact", "sigmoid", "table", "range"]
    center: float = 0.0
    width: float = 0.0
    table: LookupTable | None = None

    def __post_init__(self) -> None:
        least = {"linear": 1.0, "table": -math.inf, "range": 0.0}.get(self.function, math.ulp(0.0))
        finite = math.isfinite(self.center) and math.isfinite(self.width)
        if not finite or self.width < least or (self.function == "table") != (self.table is not None):
            raise Quarantined(Reason.WINDOW)

    @classmethod
    def of_range(cls, low: float, high: float) -> "Window":
        """The window of an image without one, whose values run from `low` to `high`."""
        return cls(function="range", center=low + (high - low) / 2, width=high - low)


def read_window(elements: Elements, layout: PixelLayout, *, signed: bool) -> Window | None:
    """The first VOI LUT, else the first window, of a VOI LUT module or Frame VOI LUT item; None where there is none.

    A table goes before a window, as in pydicom: the standard lets the viewer choose. `Quarantined(WINDOW)` where one
    is there and cannot be applied.
    """
    item = elements.item(_TABLES)
    if item is not None:
        return Window(function="table", table=read_table(item, layout, signed=signed))
    centers, widths = elements.numbers(_CENTER), elements.numbers(_WIDTH)
    if not centers and not widths:
        return None
    if not centers or not widths:
        raise Quarantined(Reason.WINDOW)
    name = elements.text(_FUNCTION) or "LINEAR"
    if name not in ("LINEAR", "LINEAR_EXACT", "SIGMOID"):
        raise Quarantined(Reason.WINDOW)
    function: Literal["linear", "linear_exact", "sigmoid"] = name.lower()  # type: ignore[assignment]
    return Window(function=function, center=centers[0], width=widths[0])


def to_display(
    values: NDArray[np.float32], window: Window, *, inverted: bool, out: NDArray[np.uint16] | None = None
) -> NDArray[np.uint16]:
    """Grey values from 0, black, to 65535, white; of `values`' shape.

    `values`: modality values of any shape; NaN is padding and becomes black. `inverted`: MONOCHROME1, lowest is white.
    `out`: where to write, contiguous, instead of a new array. A result depends on its own value and the window alone.
    """
    source = np.ascontiguousarray(values, np.float32).reshape(-1)
    grey = np.empty(values.shape, np.uint16) if out is None else out
    flat = grey.reshape(-1)
    scratch = np.empty(min(_BLOCK, source.size), np.float32)
    shade = _SHADES[window.function]
    # Blocks that fit the processor's cache: twice as fast as whole images.
    for start in range(0, source.size, _BLOCK):
        block = source[start : start + _BLOCK]
        shaded = scratch[: block.size]
        shade(block, window, shaded)
        if inverted:
            np.subtract(65535, shaded, out=shaded)
        shaded += 0.5
        # Unlike maximum, fmax takes the number where the other is NaN.
        np.fmax(shaded, 0, out=shaded)
        np.minimum(shaded, 65535, out=shaded)
        flat[start : start + _BLOCK] = shaded
    return grey


def _ramp(block: NDArray, out: NDArray, *, middle: float, width: float) -> None:
    """(x - middle) / width + 0.5 of white; a step at `middle` where the width is 0."""
    # Subtracting first: one factor and one offset would cancel badly in float32 far from 0.
    np.subtract(block, np.float32(middle), out=out)
    factor = 65535 / width if width > 0 else math.inf
    if factor > np.finfo(np.float32).max:
        # PS3.3 C.11.2.1.2.1: at a width of 1, `<=` the centre is black and above it white.
        np.copyto(out, np.where(np.isnan(out), np.nan, np.where(out > 0, 65535, 0)))
        return
    out *= np.float32(factor)
    out += np.float32(65535 / 2)


def _linear(block: NDArray, window: Window, out: NDArray) -> None:
    _ramp(block, out, middle=window.center - 0.5, width=window.width - 1)


def _linear_exact(block: NDArray, window: Window, out: NDArray) -> None:
    _ramp(block, out, middle=window.center, width=window.width)


def _sigmoid(block: NDArray, window: Window, out: NDArray) -> None:
    np.subtract(block, np.float32(window.center), out=out)
    with np.errstate(over="ignore"):
        np.multiply(out, -4 / window.width, out=out)
        np.exp(out, out=out)
    out += 1
    np.divide(65535, out, out=out)


def _table(block: NDArray, window: Window, out: NDArray) -> None:
    assert window.table is not None
    padding = np.isnan(block)
    out[:] = window.table.apply(np.where(padding, 0, block), scaled(window.table))
    out[padding] = np.nan


_SHADES = {
    "linear": _linear,
    "linear_exact": _linear_exact,
    "sigmoid": _sigmoid,
    "table": _table,
    "range": _linear_exact,
}
