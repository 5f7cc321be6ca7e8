"""The size of a pixel (PS3.3 10.7.1.3, C.7.6.3.1.7, C.7.6.16.2.1)."""

import math
from dataclasses import dataclass
from typing import Literal

from fedmed.dicom.image.elements import Elements
from fedmed.dicom.image.groups import frame_items
from fedmed.dicom.reasons import Quarantined, Reason

_PIXEL, _IMAGER, _NOMINAL, _ASPECT = 0x00280030, 0x00181164, 0x00182010, 0x00280034
_MEASURES = 0x00289110


@dataclass(frozen=True, kw_only=True)
class PixelSpacing:
    """mm between the centres of neighbouring rows and columns, None where unknown; `aspect`: height over width."""

    rows: float | None
    columns: float | None
    aspect: float
    source: Literal["pixel", "imager", "nominal-scanned", "none"]


def read_spacing(elements: Elements) -> PixelSpacing:
    """The spacing of a file's pixels before resampling.

    Calibrated PixelSpacing goes before the detector's ImagerPixelSpacing, and both before NominalScannedPixelSpacing.
    A spacing of 0 states nothing. PixelAspectRatio counts where no spacing does.
    """
    measured = _pair(elements.numbers(_PIXEL)) or _measures(elements)
    if measured is not None:
        return _spacing(measured, "pixel")
    if (pair := _pair(elements.numbers(_IMAGER))) is not None:
        return _spacing(pair, "imager")
    if (pair := _pair(elements.numbers(_NOMINAL))) is not None:
        return _spacing(pair, "nominal-scanned")
    ratio = _pair(elements.numbers(_ASPECT))
    return PixelSpacing(
        rows=None, columns=None, aspect=1.0 if ratio is None else ratio[0] / ratio[1], source="none"
    )


def _spacing(
    pair: tuple[float, float], source: Literal["pixel", "imager", "nominal-scanned"]
) -> PixelSpacing:
    return PixelSpacing(rows=pair[0], columns=pair[1], aspect=pair[0] / pair[1], source=source)


def _measures(elements: Elements) -> tuple[float, float] | None:
    items = frame_items(elements, _MEASURES)
    pairs = {None if item is None else _pair(item.numbers(_PIXEL)) for item in items}
    if len(pairs) > 1:
        # One array holds all frames of a file: they cannot differ in scale.
        raise Quarantined(Reason.PIXEL_SPACING)
    return next(iter(pairs), None)


def _pair(values: tuple[float, ...]) -> tuple[float, float] | None:
    if not values or values == (0.0, 0.0):
        return None
    if len(values) != 2 or not all(math.isfinite(value) and value > 0 for value in values):
        raise Quarantined(Reason.PIXEL_SPACING)
    return values[0], values[1]
