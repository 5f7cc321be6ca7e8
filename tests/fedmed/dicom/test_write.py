"""A written file is valid, and reads back to what was written."""

import datetime
import io
import itertools
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import pydicom
import pytest
from numpy.typing import NDArray
from pydicom import config
from pydicom.filewriter import dcmwrite

from fedmed.dicom.synthetic.facts import DEPTHS, PROJECTIONS, Facts
from fedmed.dicom.synthetic.write import TRANSFER_SYNTAXES, Syntax, dicom_bytes
from fedmed.errors import ConfigError

UIDS = {
    "instance_uid": "2.25.1", "series_uid": "2.25.22", "study_uid": "2.25.3", "frame_of_reference_uid": "2.25.44",
}  # fmt: skip
KNOWN: dict[str, Any] = UIDS | {
    "patient_id": "0012", "patient_name": "Sørli^Nora", "birth_date": datetime.date(1950, 2, 1), "sex": "F",
    "study_id": "17", "study_time": datetime.datetime(2019, 12, 31, 23, 59), "instance_number": 3,
    "manufacturer": "Aster", "model": "Lumen", "institution": "Northside", "window": (128.0, 256.0),
    "pixel_spacing": (0.5, 1 / 3),
}  # fmt: skip


@pytest.fixture(autouse=True)
def _strict(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """pydicom refuses what it would only warn of."""
    monkeypatch.setattr(config.settings, "reading_validation_mode", config.RAISE)
    monkeypatch.setattr(config.settings, "writing_validation_mode", config.RAISE)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # Of objects of earlier tests that Python happens to free now.
        warnings.simplefilter("ignore", ResourceWarning)
        yield


def kinds() -> list[tuple[str, int, str, str]]:
    """Every modality with its depths, photometric interpretations, and whether values have a sign."""
    found = []
    for modality, (low, high) in DEPTHS.items():
        photometrics = ("MONOCHROME2", "RGB") if modality == "US" else ("MONOCHROME1", "MONOCHROME2")
        signs = "u" if modality in (*PROJECTIONS, "US") else "ui"
        depths = sorted(
            {bits for bits in (low, 8, 10, 12, 14, 16, high) if low <= bits <= high and bits >= 6}
        )
        found += list(itertools.product([modality], depths, photometrics, signs))
    return found


def pixels(facts: Facts, sign: str, shape: tuple[int, int] = (35, 33)) -> NDArray[Any]:
    """Random values from the least to the greatest; an odd number of bytes where a pixel has one."""
    low = -(2 ** (facts.bits_stored - 1)) if sign == "i" else 0
    high = low + 2**facts.bits_stored
    whole = (*shape, 3) if facts.photometric == "RGB" else shape
    values = np.random.default_rng(0).integers(low, high, whole)
    values.flat[:2] = low, high - 1
    return values.astype(f"{sign}{facts.bits_allocated // 8}")


def test_many_kinds_are_tried() -> None:
    assert len(kinds()) > 40
    assert {kind[0] for kind in kinds()} == {"CR", "CT", "DX", "MG", "MR", "US"}


@pytest.mark.parametrize("syntax", Syntax)
def test_a_file_reads_back_to_exactly_the_array(syntax: Syntax) -> None:
    for modality, bits, photometric, sign in kinds():
        facts = Facts(**KNOWN, modality=modality, bits_stored=bits, photometric=photometric)
        array = pixels(facts, sign)
        written = dicom_bytes(array, facts, syntax=syntax)
        read = pydicom.dcmread(io.BytesIO(written))
        assert read.file_meta.TransferSyntaxUID == TRANSFER_SYNTAXES[syntax]
        assert read.pixel_array.dtype == array.dtype
        np.testing.assert_array_equal(read.pixel_array, array)
        # Each value is what its kind allows.
        assert len([element.value for element in read.iterall()]) > 40
        # pydicom, which here wrote the template alone, writes the same of the whole.
        again = io.BytesIO()
        dcmwrite(again, read, enforce_file_format=True)
        assert again.getvalue() == written, (modality, bits, photometric, sign)


@pytest.mark.parametrize("syntax", Syntax)
def test_a_file_says_what_it_was_given(syntax: Syntax) -> None:
    facts = Facts(**KNOWN, bits_stored=12)
    # The second file of a kind comes from the first one's template.
    dicom_bytes(pixels(facts, "u"), Facts(**UIDS, patient_id="other", bits_stored=12), syntax=syntax)
    read = pydicom.dcmread(io.BytesIO(dicom_bytes(pixels(facts, "u"), facts, syntax=syntax)))
    assert (read.PatientID, str(read.PatientName), read.PatientBirthDate) == (
        "0012",
        "Sørli^Nora",
        "19500201",
    )
    assert (read.PatientSex, read.StudyID, read.InstanceNumber) == ("F", "17", 3)
    assert (read.SOPInstanceUID, read.SeriesInstanceUID, read.StudyInstanceUID) == (
        "2.25.1",
        "2.25.22",
        "2.25.3",
    )
    assert read.file_meta.MediaStorageSOPInstanceUID == "2.25.1"
    assert (read.StudyDate, read.AcquisitionDate, read.ContentTime) == ("20191231", "20191231", "235900")
    assert (read.Manufacturer, read.ManufacturerModelName) == ("Aster", "Lumen")
    assert read.InstitutionName == "Northside"
    assert (read.WindowCenter, read.WindowWidth) == (128, 256)
    assert (read.BitsAllocated, read.BitsStored, read.HighBit) == (16, 12, 11)
    assert [float(value) for value in read.PixelSpacing] == pytest.approx([0.5, 1 / 3])
    assert (read.Modality, read.LossyImageCompression, read.BurnedInAnnotation) == ("DX", "00", "NO")


def test_slope_and_intercept_are_those_of_the_file() -> None:
    facts = Facts(
        **KNOWN, modality="CT", bits_stored=12, slope=0.5, intercept=-1024.0, position=(1.5, -2.0, 30.25)
    )
    read = pydicom.dcmread(io.BytesIO(dicom_bytes(pixels(facts, "u"), facts)))
    assert (float(read.RescaleSlope), float(read.RescaleIntercept)) == (0.5, -1024)
    assert [float(value) for value in read.ImagePositionPatient] == [1.5, -2.0, 30.25]


def test_monochrome1_says_that_its_display_is_inverse() -> None:
    for photometric, shape in (("MONOCHROME1", "INVERSE"), ("MONOCHROME2", "IDENTITY")):
        facts = Facts(**KNOWN, photometric=photometric)
        read = pydicom.dcmread(io.BytesIO(dicom_bytes(pixels(facts, "u"), facts)))
        assert (read.PhotometricInterpretation, read.PresentationLUTShape) == (photometric, shape)


def test_equal_arguments_make_equal_bytes() -> None:
    facts = Facts(**KNOWN)
    for syntax in Syntax:
        one, two = (dicom_bytes(pixels(facts, "u"), facts, syntax=syntax) for _ in range(2))
        assert one == two


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"modality": "XX"}, "modality=XX: expected CR or "),
        ({"modality": "CT", "bits_stored": 8}, "bits_stored=8: expected 12 to 16"),
        ({"modality": "US", "bits_stored": 12}, "bits_stored=12: expected 8 to 8"),
        ({"photometric": "RGB"}, "photometric=RGB: expected MONOCHROME1 or MONOCHROME2"),
        ({"slope": 2.0}, "expected 1 and 0 with modality=DX"),
        ({"patient_id": "x" * 65}, "patient_id: expected a value of the kind LO"),
        ({"patient_name": "x" * 65}, "patient_name: expected a value of the kind PN"),
        ({"study_uid": "2.25.x"}, "study_uid: expected a value of the kind UI"),
        ({"sex": "female"}, "sex: expected a value of the kind CS"),
    ],
)  # fmt: skip
def test_what_the_standard_does_not_allow_is_refused(values: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError) as raised:
        Facts(**KNOWN | values)
    assert says in str(raised.value)
    assert "xxx" not in str(raised.value)


