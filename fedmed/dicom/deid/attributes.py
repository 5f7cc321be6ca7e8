"""The attributes of one file, replaced one after the other: Table E.1-1, and a rule for what is not in it."""

import hmac
import re
from collections.abc import Mapping
from typing import Any
from uuid import UUID

from pydicom import DataElement, Dataset, Sequence
from pydicom.config import IGNORE
from pydicom.datadict import dictionary_has_tag, dictionary_VR, keyword_for_tag
from pydicom.multival import MultiValue
from pydicom.uid import UID, UID_dictionary

from fedmed.dicom.deid.codes import known
from fedmed.dicom.deid.confidentiality import Action, actions
from fedmed.dicom.deid.dates import days_earlier, shift
from fedmed.dicom.hashes import keyed_hash

REMOVED = "REMOVED"
# Deeper nesting than this is in no IOD; what lies deeper is removed.
MAX_DEPTH = 12

# Text of one line that is not in Table E.1-1 and stays: what says how to read pixels, and which machine made
# them. All other text outside the table goes: a free field holds whatever a person typed into it.
KEPT_TEXT = frozenset(
    {
        "Manufacturer",
        "ManufacturerModelName",
        "SoftwareVersions",
        "ConvolutionKernel",
        "SequenceName",
        "PulseSequenceName",
        "FilterType",
        "RescaleType",
        "ModalityLUTType",
        "CodeValue",
        "CodingSchemeDesignator",
        "CodeMeaning",
        "StackID",
    }
)
# Bytes that stay. All other bytes outside the table go (colour profiles and waveforms among them).
_PIXELS = frozenset(
    {
        "PixelData",
        "FloatPixelData",
        "DoubleFloatPixelData",
        "ExtendedOffsetTable",
        "ExtendedOffsetTableLengths",
    }
)
_PALETTE = frozenset(
    f"{segmented}{colour}PaletteColorLookupTableData"
    for segmented in ("", "Segmented")
    for colour in ("Red", "Green", "Blue", "Alpha")
)
_BYTES = frozenset({"OB", "OW", "OF", "OD", "OL", "OV"})
_NUMBERS = frozenset({"US", "SS", "UL", "SL", "UV", "SV", "FL", "FD", "AT"})
# What a value of these must look like to stay.
_PATTERNS = {
    "CS": re.compile(r"[A-Z0-9 _]{0,16}"),
    "DS": re.compile(r" *([+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d{1,3})?)? *", re.ASCII),
    "IS": re.compile(r" *([+-]?\d{1,12}(\.0*)?)? *", re.ASCII),
    "LO": re.compile(r"[ -\[\]-~]{0,64}"),
    "SH": re.compile(r"[ -\[\]-~]{0,16}"),
}
_PATIENT_ID = 0x00100020
_STACK = re.compile(r" *[0-9]{0,8} *")
_DUMMIES: dict[str, Any] = {
    "DA": "19000101",
    "TM": "000000",
    "DT": "19000101000000",
    "AS": "000D",
    "DS": "0",
    "IS": "0",
    "UR": "urn:removed",
    "UI": "2.25.0",
    **dict.fromkeys(("AE", "CS", "LO", "LT", "PN", "SH", "ST", "UC", "UT"), REMOVED),
    **dict.fromkeys((*_BYTES, "UN"), b"\0\0\0\0\0\0\0\0"),
    **dict.fromkeys(_NUMBERS, 0),
}


def one_line(dataset: Dataset, name: str) -> str:
    try:
        value = dataset.get(name)
    except Exception:
        return ""
    return "" if value is None else str(value).strip(" \0")


