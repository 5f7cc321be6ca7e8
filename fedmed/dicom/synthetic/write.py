"""One image and the facts about it become one valid DICOM file.

Made for made-up patients: benchmarks, demos, tests. All compression is lossless: whoever reads the file gets the
array that was written, value by value.
"""

import datetime
import functools
from dataclasses import replace
from enum import StrEnum
from typing import Any

from numpy.typing import NDArray
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

from fedmed.dicom.synthetic.facts import GREY, PROJECTIONS, Facts
from fedmed.dicom.synthetic.splice import Template
from fedmed.errors import require

SOP_CLASSES = {
    "CR": ComputedRadiographyImageStorage,
    "CT": CTImageStorage,
    "DX": DigitalXRayImageStorageForPresentation,
    "MG": DigitalMammographyXRayImageStorageForPresentation,
    "MR": MRImageStorage,
    "US": UltrasoundImageStorage,
}


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