@pytest.mark.parametrize(
    ("array", "values", "says"),
    [
        (np.zeros((4, 4, 3), np.uint8), {}, "expected (rows, columns)"),
        (np.zeros((4, 4), np.uint8), {"modality": "US", "photometric": "RGB"}, "expected (rows, columns, 3)"),
        (np.zeros((0, 4), np.uint8), {}, "expected (rows, columns)"),
        (np.zeros((4, 4)), {}, "pixels.dtype=float64: expected whole numbers"),
        (np.zeros((4, 4), np.int8), {}, "expected unsigned, with modality=DX"),
        (np.full((4, 4), 256, np.uint16), {}, "expected 0 to 255 with bits_stored=8"),
        (np.full((4, 4), -9, np.int16), {"modality": "CR", "bits_stored": 4}, "expected -8 to 7"),
        (np.zeros((4, 4), np.int16), {"modality": "CT", "bits_stored": 12, "frame_of_reference_uid": ""}, "a UID"),
    ],
)  # fmt: skip
def test_pixels_that_do_not_fit_are_refused(array: NDArray[Any], values: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError) as raised:
        dicom_bytes(array, Facts(**KNOWN | values))
    assert says in str(raised.value)


def test_jpeg_2000_needs_32_rows_and_columns() -> None:
    with pytest.raises(ConfigError, match="at least 32 rows and columns for JPEG 2000"):
        dicom_bytes(np.zeros((31, 64), np.uint8), Facts(**KNOWN), syntax=Syntax.JPEG_2000)
    assert dicom_bytes(np.zeros((32, 32), np.uint8), Facts(**KNOWN), syntax=Syntax.JPEG_2000)
