"""De-identification to DICOM PS3.15 Annex E, Basic Application Level Confidentiality Profile.

With the options Clean Pixel Data, Retain Longitudinal Temporal Information with Modified Dates, and Retain
UIDs. CONFIDENTIALITY.md says what is done beyond the table, and what is not detected.
"""

import hmac
import re
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal
from uuid import UUID

from pydicom import DataElement, Dataset, Sequence
from pydicom.datadict import dictionary_has_tag, dictionary_VR, keyword_for_tag
from pydicom.dataset import FileMetaDataset
from pydicom.uid import (
    UID,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    UID_dictionary,
)

from fedmed.dicom import pixel_data
from fedmed.dicom.burned_in import KnownRegion, blank, burned_in, mask_pixels
from fedmed.dicom.confidentiality import EDITION, Action, actions
from fedmed.dicom.dates import days_earlier, shift
from fedmed.dicom.reasons import Quarantined, Reason

# One random UUID, made once for this software (PS3.5, B.2).
IMPLEMENTATION_CLASS_UID = UID("2.25.204981763327316241786532987311942780143")
METHOD = f"fedmed PS3.15 {EDITION}"
REMOVED = "REMOVED"
# Deeper nesting than this is in no IOD; what lies deeper is removed.
MAX_DEPTH = 12

# CID 7050, "De-identification Method".
_BASIC = ("113100", "Basic Application Confidentiality Profile")
_CLEAN_PIXELS = ("113101", "Clean Pixel Data Option")
_MODIFIED_DATES = ("113107", "Retain Longitudinal Temporal Information Modified Dates Option")
_RETAIN_UIDS = ("113110", "Retain UIDs Option")

# Text of one line that is not in Table E.1-1 and stays: what says how to read pixels, and which machine made
# them. All other text outside the table goes: a free field holds whatever a person typed into it.
KEPT_TEXT = frozenset(
    """Manufacturer ManufacturerModelName SoftwareVersions ConvolutionKernel SequenceName PulseSequenceName
    FilterType RescaleType ModalityLUTType CodeValue CodingSchemeDesignator CodeMeaning StackID""".split()
)
# Bytes that stay. All other bytes outside the table go (colour profiles and waveforms among them).
KEPT_BYTES = frozenset(
    """PixelData FloatPixelData DoubleFloatPixelData ExtendedOffsetTable ExtendedOffsetTableLengths LUTData
    RedPaletteColorLookupTableData GreenPaletteColorLookupTableData BluePaletteColorLookupTableData
    AlphaPaletteColorLookupTableData SegmentedRedPaletteColorLookupTableData
    SegmentedGreenPaletteColorLookupTableData SegmentedBluePaletteColorLookupTableData
    SegmentedAlphaPaletteColorLookupTableData""".split()
)
_BYTES = frozenset({"OB", "OW", "OF", "OD", "OL", "OV"})
_NUMBERS = frozenset({"US", "SS", "UL", "SL", "UV", "SV", "FL", "FD", "AT"})
# What a value of these must look like to stay.
_PATTERNS = {
    "CS": re.compile(r"[A-Z0-9 _]{0,16}"),
    "DS": re.compile(r" *([+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d{1,3})?)? *"),
    "IS": re.compile(r" *([+-]?\d{1,12})? *"),
    "LO": re.compile(r"[ -\[\]-~]{0,64}"),
    "SH": re.compile(r"[ -\[\]-~]{0,16}"),
}
_STACK = re.compile(r" *\d{0,8} *")
_DUMMIES: dict[str, Any] = {
    "DA": "19000101",
    "TM": "000000",
    "DT": "19000101000000",
    "AS": "000D",
    "DS": "0",
    "IS": "0",
    "UR": "urn:removed",
    "PN": REMOVED,
    **dict.fromkeys(("AE", "CS", "LO", "LT", "SH", "ST", "UC", "UT"), REMOVED),
    **dict.fromkeys((*_BYTES, "UN"), b"\0\0\0\0\0\0\0\0"),
    **dict.fromkeys(_NUMBERS, 0),
}


