"""Why a file, or a slice of a series, is not used: the documented list, and the exception that carries one reason."""

from enum import StrEnum


class Reason(StrEnum):
    """A reason for quarantine. The text is what `quarantine.csv` holds; no value of a file ever joins it."""

    UNREADABLE = "unreadable"
    """The file is damaged, or its content contradicts itself in a way that no other reason names."""
    NO_PIXELS = "no-pixels"
    """The file is DICOM and holds no pixel data, e.g. a report or a presentation state."""
    NOT_AN_IMAGE_MODALITY = "not-an-image-modality"
    """The pixels are not a picture of a patient, e.g. a segmentation or a dose grid."""
    TRANSFER_SYNTAX = "transfer-syntax"
    """The compression is absent, unknown, or one for which no decoder is installed."""
    MALFORMED_VALUE = "malformed-value"
    """An element that decides how pixels are read holds something other than its kind of value."""
    IMPLAUSIBLE_SIZE = "implausible-size"
    """Rows, columns, frames, samples or bits lie outside what an image can have, or contradict the compressed data."""
    PIXEL_LENGTH = "pixel-length"
    """There is less pixel data than rows, columns, frames and bits need, or a whole frame more."""
    PIXEL_LAYOUT = "pixel-layout"
    """The bits or colour planes of a pixel are arranged in a way that the standard does not define."""
    DECODE_FAILED = "decode-failed"
    """The compressed pixel data could not be decoded."""
    PHOTOMETRIC_INTERPRETATION = "photometric-interpretation"
    """The colour space is absent, retired, or does not fit the number of samples or the compression."""
    RESCALE = "rescale"
    """Rescale slope and intercept are incomplete, zero or not finite."""
    WINDOW = "window"
    """The window is incomplete, has no width, is not finite, or names an unknown function."""
    LOOKUP_TABLE = "lookup-table"
    """A lookup table's descriptor and data do not fit each other."""
    PIXEL_SPACING = "pixel-spacing"
    """Pixels are more than 16 times as high as wide or the reverse, or change their size between frames."""
    TOO_LARGE = "too-large"
    """The image is plausible and larger than what is read."""
    SLICE_REPEATED = "slice-repeated"
    """Another slice of the series lies at the same place and nothing tells the two apart."""
    GEOMETRY_MISSING = "geometry-missing"
    """A slice of a volume has no usable position, orientation or pixel spacing."""


class Quarantined(Exception):
    """A file that cannot be used. Carries the reason and nothing else, so that it can be logged anywhere.

    >>> raise Quarantined(Reason.NO_PIXELS)
    Traceback (most recent call last):
    fedmed.dicom.reasons.Quarantined: no-pixels
    """

    def __init__(self, reason: Reason) -> None:
        super().__init__(str(reason))
        self.reason = reason

    def __reduce__(self) -> tuple[type["Quarantined"], tuple[Reason]]:
        # Crosses from a worker process to its parent.
        return type(self), (self.reason,)
