"""One image and the facts about it become one valid DICOM file.

Made for made-up patients: benchmarks, demos, tests. All compression is lossless: whoever reads the file gets the
array that was written, value by value.
"""

import datetime
import io
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.filewriter import dcmwrite
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

from fedmed.errors import require

SOP_CLASSES = {
    "CR": ComputedRadiographyImageStorage,
    "CT": CTImageStorage,
    "DX": DigitalXRayImageStorageForPresentation,
    "MG": DigitalMammographyXRayImageStorageForPresentation,
    "MR": MRImageStorage,
    "US": UltrasoundImageStorage,
}
# Whose only photometric interpretations are those of grey values that an X-ray left.
PROJECTIONS = ("DX", "MG")
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
    # DX and MG have none (PS3.3 C.8.11.3.1.2), and neither has colour.
    slope: float = 1.0
    intercept: float = 0.0
    # Of a CT or MR slice, in mm: the centre of its first pixel, and its thickness.
    position: tuple[float, float, float] = (0.0, 0.0, 0.0)
    thickness: float = 1.0

    def __post_init__(self) -> None:
        require(self.modality in SOP_CLASSES, "modality", self.modality, " or ".join(SOP_CLASSES))
        grey = self.modality != "US" or self.photometric in GREY
        require(
            self.photometric in GREY or (self.photometric == "RGB" and not grey),
            "photometric", self.photometric, "MONOCHROME1 or MONOCHROME2, or RGB with modality=US",
        )  # fmt: skip
        # PS3.3: CT and DX list their depths; 8 bits and less fill a byte.
        low = 12 if self.modality == "CT" else 6 if self.modality in PROJECTIONS else 1
        high = 8 if self.photometric == "RGB" else 16
        require(low <= self.bits_stored <= high, "bits_stored", self.bits_stored, f"{low} to {high}")
        plain = (self.slope, self.intercept) == (1.0, 0.0)
        require(
            plain or self.modality in ("CR", "CT", "MR"), "slope/intercept", (self.slope, self.intercept),
            f"1 and 0 with modality={self.modality}",
        )  # fmt: skip

    @property
    def bits_allocated(self) -> int:
        """8 or 16."""
        return 8 if self.bits_stored <= 8 else 16


def dicom_bytes(pixels: NDArray[Any], facts: Facts, *, syntax: Syntax = Syntax.EXPLICIT) -> bytes:
    """The file, which reads back to exactly `pixels`.

    Args:
        pixels: (rows, columns), or (rows, columns, 3) for RGB; whole numbers that `facts.bits_stored` bits hold,
            negative ones only where the type is signed.

    Raises:
        ConfigError: pixels that do not fit `facts`.
    """
    stored = _stored(pixels, facts)
    dataset = Dataset()
    for add in (_patient, _study, _equipment, _image, _of_modality):
        add(dataset, facts)
    _pixels(dataset, stored, facts, syntax)
    dataset.file_meta = meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = dataset.SOPClassUID
    meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
    meta.TransferSyntaxUID = TRANSFER_SYNTAXES[syntax]
    buffer = io.BytesIO()
    dcmwrite(buffer, dataset, enforce_file_format=True)
    return buffer.getvalue()


def _stored(pixels: NDArray[Any], facts: Facts) -> NDArray[Any]:
    """The array in the type in which it is stored."""
    shape = pixels.shape
    colour = facts.photometric == "RGB"
    fits = len(shape) == 2 + colour and (not colour or shape[2] == 3) and 0 < min(shape) and max(shape) < 2**16
    require(fits, "pixels.shape", shape, "(rows, columns, 3)" if colour else "(rows, columns)")
    require(pixels.dtype.kind in "iu", "pixels.dtype", pixels.dtype, "whole numbers")
    signed = pixels.dtype.kind == "i"
    require(not (signed and colour), "pixels.dtype", pixels.dtype, "unsigned, for RGB")
    require(
        not (signed and facts.modality in PROJECTIONS), "pixels.dtype", pixels.dtype,
        f"unsigned, with modality={facts.modality}",
    )  # fmt: skip
    high = 2 ** (facts.bits_stored - signed)
    low = -high if signed else 0
    # The values themselves may be anybody's: the message holds the range only.
    ok = low <= int(pixels.min()) and int(pixels.max()) < high
    require(ok, "pixels", "beyond range", f"{low} to {high - 1} with bits_stored={facts.bits_stored}")
    return pixels.astype(f"<{'i' if signed else 'u'}{facts.bits_allocated // 8}", order="C", copy=False)


def _patient(dataset: Dataset, facts: Facts) -> None:
    dataset.PatientName = facts.patient_name
    dataset.PatientID = facts.patient_id
    dataset.PatientBirthDate = f"{facts.birth_date:%Y%m%d}" if facts.birth_date else ""
    dataset.PatientSex = facts.sex


