"""One image and the facts about it become one valid DICOM file.

Made for made-up patients: benchmarks, demos, tests. All compression is lossless: whoever reads the file gets the
array that was written, value by value.
"""

import datetime
import functools
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any

from numpy.typing import NDArray
from pydicom.config import RAISE
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.pixels import get_encoder
from pydicom.uid import (
    ComputedRadiographyImageStorage,
    CTImageStorage,
    DigitalMammographyXRayImageStorageForPresentation,
    DigitalXRayImageStorageForPresentation,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    MRImageStorage,
    RLELossless,
    UltrasoundImageStorage,
)
from pydicom.valuerep import validate_value

from fedmed.dicom.splice import Template
from fedmed.errors import ConfigError, require

SOP_CLASSES = {
    "CR": ComputedRadiographyImageStorage,
    "CT": CTImageStorage,
    "DX": DigitalXRayImageStorageForPresentation,
    "MG": DigitalMammographyXRayImageStorageForPresentation,
    "MR": MRImageStorage,
    "US": UltrasoundImageStorage,
}
PROJECTIONS = ("DX", "MG")
# Bits stored, by the modules of PS3.3: C.8.2.1, C.8.3.1, C.8.5.6, C.8.11.3.
DEPTHS = {"CR": (1, 16), "CT": (12, 16), "DX": (6, 16), "MG": (6, 16), "MR": (9, 16), "US": (8, 8)}
GREY = ("MONOCHROME1", "MONOCHROME2")


class Syntax(StrEnum):
    """How a file is encoded. Lossless, all of them; the lossy ones are not offered."""

    EXPLICIT = "explicit"
    IMPLICIT = "implicit"
    RLE = "rle"
    JPEG_2000 = "jpeg2000"


TRANSFER_SYNTAXES = {
    Syntax.EXPLICIT: ExplicitVRLittleEndian,
    Syntax.IMPLICIT: ImplicitVRLittleEndian,
    Syntax.RLE: RLELossless,
    Syntax.JPEG_2000: JPEG2000Lossless,
}


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
        require(self.modality in SOP_CLASSES, "modality", self.modality, " or ".join(SOP_CLASSES))
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


def dicom_bytes(pixels: NDArray[Any], facts: Facts, *, syntax: Syntax = Syntax.EXPLICIT) -> bytes:
    """The file, which reads back to exactly `pixels`.

    Args:
        pixels: (rows, columns), or (rows, columns, 3) for RGB; whole numbers that `facts.bits_stored` bits hold,
            negative ones only where the type is signed.

    Raises:
        ConfigError: pixels that do not fit `facts`.
    """
    stored = _stored(pixels, facts)
    template = _template(replace(facts, **_BLANK), syntax, stored.shape, stored.dtype.kind)
    compressed = syntax in (Syntax.RLE, Syntax.JPEG_2000)
    data = _compressed(stored, facts, syntax) if compressed else stored.tobytes()
    # Bytes at 8 bits are OB in an explicit file (PS3.5 A.2).
    vr = "OB" if compressed or facts.bits_allocated == 8 else "OW"
    padded = data + b"\0" * (len(data) % 2)
    return template.fill(_own(facts), padded, pixels_vr=vr, encapsulated=compressed)


# What differs between the files of a scanner, left out: the rest is written once.
_BLANK: dict[str, Any] = {
    "instance_uid": "2.25.1", "series_uid": "2.25.1", "study_uid": "2.25.1", "patient_id": "", "patient_name": "",
    "birth_date": None, "sex": "", "study_id": "", "study_time": datetime.datetime(2020, 1, 1),
    "series_number": 1, "instance_number": 1,
}  # fmt: skip


def _own(facts: Facts) -> dict[str, str]:
    """What is set anew in every file, by keyword."""
    date, time = f"{facts.study_time:%Y%m%d}", f"{facts.study_time:%H%M%S}"
    texts = {
        "SOPInstanceUID": facts.instance_uid, "SeriesInstanceUID": facts.series_uid,
        "StudyInstanceUID": facts.study_uid, "StudyID": facts.study_id,
        "PatientID": facts.patient_id, "PatientName": facts.patient_name, "PatientSex": facts.sex,
        "PatientBirthDate": f"{facts.birth_date:%Y%m%d}" if facts.birth_date else "",
        "SeriesNumber": str(facts.series_number), "InstanceNumber": str(facts.instance_number),
    }  # fmt: skip
    for what in ("Study", "Series", "Acquisition", "Content"):
        texts |= {f"{what}Date": date, f"{what}Time": time}
    return texts


