"""A file to a pydicom data set. The usual kind of file is cut into elements here, five times as fast as by pydicom."""

import struct
from pathlib import Path

import pydicom
from pydicom.dataelem import RawDataElement, empty_value_for_VR
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.errors import InvalidDicomError
from pydicom.tag import BaseTag

from fedmed.dicom.reasons import Quarantined, Reason

# A file that parses within any worker's memory.
SMALL = 20 * 2**20
# A file without preamble, as old systems wrote it, begins with an element of group 0008, in either byte order.
_BARE = (b"\x08\x00", b"\x00\x08")
_PREAMBLE, _MAGIC = 128, b"DICM"
_SYNTAX, _PIXEL_DATA = 0x00020010, 0x7FE00010
_ITEM, _END_OF_ITEMS = 0xFFFEE000, 0xFFFEE0DD
_UNDEFINED = 0xFFFFFFFF
_EXPLICIT_LITTLE_ENDIAN, _ENCAPSULATED = "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.4."
_RLE = "1.2.840.10008.1.2.5"
# PS3.5 table 7.1-1: those with a length of 32 bits. Of table 7.1-2: those of 16.
_LONG = frozenset([b"OB", b"OD", b"OF", b"OL", b"OV", b"OW", b"SQ", b"SV", b"UC", b"UN", b"UR", b"UT", b"UV"])
_SHORT = frozenset(
    b"AE AS AT CS DA DS DT FD FL IS LO LT PN SH SL SS ST TM UI UL US".split()
)  # fmt: skip
_HEAD, _LENGTH, _TAG = struct.Struct("<HH2sH"), struct.Struct("<I"), struct.Struct("<HHI")

Elements = dict[BaseTag, RawDataElement]


def parse(path: str | Path) -> Dataset:
    """The file's data set, as `pydicom.dcmread` gives it: no element is converted and no pixel decoded yet.

    Raises:
        Quarantined: it does not begin as DICOM does, or a length in it is larger than any such file.
        OSError: it cannot be read.
    """
    content = Path(path).read_bytes()
    dataset = _usual(content)
    return dataset if dataset is not None else _any(path, content)


def _any(path: str | Path, content: bytes) -> Dataset:
    try:
        return pydicom.dcmread(path, force=content[:2] in _BARE)
    except InvalidDicomError:
        raise Quarantined(Reason.NOT_DICOM) from None
    except MemoryError:
        if len(content) < SMALL:
            raise Quarantined(Reason.UNREADABLE) from None
        raise


def _usual(content: bytes) -> Dataset | None:
    """A whole file in explicit VR little endian without sequences of undefined length; None for any other."""
    if content[_PREAMBLE : _PREAMBLE + 4] != _MAGIC:
        return None
    try:
        meta, start = _cut(content, _PREAMBLE + 4, meta=True)
        syntax = meta[BaseTag(_SYNTAX)].value
        name = "" if syntax is None else syntax.decode("ascii").rstrip(" \0")
        if name not in (_EXPLICIT_LITTLE_ENDIAN, _RLE) and not name.startswith(_ENCAPSULATED):
            return None
        elements, _ = _cut(content, start, meta=False)
    except (struct.error, KeyError, UnicodeDecodeError, _Unusual):
        return None
    if not elements:
        return None
    dataset = FileDataset(
        None,  # type: ignore[arg-type]
        elements,  # type: ignore[arg-type]
        preamble=content[:_PREAMBLE],
        file_meta=FileMetaDataset(meta),  # type: ignore[arg-type]
        is_implicit_VR=False,
        is_little_endian=True,
    )
    try:
        dataset.set_original_encoding(False, True, dataset._character_set)
    # A character set that is no text: whatever pydicom then raises.
    except Exception:
        return None
    return dataset


class _Unusual(Exception):
    """Left to pydicom."""


def _cut(content: bytes, at: int, *, meta: bool) -> tuple[Elements, int]:
    """The elements from `at` on, of the file meta information or of the data set, and where they end."""
    elements: Elements = {}
    end = len(content)
    while at < end:
        group, element, vr, length = _HEAD.unpack_from(content, at)
        if meta and group != 2:
            break
        head = 8
        if vr in _LONG:
            (length,) = _LENGTH.unpack_from(content, at + 8)
            head = 12
        elif vr not in _SHORT:
            raise _Unusual
        tag = group << 16 | element
        start = at + head
        if length == _UNDEFINED and tag == _PIXEL_DATA:
            at = _end_of_fragments(content, start)
            value: bytes | None = content[start : at - 8]
        else:
            at = start + length
            if at > end or group == 0xFFFE or (tag == _PIXEL_DATA and head == 8):
                raise _Unusual
            value = content[start:at] if length else empty_value_for_VR(vr.decode(), raw=True)  # type: ignore[assignment]
        name = BaseTag(tag)
        elements[name] = RawDataElement(name, vr.decode(), length, value, start, False, True, True)
    return elements, at


def _end_of_fragments(content: bytes, at: int) -> int:
    """Behind the delimiter of encapsulated pixels (PS3.5 A.4)."""
    while True:
        group, element, length = _TAG.unpack_from(content, at)
        at += 8
        tag = group << 16 | element
        if tag == _END_OF_ITEMS:
            return at
        if tag != _ITEM or length == _UNDEFINED or at + length > len(content):
            raise _Unusual
        at += length
