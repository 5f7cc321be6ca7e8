"""Pictures that may have text in them are refused, or blanked where the text stands."""

from typing import Any

import numpy as np
import pytest
from pydicom import Dataset, Sequence, dcmread
from pydicom.data import get_testdata_file
from pydicom.encaps import encapsulate
from pydicom.pixels import pixel_array
from pydicom.uid import ExplicitVRLittleEndian, RLELossless

from fedmed.dicom.deid.burned_in import KnownRegion, Verdict, blank, burned_in
from fedmed.dicom.deid.deidentify import DeidentifyOptions
from fedmed.dicom.reasons import Quarantined
from tests.fedmed.dicom.deidentification import deidentified, instance, read, written


def region(left: int, top: int, right: int, bottom: int, spatial_format: int = 1) -> Dataset:
    item = Dataset()
    item.RegionSpatialFormat = spatial_format
    item.RegionLocationMinX0, item.RegionLocationMinY0 = left, top
    item.RegionLocationMaxX1, item.RegionLocationMaxY1 = right, bottom
    return item


def ultrasound(
    *regions: Dataset, values: Any = None, photometric: str = "MONOCHROME2", **attributes: Any
) -> Dataset:
    dataset = instance(Modality="US", SequenceOfUltrasoundRegions=Sequence(regions), **attributes)
    if values is None:
        values = np.full((8, 10), 200, np.uint8)
    dataset.set_pixel_data(values, photometric, values.dtype.itemsize * 8, generate_instance_uid=False)
    return dataset


@pytest.mark.parametrize(
    ("attributes", "verdict"),
    [
        ({}, "unlikely"),
        ({"Modality": "MR"}, "unlikely"),
        ({"BurnedInAnnotation": "NO"}, "declared_free"),
        ({"BurnedInAnnotation": "NO", "Modality": "US"}, "declared_free"),
        ({"BurnedInAnnotation": "YES"}, "declared"),
        ({"BurnedInAnnotation": "yes "}, "declared"),
        ({"Modality": "US"}, "likely"),
        ({"Modality": ""}, "likely"),
        ({"Modality": "XC"}, "likely"),
        ({"SOPClassUID": "1.2.840.10008.5.1.4.1.1.7"}, "likely"),
        ({"SOPClassUID": "1.2.840.10008.5.1.4.1.1.7.4"}, "likely"),
        ({"ConversionType": "SD"}, "likely"),
        ({"ImageType": ["DERIVED", "SECONDARY"], "Modality": "NM"}, "likely"),
        # A reformatted slice, a processed picture.
        ({"ImageType": ["DERIVED", "SECONDARY"]}, "unlikely"),
        ({"ImageType": ["DERIVED", "PRIMARY"]}, "unlikely"),
        ({"ImageType": ["DERIVED", "PRIMARY", "SCREEN SAVE"], "BurnedInAnnotation": "NO"}, "likely"),
        ({"SequenceOfUltrasoundRegions": Sequence([region(0, 0, 1, 1)])}, "likely"),
    ],
)
def test_the_verdict(attributes: dict[str, Any], verdict: str) -> None:
    found = burned_in(instance(**attributes))
    assert found == verdict
    if found.suspect:
        with pytest.raises(Quarantined, match="burned-in-text"):
            deidentified(instance(**attributes))
    else:
        assert deidentified(instance(**attributes)).get("BurnedInAnnotation") == attributes.get(
            "BurnedInAnnotation"
        )


def test_a_file_without_pixels_has_no_text_in_them() -> None:
    assert burned_in(Dataset()) is Verdict.DECLARED_FREE