@functools.lru_cache(maxsize=256)
def _template(facts: Facts, syntax: Syntax, shape: tuple[int, ...], kind: str) -> Template:
    dataset = Dataset()
    for add in (_patient_and_study, _equipment, _image, _of_modality):
        add(dataset, facts)
    _grid(dataset, facts, syntax, shape, kind)
    dataset.file_meta = meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = dataset.SOPClassUID
    meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
    meta.TransferSyntaxUID = TRANSFER_SYNTAXES[syntax]
    return Template.of(dataset)


def _stored(pixels: NDArray[Any], facts: Facts) -> NDArray[Any]:
    """The array in the type in which it is stored."""
    shape = pixels.shape
    colour = facts.photometric == "RGB"
    fits = (
        len(shape) == 2 + colour and (not colour or shape[2] == 3) and min(shape) > 0 and max(shape) < 2**16
    )
    require(fits, "pixels.shape", shape, "(rows, columns, 3)" if colour else "(rows, columns)")
    require(pixels.dtype.kind in "iu", "pixels.dtype", pixels.dtype, "whole numbers")
    signed = pixels.dtype.kind == "i"
    unsigned = facts.modality in (*PROJECTIONS, "US")
    require(
        not (signed and unsigned), "pixels.dtype", pixels.dtype, f"unsigned, with modality={facts.modality}"
    )
    high = 2 ** (facts.bits_stored - signed)
    low = -high if signed else 0
    # The values themselves may be anybody's: the message holds the range only.
    ok = low <= int(pixels.min()) and int(pixels.max()) < high
    require(ok, "pixels", "beyond range", f"{low} to {high - 1} with bits_stored={facts.bits_stored}")
    return pixels.astype(f"<{'i' if signed else 'u'}{facts.bits_allocated // 8}", order="C", copy=False)


def _patient_and_study(dataset: Dataset, facts: Facts) -> None:
    dataset.SpecificCharacterSet = "ISO_IR 192"
    for keyword, text in _own(facts).items():
        setattr(dataset, keyword, text)
    dataset.AccessionNumber = dataset.ReferringPhysicianName = ""
    dataset.Modality = facts.modality


def _equipment(dataset: Dataset, facts: Facts) -> None:
    dataset.Manufacturer = facts.manufacturer
    if facts.model:
        dataset.ManufacturerModelName = facts.model
    if facts.institution:
        dataset.InstitutionName = facts.institution


def _image(dataset: Dataset, facts: Facts) -> None:
    dataset.SOPClassUID = SOP_CLASSES[facts.modality]
    dataset.SOPInstanceUID = facts.instance_uid
    dataset.ImageType = ["ORIGINAL", "PRIMARY"]
    dataset.BurnedInAnnotation = "NO"
    dataset.LossyImageCompression = "00"
    dataset.BodyPartExamined = facts.body_part
    if facts.comment:
        dataset.ImageComments = facts.comment
    if facts.window is not None and facts.photometric in GREY:
        dataset.WindowCenter, dataset.WindowWidth = map(_decimal, facts.window)
    if facts.modality in ("CR", "CT", "MR") and (facts.modality == "CT" or not facts.plain):
        dataset.RescaleSlope, dataset.RescaleIntercept = _decimal(facts.slope), _decimal(facts.intercept)
        dataset.RescaleType = "HU" if facts.modality == "CT" else "US"
    if facts.modality != "US":
        dataset.PixelSpacing = [_decimal(value) for value in facts.pixel_spacing]


def _of_modality(dataset: Dataset, facts: Facts) -> None:
    """What the module of the modality asks for (PS3.3 A.2 to A.26)."""
    if facts.modality in PROJECTIONS:
        _projection(dataset, facts)
    elif facts.modality == "CR":
        dataset.ViewPosition = "PA"
        dataset.PatientOrientation = ["L", "F"]
    elif facts.modality == "US":
        dataset.PatientOrientation = ""
    else:
        _slice(dataset, facts)