def _study(dataset: Dataset, facts: Facts) -> None:
    date, time = f"{facts.study_time:%Y%m%d}", f"{facts.study_time:%H%M%S}"
    dataset.SpecificCharacterSet = "ISO_IR 192"
    dataset.StudyInstanceUID = facts.study_uid
    dataset.StudyID = facts.study_id
    dataset.StudyDate = dataset.SeriesDate = dataset.AcquisitionDate = dataset.ContentDate = date
    dataset.StudyTime = dataset.SeriesTime = dataset.AcquisitionTime = dataset.ContentTime = time
    dataset.AccessionNumber = dataset.ReferringPhysicianName = ""
    dataset.Modality = facts.modality
    dataset.SeriesInstanceUID = facts.series_uid
    dataset.SeriesNumber = facts.series_number
    dataset.InstanceNumber = facts.instance_number


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
    if facts.window is not None:
        dataset.WindowCenter, dataset.WindowWidth = map(_decimal, facts.window)
    if facts.modality in ("CR", "CT", "MR"):
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
        dataset.ImageType = ["ORIGINAL", "PRIMARY", "", "0001"]
        dataset.PatientOrientation = ""
    else:
        _slice(dataset, facts)


def _projection(dataset: Dataset, facts: Facts) -> None:
    breast = facts.modality == "MG"
    dataset.PresentationIntentType = "FOR PRESENTATION"
    dataset.ImageType = ["ORIGINAL", "PRIMARY", ""]
    dataset.ImagerPixelSpacing = dataset.PixelSpacing
    dataset.PixelSpacingCalibrationType = "GEOMETRY"
    dataset.DetectorType = "DIRECT"
    dataset.PixelIntensityRelationship = "LOG"
    inverse = facts.photometric == "MONOCHROME1"
    dataset.PixelIntensityRelationshipSign = 1 if inverse else -1
    dataset.RescaleSlope, dataset.RescaleIntercept, dataset.RescaleType = "1", "0", "US"
    dataset.PresentationLUTShape = "INVERSE" if inverse else "IDENTITY"
    dataset.PatientOrientation = ["A", "F"] if breast else ["L", "F"]
    dataset.ViewPosition = "MLO" if breast else "PA"
    dataset.ImageLaterality = "L" if breast else "U"
    dataset.AnatomicRegionSequence = [_code("76752008", "Breast") if breast else _code("51185008", "Chest")]
    view = _code("399368009", "medio-lateral oblique") if breast else _code("399348003", "postero-anterior")
    if breast:
        dataset.BodyPartExamined = "BREAST"
        dataset.OrganExposed = "BREAST"
        dataset.PositionerType = "MAMMOGRAPHIC"
        dataset.BreastImplantPresent = "NO"
        view.ViewModifierCodeSequence = []
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


def _pixels(dataset: Dataset, stored: NDArray[Any], facts: Facts, syntax: Syntax) -> None:
    colour = stored.ndim == 3
    dataset.SamplesPerPixel = 3 if colour else 1
    if colour:
        dataset.PlanarConfiguration = 0
    dataset.PhotometricInterpretation = facts.photometric
    dataset.Rows, dataset.Columns = stored.shape[:2]
    dataset.BitsAllocated, dataset.BitsStored = facts.bits_allocated, facts.bits_stored
    dataset.HighBit = facts.bits_stored - 1
    dataset.PixelRepresentation = int(stored.dtype.kind == "i")
    compressed = syntax in (Syntax.RLE, Syntax.JPEG_2000)
    data = _compressed(stored, facts, syntax) if compressed else stored.tobytes()
    dataset.PixelData = data + b"\0" * (len(data) % 2)
    # Bytes at 8 bits are OB in an explicit file; an implicit one always means OW (PS3.5 A.1, A.2).
    native = "OW" if facts.bits_allocated == 16 or syntax == Syntax.IMPLICIT else "OB"
    dataset["PixelData"].VR = "OB" if compressed else native


def _compressed(stored: NDArray[Any], facts: Facts, syntax: Syntax) -> bytes:
    frame = get_encoder(TRANSFER_SYNTAXES[syntax]).encode(
        stored, rows=stored.shape[0], columns=stored.shape[1], samples_per_pixel=3 if stored.ndim == 3 else 1,
        number_of_frames=1, bits_allocated=facts.bits_allocated, bits_stored=facts.bits_stored,
        pixel_representation=int(stored.dtype.kind == "i"), photometric_interpretation=facts.photometric,
        planar_configuration=0, encoding_plugin="pylibjpeg",
    )  # fmt: skip
    return encapsulate([frame], has_bot=False)


def _decimal(value: float) -> str:
    """A decimal string: at most 16 characters (PS3.5 6.2)."""
    return f"{value:.10g}"
