"""De-identification to DICOM PS3.15 Annex E, Basic Application Level Confidentiality Profile.

With the options Clean Pixel Data, Retain Longitudinal Temporal Information with Modified Dates, and Retain
UIDs. CONFIDENTIALITY.md says what is done beyond the table, and what is not detected.
"""

from dataclasses import dataclass
from typing import Literal

from pydicom import Dataset
from pydicom.dataset import FileMetaDataset
from pydicom.uid import UID, ExplicitVRBigEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian

from fedmed.dicom.deid import pixel_data
from fedmed.dicom.deid.attributes import Attributes, one_line
from fedmed.dicom.deid.burned_in import KnownRegion, mask_pixels, text_to_blank
from fedmed.dicom.deid.confidentiality import EDITION, Action, actions
from fedmed.dicom.deid.quiet import quiet
from fedmed.dicom.hashes import keyed_hash
from fedmed.dicom.reasons import Quarantined, Reason

# One random UUID, made once for this software (PS3.5, B.2).
IMPLEMENTATION_CLASS_UID = UID("2.25.204981763327316241786532987311942780143")
METHOD = f"fedmed PS3.15 {EDITION}"
# CID 7050, "De-identification Method".
_BASIC = ("113100", "Basic Application Confidentiality Profile")
_CLEAN_PIXELS = ("113101", "Clean Pixel Data Option")
_MODIFIED_DATES = ("113107", "Retain Longitudinal Temporal Information Modified Dates Option")
_RETAIN_UIDS = ("113110", "Retain UIDs Option")


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
        try:
            with quiet():
                return self._deidentify(dataset)
        except Quarantined:
            raise
        except Exception:
            # Its text may hold a value of the file.
            raise Quarantined(Reason.UNREADABLE) from None

    def _deidentify(self, dataset: Dataset) -> Dataset:
        # A view: reading its values converts them there, not in `dataset`. Groups under 8 are commands,
        # file meta and directories, which no file's dataset holds.
        source = dataset[0x00080000:]
        patient_id = one_line(source, "PatientID")
        if not patient_id:
            raise Quarantined(Reason.PATIENT_ID_MISSING)
        if not (one_line(source, "SOPClassUID") and one_line(source, "SOPInstanceUID")):
            raise Quarantined(Reason.UID_MISSING)
        if one_line(source, "DeidentificationMethod").startswith(METHOD.removesuffix(EDITION)):
            raise Quarantined(Reason.ALREADY_DEIDENTIFIED)
        syntax = _transfer_syntax(dataset)
        mask = text_to_blank(
            source, mask=self.options.burned_in == "mask", regions=self.options.known_regions
        )
        attributes = Attributes(
            self._key, self._actions, patient_id=patient_id, retain_uids=self.options.retain_uids
        )
        result = attributes.clean(source)
        result.file_meta = _file_meta(result, syntax)
        pixel_data.clean(result, syntax)
        if mask is not None:
            mask_pixels(result, mask)
            result.BurnedInAnnotation = "NO"
        self._describe(result, masked=mask is not None)
        result.PatientID = result.PatientName = keyed_hash(self._key, "patient", patient_id)
        result.preamble = b"\0" * 128
        return result

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
        raise Quarantined(Reason.TRANSFER_SYNTAX)
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
