"""Functional groups of enhanced multi-frame files (PS3.3 C.7.6.16)."""

from fedmed.dicom.image.elements import Elements

_SHARED, _PER_FRAME = 0x52009229, 0x52009230


def frame_items(elements: Elements, tag: int) -> list[Elements | None]:
    """The item of functional group `tag` for each frame, its own before the shared one; None where it has neither.

    Empty where the file has no functional groups; one item where only shared groups exist.
    """
    if _SHARED not in elements and _PER_FRAME not in elements:
        return []
    common = elements.item(_SHARED)
    shared = None if common is None else common.item(tag)
    own = [frame.item(tag) for frame in elements.items(_PER_FRAME)]
    return [item if item is not None else shared for item in own] or [shared]