@dataclass(frozen=True, kw_only=True)
class DeidentifyOptions:
    """What is kept or masked beside the basic profile.

    Attributes:
        modified_dates: keep dates, moved by a secret number of days of each patient; else they are removed.
        retain_uids: keep the UIDs; else each is replaced, the same everywhere.
        burned_in: what happens to pictures that may have text in them: the file is refused, or the
            pixels outside the ultrasound regions or inside `known_regions` are blanked. Where no region
            is known, the file is refused under either.
    """

    modified_dates: bool = False
    retain_uids: bool = False
    burned_in: Literal["refuse", "mask"] = "refuse"
    known_regions: tuple[KnownRegion, ...] = ()

    def __post_init__(self) -> None:
        if self.burned_in not in ("refuse", "mask"):
            raise ValueError(f"burned_in={self.burned_in}: expected refuse or mask")


def pseudonym(key: bytes, patient_id: str) -> str:
    """32 hexadecimal digits for a patient that only the holder of `key` can make, and nobody can read back."""
    return hmac.digest(key, b"fedmed patient\0" + patient_id.encode(), "sha256")[:16].hex()


class Deidentifier:
    """De-identifies the files of one site: the same key gives the same pseudonyms, UIDs and date shifts."""

    def __init__(self, key: bytes, options: DeidentifyOptions | None = None) -> None:
        """`key`: at least 16 secret bytes that stay at the site."""
        if len(key) < 16:
            raise ValueError(f"key of {len(key)} bytes: expected at least 16")
        self._key = key
        self.options = options or DeidentifyOptions()
        self._actions: dict[int, Action] = dict(actions())
        if self.options.retain_uids:
            self._actions.update(actions("retain_uids"))
        if self.options.modified_dates:
            self._actions.update(actions("retain_longitudinal_modified_dates"))

    def deidentify(self, dataset: Dataset) -> Dataset:
        """A new dataset, ready to be written, that holds no identifying attribute of `dataset`.

        `dataset` (as `pydicom.dcmread` gives it) stays as it is.

        Raises:
            Quarantined: no patient id or instance UID, text may be in the pixels, pixels that cannot be
                cleaned, or a file that was de-identified here before.
        """
        source = dataset[:]
        patient_id = _one_line(source, "PatientID")
        if not patient_id:
            raise Quarantined(Reason.MISSING_PATIENT_ID)
        for name in ("SOPClassUID", "SOPInstanceUID"):
            if not _one_line(source, name):
                raise Quarantined(Reason.MISSING_UID)
        if _one_line(source, "DeidentificationMethod").startswith(METHOD.partition(" ")[0] + " PS3.15"):
            raise Quarantined(Reason.ALREADY_DEIDENTIFIED)
        syntax = _transfer_syntax(dataset)
        # Not in a command's or a directory's groups, which no file's dataset has (PS3.10, 7).
        source = source[0x00080000:]
        # Judged on the file as it came; the regions themselves are numbers, which stay.
        mask = self._mask(source)
        walk = _Walk(self._key, self.options, self._actions, patient_id)
        result = walk.clean(source)
        result.file_meta = _file_meta(result, syntax)
        pixel_data.clean(result, syntax)
        if mask is not None:
            mask_pixels(result, mask)
            result.BurnedInAnnotation = "NO"
        self._describe(result, masked=mask is not None)
        result.PatientID = pseudonym(self._key, patient_id)
        result.PatientName = result.PatientID
        result.preamble = b"\0" * 128
        return result

    def _mask(self, source: Dataset) -> Any:
        if not burned_in(source).suspect:
            return None
        mask = blank(source, self.options.known_regions) if self.options.burned_in == "mask" else None
        if mask is None:
            raise Quarantined(Reason.BURNED_IN_TEXT)
        return mask

    def _describe(self, result: Dataset, *, masked: bool) -> None:
        """Say what was done (PS3.15 E.1.1, 6; E.3.6)."""
        codes = [_BASIC]
        if masked:
            codes.append(_CLEAN_PIXELS)
        if self.options.modified_dates:
            codes.append(_MODIFIED_DATES)
        if self.options.retain_uids:
            codes.append(_RETAIN_UIDS)
        result.PatientIdentityRemoved = "YES"
        result.DeidentificationMethod = METHOD
        result.DeidentificationMethodCodeSequence = [_code(*code) for code in codes]
        result.LongitudinalTemporalInformationModified = (
            "MODIFIED" if self.options.modified_dates else "REMOVED"
        )


def _code(value: str, meaning: str) -> Dataset:
    item = Dataset()
    item.CodeValue, item.CodingSchemeDesignator, item.CodeMeaning = value, "DCM", meaning
    return item


