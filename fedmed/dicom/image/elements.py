"""Element values straight from a dataset's bytes.

pydicom converts an element when it is first looked at (40 us each here, with warnings that quote the value). Pixels
need some twenty small elements, so they are parsed here: faster, silent, and strict.
"""

import math
import struct
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydicom.dataelem import RawDataElement
from pydicom.dataset import Dataset

from fedmed.dicom.reasons import Quarantined, Reason

# PS3.6: only for implicit VR and UN, where the file does not say. Tags not listed are text of numbers (DS, IS).
_BINARY = {"US": "H", "SS": "h", "UL": "I", "SL": "i", "FL": "f", "FD": "d", "OW": "H"}
_UNSIGNED = {
    0x00280002, 0x00280006, 0x00280010, 0x00280011, 0x00280100, 0x00280101, 0x00280102, 0x00280103,
    0x00280120, 0x00280121, 0x00281101, 0x00281102, 0x00281103, 0x00283002, 0x00283006,
}  # fmt: skip
_FLOATS = {
    0x00189087: "FD",
    0x00189306: "FD",
    0x00280122: "FL",
    0x00280124: "FL",
    0x00280123: "FD",
    0x00280125: "FD",
}


class Elements:
    """Read access to the elements of one dataset or sequence item, by tag number.

    Everything raises `Quarantined(MALFORMED_VALUE)` where a value is not of the kind asked for. Absent and empty
    are the same, as in PS3.5 section 7.4.5 (type 2).
    """

    def __init__(self, dataset: Dataset) -> None:
        self._dataset = dataset
        self._elements: dict[Any, Any] = dict(dataset.items())

    def __contains__(self, tag: int) -> bool:
        return tag in self._elements

    def numbers(self, tag: int) -> tuple[float, ...]:
        """The values as numbers; () where absent or empty. US and SS come as the file has them: see `signed16`."""
        element = self._elements.get(tag)
        if element is None:
            return ()
        try:
            if isinstance(element, RawDataElement):
                return _parse(element, tag)
            value = element.value
            if value is None or (isinstance(value, str) and not value.strip()):
                return ()
            several = not isinstance(value, str | bytes) and hasattr(value, "__iter__")
            return tuple(float(one) for one in (value if several else (value,)))
        except (ValueError, TypeError, struct.error, OverflowError):
            raise Quarantined(Reason.MALFORMED_VALUE) from None

    def number(self, tag: int) -> float | None:
        """The only value as a finite number; None where absent or empty."""
        found = self.numbers(tag)
        if not found:
            return None
        if len(found) > 1 or not math.isfinite(found[0]):
            raise Quarantined(Reason.MALFORMED_VALUE)
        return found[0]

    def integer(self, tag: int) -> int | None:
        """The only value as a whole number; None where absent or empty."""
        value = self.number(tag)
        if value is None:
            return None
        if value != int(value):
            raise Quarantined(Reason.MALFORMED_VALUE)
        return int(value)

    def text(self, tag: int) -> str:
        """The value as upper-case text without padding; "" where absent or empty."""
        element = self._elements.get(tag)
        value = None if element is None else element.value
        if isinstance(value, bytes):
            value = value.decode("ascii", errors="replace")
        return "" if value is None else str(value).strip(" \0").upper()

    def items(self, tag: int) -> Iterator["Elements"]:
        """The items of a sequence; none where absent."""
        if tag not in self._elements:
            return
        try:
            sequence = list(self._dataset[tag].value or ())
        except Exception:
            # pydicom parses sequences late and raises many types on damaged ones.
            raise Quarantined(Reason.MALFORMED_VALUE) from None
        for item in sequence:
            if not isinstance(item, Dataset):
                raise Quarantined(Reason.MALFORMED_VALUE)
            yield Elements(item)

    def item(self, tag: int) -> "Elements | None":
        """The first item of a sequence; None where absent or empty."""
        return next(self.items(tag), None)

    def words(self, tag: int, *, little_endian: bool) -> bytes | NDArray[np.uint16]:
        """The data of a lookup table: bytes as the file has them, or 16-bit words where a program made the dataset."""
        element = self._elements.get(tag)
        if element is None:
            return b""
        value = element.value
        if isinstance(value, bytes):
            big = not getattr(element, "is_little_endian", little_endian)
            whole = value[: len(value) // 2 * 2]
            return np.frombuffer(whole, "<u2").byteswap().tobytes() if big else value
        try:
            return np.asarray(value, np.uint16).reshape(-1)
        except (ValueError, TypeError, OverflowError):
            raise Quarantined(Reason.MALFORMED_VALUE) from None

    def vr(self, tag: int) -> str:
        """The value representation that the file states; "" where it states none."""
        element = self._elements.get(tag)
        return str(getattr(element, "VR", None) or "")

    def buffer(self, tag: int) -> bytes:
        """A bulk value, e.g. pixel data, without conversion."""
        element = self._elements[tag]
        value = element.value
        if value is None and isinstance(element, RawDataElement) and element.length:
            # Left on disk by `dcmread(defer_size=…)`.
            value = self._dataset[tag].value
        if not isinstance(value, bytes | bytearray):
            raise Quarantined(Reason.MALFORMED_VALUE)
        return bytes(value)


def _parse(element: RawDataElement, tag: int) -> tuple[float, ...]:
    value = element.value
    if not value:
        return ()
    vr = element.VR or "UN"
    if vr == "UN":
        vr = "US" if tag in _UNSIGNED else _FLOATS.get(tag, "DS")
    if code := _BINARY.get(vr):
        order = "<" if element.is_little_endian else ">"
        return struct.unpack(f"{order}{len(value) // struct.calcsize(code)}{code}", value)
    text = value.decode("ascii").strip(" \0")
    # An empty component is not a number: float("") raises, which is what is wanted. So are Python's own "1_0".
    if "_" in text:
        raise ValueError
    return tuple(float(part) for part in text.split("\\")) if text else ()


def signed16(value: float, *, signed: bool) -> int:
    """A 16-bit word read as two's complement or not, whichever way the file stored it (US or SS, PS3.5 table 6.2-1).

    >>> signed16(63536, signed=True), signed16(-2000, signed=False)
    (-2000, 63536)
    """
    word = int(value) & 0xFFFF
    return word - 0x10000 if signed and word >= 0x8000 else word
