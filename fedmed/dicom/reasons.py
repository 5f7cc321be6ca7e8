"""Why a file, or a slice of a series, is not in the data set: the whole list. A reason holds nothing of the file."""

from enum import StrEnum


class Reason(StrEnum):
    """What stands in quarantine.csv and is counted in the manifest."""

    NOT_DICOM = "not-dicom"
    UNREADABLE = "unreadable"
    NO_PERMISSION = "no-permission"
    MISSING_FILE = "missing-file"
    TOO_LARGE = "too-large"
    TOO_SLOW = "too-slow"
    DECODER_CRASHED = "decoder-crashed"
    NOT_AN_IMAGE = "not-an-image"
    NOT_AN_IMAGE_MODALITY = "not-an-image-modality"
    MODALITY = "modality-not-read"
    PATIENT_ID_MISSING = "patient-id-missing"
    PATIENT_ID_CONFLICT = "patient-id-conflict"
    UID_MISSING = "uid-missing"
    DUPLICATE = "duplicate"
    ALREADY_DEIDENTIFIED = "already-deidentified"
    BURNED_IN_TEXT = "burned-in-text"
    NO_PIXELS = "no-pixels"
    TRANSFER_SYNTAX = "transfer-syntax"
    MALFORMED_VALUE = "malformed-value"
    IMPLAUSIBLE_SIZE = "implausible-size"
    PIXEL_LENGTH = "pixel-length"
    PIXEL_LAYOUT = "pixel-layout"
    DECODE_FAILED = "decode-failed"
    PHOTOMETRIC_INTERPRETATION = "photometric-interpretation"
    RESCALE = "rescale"
    WINDOW = "window"
    LOOKUP_TABLE = "lookup-table"
    PIXEL_SPACING = "pixel-spacing"
    GEOMETRY_MISSING = "geometry-missing"
    SLICE_REPEATED = "slice-repeated"
    LABEL_CONFLICT = "label-conflict"

    @property
    def meaning(self) -> str:
        """The reason in words, and where there is something, what a site engineer can do."""
        return _MEANINGS[self]


_MEANINGS = {
    Reason.NOT_DICOM: "the file does not begin as DICOM does",
    Reason.UNREADABLE: "the file is damaged, or contradicts itself in a way that no other reason names",
    Reason.NO_PERMISSION: "the file or its folder may not be read by this account",
    Reason.MISSING_FILE: "the DICOMDIR or a link names it, and it is not there",
    Reason.TOO_LARGE: "reading it takes more memory than a worker may use; raise --memory",
    Reason.TOO_SLOW: "reading it took longer than a worker may take; raise --seconds",
    Reason.DECODER_CRASHED: "the decoder died of it",
    Reason.NOT_AN_IMAGE: "DICOM without an image: a report, a plan, a presentation state, a DICOMDIR",
    Reason.NOT_AN_IMAGE_MODALITY: "no picture of a patient: a segmentation, a dose grid",
    Reason.MODALITY: "its modality is not among those that are read (--modality)",
    Reason.PATIENT_ID_MISSING: "without PatientID nobody knows whose privacy it touches",
    Reason.PATIENT_ID_CONFLICT: "one PatientID with different birth dates; mend the export",
    Reason.UID_MISSING: "without study, series and instance UID it cannot be told from others",
    Reason.DUPLICATE: "the same instance was read from another file of this export",
    Reason.ALREADY_DEIDENTIFIED: "it came out of --deidentify: again, the patient would get a second pseudonym",
    Reason.BURNED_IN_TEXT: "text may stand in its pixels; look at it, then --burned-in mask or keep",
    Reason.NO_PIXELS: "an image without pixel data",
    Reason.TRANSFER_SYNTAX: "its compression is absent, unknown, or without an installed decoder",
    Reason.MALFORMED_VALUE: "an element that decides how pixels are read is of another kind",
    Reason.IMPLAUSIBLE_SIZE: "dimensions that no image has, or that its compressed data contradict",
    Reason.PIXEL_LENGTH: "less pixel data than its dimensions need, or a whole frame more",
    Reason.PIXEL_LAYOUT: "bits or colour planes arranged in a way that the standard does not define",
    Reason.DECODE_FAILED: "its compressed pixels cannot be decoded",
    Reason.PHOTOMETRIC_INTERPRETATION: "its colours are not named, retired, or do not fit its samples",
    Reason.RESCALE: "rescale slope and intercept are incomplete, zero or not finite",
    Reason.WINDOW: "its window is incomplete, has no width, or names an unknown function",
    Reason.LOOKUP_TABLE: "a lookup table's descriptor and data do not fit each other",
    Reason.PIXEL_SPACING: "pixels more than 16 times as high as wide, or of changing size",
    Reason.GEOMETRY_MISSING: "a slice without usable position, orientation or spacing among several",
    Reason.SLICE_REPEATED: "another slice of the series has its place, and nothing tells them apart",
    Reason.LABEL_CONFLICT: "labels.csv gives the slices of one volume different classes",
}


class Quarantined(Exception):
    """A file that cannot be used. Carries the reason and nothing else, so that it can be logged anywhere.

    >>> raise Quarantined(Reason.NO_PIXELS)
    Traceback (most recent call last):
    fedmed.dicom.reasons.Quarantined: no-pixels
    """

    def __init__(self, reason: Reason) -> None:
        super().__init__(reason.value)
        self.reason = reason

    def __reduce__(self) -> tuple[type["Quarantined"], tuple[Reason]]:
        # Crosses from a worker process to its parent.
        return type(self), (self.reason,)