def _one_line(dataset: Dataset, name: str) -> str:
    try:
        value = dataset.get(name)
    except Exception:
        return ""
    return "" if value is None else str(value).strip(" \0")


def _transfer_syntax(dataset: Dataset) -> UID:
    """The encoding of the file.

    Raises:
        Quarantined: one that is not of the standard.
    """
    meta = getattr(dataset, "file_meta", None)
    if meta is not None and "TransferSyntaxUID" in meta:
        syntax = UID(str(meta.TransferSyntaxUID))
    else:
        implicit, little = dataset.original_encoding
        explicit = ExplicitVRBigEndian if little is False else ExplicitVRLittleEndian
        syntax = ImplicitVRLittleEndian if implicit else explicit
    if syntax not in pixel_data.SUPPORTED:
        raise Quarantined(Reason.UNSUPPORTED_TRANSFER_SYNTAX)
    return syntax


def _file_meta(result: Dataset, syntax: UID) -> FileMetaDataset:
    meta = FileMetaDataset()
    meta.FileMetaInformationVersion = b"\0\1"
    meta.MediaStorageSOPClassUID = result.SOPClassUID
    meta.MediaStorageSOPInstanceUID = result.SOPInstanceUID
    meta.TransferSyntaxUID = syntax
    meta.ImplementationClassUID = IMPLEMENTATION_CLASS_UID
    meta.ImplementationVersionName = "FEDMED"
    return meta


class _Walk:
    """One file's attributes, replaced one after the other."""

    def __init__(
        self, key: bytes, options: DeidentifyOptions, by_tag: dict[int, Action], patient_id: str
    ) -> None:
        self._key = key
        self._retain_uids = options.retain_uids
        self._modified_dates = options.modified_dates
        self._actions = by_tag
        self._days = days_earlier(key, patient_id)

    def clean(self, source: Dataset, depth: int = 0) -> Dataset:
        """A new dataset with the attributes of `source` that may stay; `source` is not changed."""
        result = Dataset()
        view = source[:]
        for tag in view.keys():
            # A group's length is no longer right. Private groups, curves and overlays go whole.
            if tag.element == 0 or tag.is_private or tag.group >> 8 in (0x50, 0x60):
                continue
            action = self._actions.get(tag)
            if action == "X" or (action is None and not dictionary_has_tag(tag)):
                continue
            try:
                element = self._replace(view, tag, action, depth)
            except Quarantined:
                raise
            except Exception:
                # A value that pydicom cannot read: only a placeholder may take its place.
                element = None if action is None else _placeholder(tag, action)
            if element is not None:
                result.add(element)
        return result

    def _replace(self, view: Dataset, tag: Any, action: Action | None, depth: int) -> DataElement | None:
        vr = _vr(view, tag)
        if action == "Z" and keyword_for_tag(tag) == "PatientID":
            action = "D"
        if keyword_for_tag(tag) == "PatientID" and action == "D":
            # At the top it is set again; in an item it may be another person's.
            value = _one_line(view, "PatientID")
            return DataElement(tag, "LO", pseudonym(self._key, value) if value else "")
        if action in ("D", "Z"):
            if vr == "UI" and action == "D":
                return self._uids(view, tag)
            return _placeholder(tag, action)
        if action == "C":
            # Dates, if they can be moved; what else has this action, a placeholder of the profile.
            return self._dates(view, tag, vr) or _placeholder(tag, actions()[tag])
        if vr == "SQ":
            return self._sequence(view, tag, depth)
        if action in ("U", "K"):
            return self._uids(view, tag) if vr == "UI" else _placeholder(tag, "Z")
        return self._outside(view, tag, vr)

    def _sequence(self, view: Dataset, tag: Any, depth: int) -> DataElement | None:
        if depth == MAX_DEPTH or view[tag].VR != "SQ":
            return None
        items = [self.clean(item, depth + 1) for item in view[tag].value or ()]
        return DataElement(tag, "SQ", Sequence(items))

    def _dates(self, view: Dataset, tag: Any, vr: str) -> DataElement | None:
        if vr not in ("DA", "DT", "TM"):
            return None
        values = _texts(view[tag].value)
        moved = [shift(value, vr, self._days) if value else "" for value in values]
        if None in moved:
            return None
        return DataElement(tag, vr, moved if len(moved) != 1 else moved[0])

    def _uids(self, view: Dataset, tag: Any) -> DataElement:
        uids = [self._uid(value.strip(" \0"), keyword_for_tag(tag)) for value in _texts(view[tag].value)]
        return DataElement(tag, "UI", uids if len(uids) != 1 else uids[0])

    def _uid(self, uid: str, keyword: str) -> str:
        """The UID that stands for `uid` in all files of the site."""
        if not uid or uid in UID_dictionary or (self._retain_uids and UID(uid).is_valid):
            return uid
        # HL7's register of published terminologies: which one a code is from.
        if keyword == "CodingSchemeUID" and re.fullmatch(r"2\.16\.840\.1\.113883\.6\.\d{1,6}", uid):
            return uid
        digest = bytearray(hmac.digest(self._key, b"fedmed uid\0" + uid.encode(), "sha256")[:16])
        # Version 8 of RFC 9562: made by a rule of our own.
        digest[6], digest[8] = digest[6] & 0x0F | 0x80, digest[8] & 0x3F | 0x80
        return f"2.25.{UUID(bytes=bytes(digest)).int}"

    def _outside(self, view: Dataset, tag: Any, vr: str) -> DataElement | None:
        """An attribute outside Table E.1-1: stays only where it can hold no text that somebody typed."""
        if vr == "UI":
            return self._uids(view, tag)
        keyword = keyword_for_tag(tag)
        if vr in _BYTES:
            return DataElement(tag, vr, view[tag].value) if keyword in KEPT_BYTES else None
        if vr in _NUMBERS:
            return DataElement(tag, vr, _copy(view[tag].value))
        if vr not in _PATTERNS or keyword == "SpecificCharacterSet":
            # Names, free text, addresses, ages, dates. What stays is ASCII: no character set is needed.
            return None
        values = _texts(view[tag].value)
        pattern = _STACK if keyword == "StackID" else _PATTERNS[vr]
        if vr in ("LO", "SH") and keyword not in KEPT_TEXT:
            # Empty, not removed: the attribute may be one that has to be there.
            return DataElement(tag, vr, "")
        if not all(pattern.fullmatch(value) for value in values):
            return DataElement(tag, vr, "")
        if keyword in ("CodeValue", "CodingSchemeDesignator", "CodeMeaning"):
            return DataElement(tag, vr, _known_code(view, keyword))
        return DataElement(tag, vr, values if len(values) != 1 else values[0])