class Attributes:
    """One file's attributes, replaced one after the other."""

    def __init__(
        self, key: bytes, by_tag: Mapping[int, Action], *, patient_id: str, retain_uids: bool
    ) -> None:
        """`by_tag`: the actions of the profile with its options; what is not in it, is outside the table."""
        self._key = key
        self._actions = by_tag
        self._retain_uids = retain_uids
        self._days = days_earlier(key, patient_id)

    def clean(self, source: Dataset, depth: int = 0) -> Dataset:
        """A new dataset with the attributes of `source` that may stay; `source` is not changed."""
        result = Dataset()
        view = source[:]
        for tag in list(view.keys()):
            # A group's length is no longer right. Private groups, curves and overlays go whole.
            if tag.element == 0 or tag.is_private or tag.group >> 8 in (0x50, 0x60):
                continue
            action = self._actions.get(tag)
            # Commands, file meta and directories (groups under 8) have no place in a dataset.
            if action == "X" or (action is None and (tag.group < 8 or not dictionary_has_tag(tag))):
                continue
            try:
                element = self._replace(view, tag, action, depth)
            except Exception:
                # A value that cannot be read: only a placeholder may take its place.
                element = _placeholder(tag, actions().get(tag))
            if element is not None:
                result.add(element)
        return result

    def _replace(self, view: Dataset, tag: Any, action: Action | None, depth: int) -> DataElement | None:
        vr = _vr(view, tag)
        if tag == _PATIENT_ID:
            # At the top it is set again; in an item it may be another person's.
            value = one_line(view, "PatientID")
            return _element(tag, "LO", keyed_hash(self._key, "patient", value) if value else "")
        if action in ("D", "Z"):
            if vr == "UI" and action == "D":
                return self._uids(view, tag, keep=False)
            return _placeholder(tag, action)
        if action == "C":
            # Dates, if they can be moved; what else has this action, a placeholder of the profile.
            return self._dates(view, tag, vr) or _placeholder(tag, actions()[tag])
        if vr == "SQ":
            return self._sequence(view, tag, depth)
        if action in ("U", "K"):
            return self._uids(view, tag, keep=action == "K") if vr == "UI" else _placeholder(tag, "Z")
        return self._outside(view, tag, vr, depth)

    def _sequence(self, view: Dataset, tag: Any, depth: int) -> DataElement | None:
        if depth == MAX_DEPTH or view[tag].VR != "SQ":
            return None
        items = [self.clean(item, depth + 1) for item in view[tag].value or ()]
        return _element(tag, "SQ", Sequence(items))

    def _dates(self, view: Dataset, tag: Any, vr: str) -> DataElement | None:
        if vr not in ("DA", "DT", "TM"):
            return None
        values = _texts(view[tag].value)
        moved = [shift(value, vr, self._days) if value else "" for value in values]
        if None in moved:
            return None
        return _element(tag, vr, moved)

    def _uids(self, view: Dataset, tag: Any, *, keep: bool) -> DataElement:
        keyword = keyword_for_tag(tag)
        uids = [value.strip(" \0") for value in _texts(view[tag].value)]
        uids = [uid if keep and UID(uid).is_valid else self._uid(uid, keyword) for uid in uids]
        return _element(tag, "UI", uids)

    def _uid(self, uid: str, keyword: str) -> str:
        """The UID that stands for `uid` in all files of the site."""
        if not uid or uid in UID_dictionary:
            return uid
        # HL7's register of published terminologies: which one a code is from.
        if keyword == "CodingSchemeUID" and re.fullmatch(r"2\.16\.840\.1\.113883\.6\.[0-9]{1,6}", uid):
            return uid
        digest = bytearray(hmac.digest(self._key, b"fedmed uid\0" + uid.encode(), "sha256")[:16])
        # Version 8 of RFC 9562: made by a rule of our own.
        digest[6], digest[8] = digest[6] & 0x0F | 0x80, digest[8] & 0x3F | 0x80
        return f"2.25.{UUID(bytes=bytes(digest)).int}"

    def _outside(self, view: Dataset, tag: Any, vr: str, depth: int) -> DataElement | None:
        """An attribute outside Table E.1-1: stays only where it can hold no text that somebody typed."""
        if vr == "UI":
            return self._uids(view, tag, keep=self._retain_uids)
        keyword = keyword_for_tag(tag)
        if vr in _BYTES:
            # Colour tables of a picture that has no use for them are bytes like others.
            palette = one_line(view, "PhotometricInterpretation") == "PALETTE COLOR"
            kept = keyword == "LUTData" or (
                depth == 0 and (keyword in _PIXELS or (palette and keyword in _PALETTE))
            )
            return _element(tag, vr, bytes(view[tag].value or b"")) if kept else None
        if vr in _NUMBERS:
            numbers = _listed(view[tag].value)
            return (
                _element(tag, vr, numbers) if all(isinstance(one, (int, float)) for one in numbers) else None
            )
        if vr not in _PATTERNS or keyword == "SpecificCharacterSet":
            # Names, free text, addresses, ages, dates. What stays is ASCII: no character set is needed.
            return None
        values = _texts(view[tag].value)
        pattern = _STACK if keyword == "StackID" else _PATTERNS[vr]
        if vr in ("LO", "SH") and keyword not in KEPT_TEXT:
            # Empty, not removed: the attribute may be one that has to be there.
            return _element(tag, vr, "")
        if not all(pattern.fullmatch(value) for value in values):
            return _element(tag, vr, "")
        if keyword in ("CodeValue", "CodingSchemeDesignator", "CodeMeaning"):
            return _element(tag, vr, _term(view, keyword))
        return _element(tag, vr, values)


def _vr(view: Dataset, tag: Any) -> str:
    """The VR of a known attribute, from the dictionary; of several, the file's."""
    expected = dictionary_VR(tag) if dictionary_has_tag(tag) else "UN"
    found = view.get_item(tag).VR
    if " " not in expected:
        return expected
    if found is None or found == "UN":
        found = view[tag].VR
    return found if found in expected.split(" or ") else "UN"


def _placeholder(tag: Any, action: Action | None) -> DataElement | None:
    """What stands in the place of a value: None for actions that leave nothing."""
    if action not in ("D", "Z"):
        return None
    vr = (dictionary_VR(tag) if dictionary_has_tag(tag) else "UN").split(" ")[0]
    if vr == "SQ":
        return _element(tag, vr, Sequence([Dataset()] if action == "D" else []))
    return _element(tag, vr, _DUMMIES[vr] if action == "D" else None)


def _element(tag: Any, vr: str, value: Any) -> DataElement:
    """Without pydicom's validation, whose warnings hold the value. A list of one is that one."""
    if isinstance(value, list) and len(value) < 2:
        value = value[0] if value else None
    return DataElement(tag, vr, value, validation_mode=IGNORE)


def _listed(value: Any) -> list[Any]:
    """The values of an element, which is absent, one, or several."""
    if value is None or (isinstance(value, str) and not value):
        return []
    return list(value) if isinstance(value, MultiValue) else [value]


def _texts(value: Any) -> list[str]:
    """The values as the file has them."""
    return [str(getattr(one, "original_string", one)) for one in _listed(value)]


def _term(item: Dataset, keyword: str) -> str:
    """One part of a coded entry, if it is a term of the standard: a hospital's own code may name a person."""
    code = known(one_line(item, "CodeValue"), one_line(item, "CodingSchemeDesignator"))
    if code is None:
        return REMOVED
    return {"CodeValue": code.value, "CodingSchemeDesignator": code.scheme, "CodeMeaning": code.meaning}[
        keyword
    ]
