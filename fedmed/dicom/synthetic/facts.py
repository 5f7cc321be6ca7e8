"""What a DICOM file says besides its pixels."""

import datetime
from dataclasses import dataclass, field

from pydicom.config import RAISE
from pydicom.valuerep import validate_value

from fedmed.errors import ConfigError, require

PROJECTIONS = ("DX", "MG")
# Bits stored, by the modules of PS3.3: C.8.2.1, C.8.3.1, C.8.5.6, C.8.11.3.
DEPTHS = {"CR": (1, 16), "CT": (12, 16), "DX": (6, 16), "MG": (6, 16), "MR": (9, 16), "US": (8, 8)}
GREY = ("MONOCHROME1", "MONOCHROME2")


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What a file says besides its pixels. UIDs are given, so that equal arguments make equal bytes."""

    instance_uid: str
    series_uid: str
    study_uid: str
    # A volume's slices name one; CT and MR need it.
    frame_of_reference_uid: str = ""
    patient_id: str
    patient_name: str = ""
    birth_date: datetime.date | None = None
    # M, F, O, or nothing.
    sex: str = ""
    study_id: str = ""
    study_time: datetime.datetime = field(default_factory=lambda: datetime.datetime(2020, 1, 1))
    series_number: int = 1
    instance_number: int = 1
    modality: str = "DX"
    body_part: str = "CHEST"
    institution: str = ""
    manufacturer: str = ""
    model: str = ""
    comment: str = ""
    # Row and column spacing in mm.
    pixel_spacing: tuple[float, float] = (1.0, 1.0)
    bits_stored: int = 8
    # MONOCHROME1, MONOCHROME2, or RGB for an image of three channels.
    photometric: str = "MONOCHROME2"
    # Centre and width, in values after slope and intercept.
    window: tuple[float, float] | None = None
    # Other than 1 and 0 for CR, CT and MR alone (PS3.3 C.8.11.3.1.2).
    slope: float = 1.0
    intercept: float = 0.0
    # Of a CT or MR slice, in mm: the centre of its first pixel, and its thickness.
    position: tuple[float, float, float] = (0.0, 0.0, 0.0)
    thickness: float = 1.0

    def __post_init__(self) -> None:
        require(self.modality in DEPTHS, "modality", self.modality, " or ".join(DEPTHS))
        valid = ("MONOCHROME2", "RGB") if self.modality == "US" else GREY
        require(self.photometric in valid, "photometric", self.photometric, " or ".join(valid))
        low, high = DEPTHS[self.modality]
        require(low <= self.bits_stored <= high, "bits_stored", self.bits_stored, f"{low} to {high}")
        require(
            self.plain or self.modality in ("CR", "CT", "MR"), "slope/intercept", (self.slope, self.intercept),
            f"1 and 0 with modality={self.modality}",
        )  # fmt: skip

        for name, vr in (("patient_id", "LO"), ("patient_name", "PN"), ("sex", "CS"), ("study_id", "SH")):
            _check_text(name, getattr(self, name), vr)
        for name in ("instance_uid", "series_uid", "study_uid", "frame_of_reference_uid"):
            _check_text(name, getattr(self, name), "UI")

    @property
    def plain(self) -> bool:
        """Whether stored values are the values."""
        return (self.slope, self.intercept) == (1.0, 0.0)

    @property
    def bits_allocated(self) -> int:
        """8 or 16."""
        return 16 if self.bits_stored > 8 else 8


def _check_text(name: str, text: str, vr: str) -> None:
    """Hold a text to the rules of its kind (PS3.5 6.2). The message does not hold it."""
    try:
        validate_value(vr, text, RAISE)
    except ValueError:
        raise ConfigError(f"{name}: expected a value of the kind {vr} in DICOM (PS3.5, 6.2)") from None