def _vr(view: Dataset, tag: Any) -> str:
    """The VR of a known attribute, from the dictionary; of several, the file's."""
    expected = dictionary_VR(tag) if dictionary_has_tag(tag) else "UN"
    found = view.get_item(tag).VR
    if " " not in expected:
        return expected
    if found is None or found == "UN":
        found = view[tag].VR
    return found if found in expected.split(" or ") else "UN"


def _placeholder(tag: Any, action: Action) -> DataElement | None:
    """What stands in the place of a value: None for actions that leave nothing."""
    if action not in ("D", "Z"):
        return None
    vr = (dictionary_VR(tag) if dictionary_has_tag(tag) else "UN").split(" ")[0]
    if vr == "SQ":
        return DataElement(tag, vr, Sequence([Dataset()] if action == "D" else []))
    return DataElement(tag, vr, _DUMMIES[vr] if action == "D" else None)


def _texts(value: Any) -> list[str]:
    """The values of an element as the file has them."""
    if value is None or value == "":
        return []
    values = value if isinstance(value, (list, tuple)) or type(value).__name__ == "MultiValue" else [value]
    return [str(getattr(one, "original_string", one)) for one in values]


def _copy(value: Any) -> Any:
    return list(value) if type(value).__name__ == "MultiValue" else value


@cache
def _known_codes() -> dict[tuple[str, str], str]:
    """(scheme, code) to meaning, of the terms in the standard's context groups."""
    from pydicom.sr._concepts_dict import concepts

    return {
        (scheme, code): meaning
        for scheme, keywords in concepts.items()
        for codes in keywords.values()
        for code, (meaning, _) in codes.items()
    }


def _known_code(item: Dataset, keyword: str) -> str:
    """One part of a coded entry, if it is a term of the standard: a code of the hospital's own may name a person."""
    scheme, code = _one_line(item, "CodingSchemeDesignator"), _one_line(item, "CodeValue")
    meaning = _known_codes().get((scheme, code))
    if meaning is None:
        return REMOVED
    return {"CodeValue": code, "CodingSchemeDesignator": scheme, "CodeMeaning": meaning}[keyword]
