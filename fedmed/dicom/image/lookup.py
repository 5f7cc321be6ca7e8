"""Lookup tables of DICOM: Modality LUT, VOI LUT and palettes (PS3.3 C.11.1.1, C.11.2.1.1, C.7.6.3.1.5)."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset
from pydicom.pixels import apply_color_lut

from fedmed.dicom.image.elements import Elements, signed16
from fedmed.dicom.image.layout import PixelLayout
from fedmed.dicom.reasons import Quarantined, Reason

_DESCRIPTOR, _DATA = 0x00283002, 0x00283006


@dataclass(frozen=True, kw_only=True)
class LookupTable:
    """A table: input `first` gives `entries[0]`, lower input the first entry, higher input the last.

    `entries`: native 16-bit words as bytes, so that tables compare and hash by content; `bits` of each are used.
    """

    first: int
    bits: int
    entries: bytes

    @property
    def values(self) -> NDArray[np.uint16]:
        """(entries,) as the file has them."""
        return np.frombuffer(self.entries, np.uint16)

    def apply(self, values: NDArray, table: NDArray) -> NDArray:
        """`table`, one value or row an entry, at `values` (any shape, integers or numbers near integers)."""
        index = values if values.dtype.kind in "iu" else np.rint(values)
        index = np.clip(index, self.first, self.first + len(table) - 1) - self.first
        return table[index.astype(np.int64)]


def read_table(item: Elements, layout: PixelLayout, *, signed: bool) -> LookupTable:
    """The table of a Modality LUT or VOI LUT item; `signed`: whether its input can be negative."""
    return _table(item, layout, signed=signed, descriptor=_DESCRIPTOR, data=_DATA)


def _table(item: Elements, layout: PixelLayout, *, signed: bool, descriptor: int, data: int) -> LookupTable:
    described = item.numbers(descriptor)
    if len(described) != 3 or not all(-0x8000 <= number <= 0xFFFF for number in described):
        raise Quarantined(Reason.LOOKUP_TABLE)
    count = signed16(described[0], signed=False) or 1 << 16
    bits = int(described[2])
    if not 8 <= bits <= 16:
        raise Quarantined(Reason.LOOKUP_TABLE)
    entries = _entries(item.words(data, little_endian=layout.little_endian), count, bits)
    if int(entries.max()) >> bits:
        raise Quarantined(Reason.LOOKUP_TABLE)
    return LookupTable(first=signed16(described[1], signed=signed), bits=bits, entries=entries.tobytes())


def _entries(words: bytes | NDArray[np.uint16], count: int, bits: int) -> NDArray[np.uint16]:
    if not isinstance(words, bytes):
        entries = words
    elif len(words) == 2 * count:
        entries = np.frombuffer(words, "<u2").astype(np.uint16)
    elif bits == 8 and len(words) == count + count % 2:
        # Two 8-bit entries in a word (PS3.3 C.7.6.3.1.6).
        entries = np.frombuffer(words, np.uint8)[:count].astype(np.uint16)
    else:
        raise Quarantined(Reason.LOOKUP_TABLE)
    if len(entries) != count:
        raise Quarantined(Reason.LOOKUP_TABLE)
    return entries


def read_palette(dataset: Dataset, elements: Elements, layout: PixelLayout) -> NDArray[np.float32]:
    """The palette of a PALETTE COLOR image: (2 ** `bits_allocated`, 3), the colour, 0 to 65535, of each stored value.

    Negative stored values are at the end, as in two's complement.
    """
    first, colours = _palette(dataset, elements, layout)
    possible = np.arange(1 << layout.bits_allocated)
    if layout.signed:
        possible = np.where(possible >> (layout.bits_allocated - 1), possible - len(possible), possible)
    index = np.clip(possible - first, 0, len(colours) - 1)
    return colours[index].astype(np.float32)


def _palette(dataset: Dataset, elements: Elements, layout: PixelLayout) -> tuple[int, NDArray[np.uint16]]:
    if 0x00281201 in elements:
        channels = [
            _table(elements, layout, signed=layout.signed, descriptor=0x00281101 + c, data=0x00281201 + c)
            for c in range(3)
        ]
        if len({(c.first, c.bits, len(c.entries)) for c in channels}) != 1:
            raise Quarantined(Reason.LOOKUP_TABLE)
        colours = np.stack([scaled(channel) for channel in channels], axis=1)
        return channels[0].first, colours
    if 0x00281221 in elements:
        return _segmented(dataset, elements, layout)
    raise Quarantined(Reason.LOOKUP_TABLE)


def _segmented(dataset: Dataset, elements: Elements, layout: PixelLayout) -> tuple[int, NDArray[np.uint16]]:
    """PS3.3 C.7.9.2, expanded by pydicom."""
    described = elements.numbers(0x00281101)
    if len(described) != 3 or described[2] not in (8, 16):
        raise Quarantined(Reason.LOOKUP_TABLE)
    count, bits = signed16(described[0], signed=False) or 1 << 16, int(described[2])
    first = signed16(described[1], signed=layout.signed)
    # Segments can copy each other: a few bytes may describe far more entries than fit a table.
    if count > 1 << bits:
        raise Quarantined(Reason.LOOKUP_TABLE)
    try:
        colours = apply_color_lut(np.arange(first, first + count, dtype=np.int64), dataset)[:, :3]
    except Exception:
        raise Quarantined(Reason.LOOKUP_TABLE) from None
    if colours.dtype != np.uint16:
        colours = colours.astype(np.uint16) * 257
    return first, colours


def scaled(table: LookupTable) -> NDArray[np.uint16]:
    """A table's entries with their full range stretched to 0 … 65535."""
    if table.bits == 16:
        return table.values
    return np.rint(table.values * (65535 / ((1 << table.bits) - 1))).astype(np.uint16)