@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2", "RGB"])
@pytest.mark.parametrize("frames", [1, 3])
def test_masking_keeps_the_region_and_nothing_else(photometric: str, frames: int) -> None:
    shape = ((frames,) if frames > 1 else ()) + (8, 10) + ((3,) if photometric == "RGB" else ())
    values = np.random.default_rng(0).integers(1, 255, shape).astype(np.uint8)
    dataset = ultrasound(region(2, 1, 6, 5), values=values, photometric=photometric, BurnedInAnnotation="YES")
    result = read(written(deidentified(dataset, burned_in="mask")))
    inside = np.zeros((8, 10), bool)
    inside[1:6, 2:7] = True
    places = (slice(None), inside) if frames > 1 else inside
    outside = (slice(None), ~inside) if frames > 1 else ~inside
    np.testing.assert_array_equal(result.pixel_array[places], values[places])
    assert set(result.pixel_array[outside].ravel()) == {255 if photometric == "MONOCHROME1" else 0}
    assert result.BurnedInAnnotation == "NO"
    assert [item.CodeValue for item in result.DeidentificationMethodCodeSequence] == ["113100", "113101"]
    assert result.file_meta.TransferSyntaxUID == ExplicitVRLittleEndian
    np.testing.assert_array_equal(pixel_array(dataset), values)


def test_masking_of_compressed_colours() -> None:
    """A JPEG in YBR is stored as RGB that looks the same."""
    dataset = dcmread(str(get_testdata_file("SC_rgb_jpeg_lossy_gdcm.dcm")))
    dataset.PatientID = "p"
    dataset.SequenceOfUltrasoundRegions = Sequence([region(10, 10, 60, 60)])
    before = dataset.pixel_array
    result = read(written(deidentified(dataset, burned_in="mask")))
    assert result.PhotometricInterpretation == "RGB"
    np.testing.assert_array_equal(result.pixel_array[10:61, 10:61], before[10:61, 10:61])
    assert not result.pixel_array[61:].any()
    assert result.LossyImageCompression == dataset.LossyImageCompression


def test_signed_pixels_become_the_smallest_value() -> None:
    values = np.full((8, 10), 7, np.int16)
    dataset = ultrasound(region(0, 0, 3, 3), values=values)
    assert set(deidentified(dataset, burned_in="mask").pixel_array.ravel()) == {7, -(1 << 15)}


@pytest.mark.parametrize(
    "regions",
    [
        [],
        [region(0, 0, 9, 7)],
        [region(0, 0, 500, 500)],
        [region(2, 2, 5, 5, spatial_format=5)],
        [region(5, 5, 2, 2)],
    ],
    ids=["none", "the whole picture", "beyond it", "graphics", "inside out"],
)
def test_refused_where_masking_would_blank_nothing(regions: list[Dataset]) -> None:
    with pytest.raises(Quarantined, match="burned-in-text"):
        deidentified(ultrasound(*regions, BurnedInAnnotation="YES"), burned_in="mask")


def test_regions_of_a_known_device() -> None:
    known = KnownRegion(
        manufacturer="ACME", model="One", modality="CT", rows=4, columns=4, top=0, left=0, bottom=1, right=4
    )
    options = {"burned_in": "mask", "known_regions": (known,)}
    device = {"Manufacturer": "ACME ", "ManufacturerModelName": "One"}
    result = deidentified(instance(BurnedInAnnotation="NO", **device), **options)
    np.testing.assert_array_equal(result.pixel_array[0], 0)
    np.testing.assert_array_equal(result.pixel_array[1:], instance().pixel_array[1:])
    other = deidentified(instance(Manufacturer="ACME", ManufacturerModelName="Two"), **options)
    np.testing.assert_array_equal(other.pixel_array, instance().pixel_array)
    with pytest.raises(Quarantined, match="burned-in-text"):
        deidentified(instance(**device), known_regions=(known,))
    assert blank(instance(), [known]) is None
    assert DeidentifyOptions(known_regions=(known,)).burned_in == "refuse"


def test_a_region_outside_the_picture_is_named() -> None:
    with pytest.raises(ValueError, match="expected a rectangle within 4 rows and 4 columns"):
        KnownRegion(
            manufacturer="", model="", modality="", rows=4, columns=4, top=2, left=0, bottom=9, right=4
        )


def test_pixels_that_cannot_be_decoded_are_not_masked() -> None:
    dataset = ultrasound(region(0, 0, 3, 3), PixelRepresentation=0)
    dataset.PixelData = encapsulate([b"\1\0\0\0\x40\0\0\0" + bytes(60)])
    dataset.file_meta.TransferSyntaxUID = RLELossless
    with pytest.raises(Quarantined, match="unreadable"):
        deidentified(dataset, burned_in="mask")