def _projection(dataset: Dataset, facts: Facts) -> None:
    breast = facts.modality == "MG"
    dataset.PresentationIntentType = "FOR PRESENTATION"
    dataset.ImageType = ["ORIGINAL", "PRIMARY", ""]
    dataset.ImagerPixelSpacing = dataset.PixelSpacing
    dataset.PixelSpacingCalibrationType = "GEOMETRY"
    dataset.PixelSpacingCalibrationDescription = "made up"
    dataset.DetectorType = "DIRECT"
    dataset.PixelIntensityRelationship = "LOG"
    inverse = facts.photometric == "MONOCHROME1"
    dataset.PixelIntensityRelationshipSign = 1 if inverse else -1
    dataset.RescaleSlope, dataset.RescaleIntercept, dataset.RescaleType = "1", "0", "US"
    dataset.PresentationLUTShape = "INVERSE" if inverse else "IDENTITY"
    dataset.PatientOrientation = ["A", "F"] if breast else ["L", "F"]
    dataset.ImageLaterality = "L" if breast else "U"
    dataset.AnatomicRegionSequence = [_code("76752008", "Breast") if breast else _code("51185008", "Chest")]
    view = _code("399368009", "medio-lateral oblique") if breast else _code("399348003", "postero-anterior")
    if breast:
        dataset.BodyPartExamined = "BREAST"
        dataset.OrganExposed = "BREAST"
        dataset.BreastImplantPresent = "NO"
        view.ViewModifierCodeSequence = []
    else:
        dataset.ViewPosition = "PA"
    dataset.PositionerType = "MAMMOGRAPHIC" if breast else ""
    dataset.ViewCodeSequence = [view]
    dataset.AcquisitionContextSequence = []


def _slice(dataset: Dataset, facts: Facts) -> None:
    require(bool(facts.frame_of_reference_uid), "frame_of_reference_uid", "''", "a UID, for CT and MR")
    dataset.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL" if facts.modality == "CT" else "OTHER"]
    dataset.FrameOfReferenceUID = facts.frame_of_reference_uid
    dataset.PositionReferenceIndicator = ""
    dataset.PatientPosition = "HFS"
    dataset.ImagePositionPatient = [_decimal(value) for value in facts.position]
    dataset.ImageOrientationPatient = ["1", "0", "0", "0", "1", "0"]
    dataset.SliceThickness = _decimal(facts.thickness)
    dataset.AcquisitionNumber = 1
    if facts.modality == "CT":
        dataset.KVP = "120"
    else:
        dataset.ScanningSequence, dataset.SequenceVariant, dataset.ScanOptions = "SE", "NONE", ""
        dataset.MRAcquisitionType, dataset.EchoTime, dataset.EchoTrainLength = "2D", "20", "1"
        dataset.RepetitionTime = "500"


def _code(value: str, meaning: str) -> Dataset:
    item = Dataset()
    item.CodeValue, item.CodingSchemeDesignator, item.CodeMeaning = value, "SCT", meaning
    return item


def _grid(dataset: Dataset, facts: Facts, syntax: Syntax, shape: tuple[int, ...], kind: str) -> None:
    dataset.SamplesPerPixel = 3 if len(shape) == 3 else 1
    if len(shape) == 3:
        dataset.PlanarConfiguration = 0
    dataset.PhotometricInterpretation = _photometric(facts, syntax)
    dataset.Rows, dataset.Columns = shape[:2]
    dataset.BitsAllocated, dataset.BitsStored = facts.bits_allocated, facts.bits_stored
    dataset.HighBit = facts.bits_stored - 1
    dataset.PixelRepresentation = int(kind == "i")


def _photometric(facts: Facts, syntax: Syntax) -> str:
    """JPEG 2000 keeps colour as luminance and differences, without loss (PS3.5 8.2.4)."""
    reversible = facts.photometric == "RGB" and syntax == Syntax.JPEG_2000
    return "YBR_RCT" if reversible else facts.photometric


# The encoder halves every image five times.
JPEG_2000_SIDE = 32


def _compressed(stored: NDArray[Any], facts: Facts, syntax: Syntax) -> bytes:
    small = syntax == Syntax.JPEG_2000 and min(stored.shape[:2]) < JPEG_2000_SIDE
    require(
        not small, "pixels.shape", stored.shape, f"at least {JPEG_2000_SIDE} rows and columns for JPEG 2000"
    )
    frame = get_encoder(TRANSFER_SYNTAXES[syntax]).encode(
        stored, rows=stored.shape[0], columns=stored.shape[1], samples_per_pixel=3 if stored.ndim == 3 else 1,
        number_of_frames=1, bits_allocated=facts.bits_allocated, bits_stored=facts.bits_stored,
        pixel_representation=int(stored.dtype.kind == "i"), photometric_interpretation=_photometric(facts, syntax),
        planar_configuration=0, encoding_plugin="pylibjpeg",
    )  # fmt: skip
    return encapsulate([frame], has_bot=False)


def _decimal(value: float) -> str:
    """A decimal string: at most 16 characters (PS3.5 6.2)."""
    return f"{value:.10g}"
