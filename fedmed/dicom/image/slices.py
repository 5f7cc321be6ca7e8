"""Where the slices of a file lie: plain and enhanced files to `geometry.Slice`."""

import math

from pydicom.dataset import Dataset

from fedmed.dicom.image.elements import Elements
from fedmed.dicom.image.geometry import Slice
from fedmed.dicom.image.groups import frame_items
from fedmed.dicom.reasons import Quarantined

_ROWS, _COLUMNS, _FRAMES = 0x00280010, 0x00280011, 0x00280008
_POSITION, _ORIENTATION, _SPACING = 0x00200032, 0x00200037, 0x00280030
_POSITIONS, _ORIENTATIONS, _MEASURES = 0x00209113, 0x00209116, 0x00289110

# Acquisition number, echo time, temporal position, b-value, trigger time: element, and functional group with element.
_ACQUISITION = (
    (0x00200012, (0x00209111, 0x00209156)),
    (0x00180081, (0x00189114, 0x00189082)),
    (0x00200100, (0x00209111, 0x00209128)),
    (0x00189087, (0x00189117, 0x00189087)),
    (0x00181060, (0x00189118, 0x00209153)),
)


def dicom_slices(dataset: Dataset, *, first_index: int = 0) -> tuple[Slice, ...]:
    """The slices of a file, one a frame, numbered from `first_index`; it need not have pixels.

    `acquisition` is (acquisition number, echo time in ms, temporal position, b-value in s/mm², trigger time in ms).
    A position, orientation or spacing that is absent or damaged is None. Plain multi-frame files state one position
    for all frames, which places none of them: theirs is None.
    """
    elements = Elements(dataset)
    rows, columns = _value(elements, _ROWS), _value(elements, _COLUMNS)
    frames = _count(elements)
    groups = {
        tag: frame_items(elements, tag)
        for tag in (_POSITIONS, _ORIENTATIONS, _MEASURES, *{group for _, (group, _) in _ACQUISITION})
    }
    slices = []
    for frame in range(frames):
        own = {tag: (items[min(frame, len(items) - 1)] if items else None) for tag, items in groups.items()}
        position = _numbers(own[_POSITIONS], _POSITION, 3) or (
            _numbers(elements, _POSITION, 3) if frames == 1 else None
        )
        spacing = _numbers(own[_MEASURES], _SPACING, 2) or _numbers(elements, _SPACING, 2)
        slices.append(
            Slice(
                index=first_index + frame,
                position=position,
                orientation=_numbers(own[_ORIENTATIONS], _ORIENTATION, 6)
                or _numbers(elements, _ORIENTATION, 6),
                rows=int(rows or 0),
                columns=int(columns or 0),
                spacing=None if spacing is None else (spacing[0], spacing[1]),
                acquisition=tuple(
                    _value(own[group], inner) if own[group] is not None else _value(elements, plain)
                    for plain, (group, inner) in _ACQUISITION
                ),
            )
        )
    return tuple(slices)


def _count(elements: Elements) -> int:
    try:
        frames = elements.integer(_FRAMES) or 1
    except Quarantined:
        return 1
    return frames if 1 <= frames <= 1 << 14 else 1


def _numbers(elements: Elements | None, tag: int, length: int) -> tuple[float, ...] | None:
    """So many finite numbers; None where they are absent, damaged or fewer."""
    if elements is None:
        return None
    try:
        values = elements.numbers(tag)
    except Quarantined:
        return None
    return values if len(values) == length and all(math.isfinite(value) for value in values) else None


def _value(elements: Elements | None, tag: int) -> float | None:
    found = _numbers(elements, tag, 1)
    return None if found is None else found[0]
