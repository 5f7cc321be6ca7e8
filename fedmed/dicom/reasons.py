"""Why a file, or a slice of a series, is not in the data set: the whole list. A reason holds nothing of the file."""

from enum import StrEnum


class Reason(StrEnum):
    """What stands in quarantine.csv and is counted in the manifest."""

    meaning: str
    """The reason in words, and where there is one, what a site engineer can do."""

    def __new__(cls, value: str, meaning: str) -> "Reason":
        member = str.__new__(cls, value)
        member._value_ = value
        member.meaning = meaning
        return member

    # The file.
    NOT_DICOM = "not-dicom", "the file does not begin as DICOM does"
    UNREADABLE = "unreadable", "the file is damaged, or contradicts itself in a way that no other reason names"
    NO_PERMISSION = "no-permission", "the file or its folder may not be read by this account"
    MISSING_FILE = "missing-file", "the DICOMDIR names it, and it is not there"
    TOO_LARGE = "too-large", "reading it takes more memory than a worker may use; raise --memory"
    TOO_SLOW = "too-slow", "reading it took longer than a worker may take; raise --seconds"
    DECODER_CRASHED = "decoder-crashed", "the decoder died of it"
    # What it is and whose.
    NOT_AN_IMAGE = "not-an-image", "DICOM without an image: a report, a plan, a presentation state, a DICOMDIR"
    NOT_AN_IMAGE_MODALITY = "not-an-image-modality", "no picture of a patient: a segmentation, a dose grid"
    MODALITY = "modality-not-read", "its modality is not among those that are read (--modality)"
    PATIENT_ID_MISSING = "patient-id-missing", "without PatientID nobody knows whose privacy it touches"
    PATIENT_ID_CONFLICT = "patient-id-conflict", "one PatientID with different birth dates; mend the export"
    UID_MISSING = "uid-missing", "without study, series and instance UID it cannot be told from others"
    DUPLICATE = "duplicate", "the same instance was read from another file of this export"
    ALREADY_DEIDENTIFIED = (
        "already-deidentified", "it came out of --deidentify: again, the patient would get a second pseudonym"
    )  # fmt: skip
    BURNED_IN_TEXT = "burned-in-text", "text may stand in its pixels; look at it, then --burned-in mask or keep"
    # Its pixels.
    NO_PIXELS = "no-pixels", "an image without pixel data"
    TRANSFER_SYNTAX = "transfer-syntax", "its compression is absent, unknown, or without an installed decoder"
    MALFORMED_VALUE = "malformed-value", "an element that decides how pixels are read is of another kind"
    IMPLAUSIBLE_SIZE = "implausible-size", "dimensions that no image has, or that its compressed data contradict"
    PIXEL_LENGTH = "pixel-length", "less pixel data than its dimensions need, or a whole frame more"
    PIXEL_LAYOUT = "pixel-layout", "bits or colour planes arranged in a way that the standard does not define"
    DECODE_FAILED = "decode-failed", "its compressed pixels cannot be decoded"
    PHOTOMETRIC_INTERPRETATION = (
        "photometric-interpretation", "its colours are not named, retired, or do not fit its samples"
    )  # fmt: skip
    RESCALE = "rescale", "rescale slope and intercept are incomplete, zero or not finite"
    WINDOW = "window", "its window is incomplete, has no width, or names an unknown function"
    LOOKUP_TABLE = "lookup-table", "a lookup table's descriptor and data do not fit each other"
    PIXEL_SPACING = "pixel-spacing", "pixels more than 16 times as high as wide, or of changing size"
    # Its place among others.
    GEOMETRY_MISSING = "geometry-missing", "a slice without usable position, orientation or spacing among several"
    SLICE_REPEATED = "slice-repeated", "another slice of the series has its place, and nothing tells them apart"
    LABEL_CONFLICT = "label-conflict", "labels.csv gives the slices of one volume different classes"


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
