"""Pixel Data afterwards holds the same pixels, and nothing else."""

import io
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pydicom import Dataset, dcmread
from pydicom.data import get_testdata_file
from pydicom.encaps import encapsulate, generate_frames
from pydicom.uid import MPEG2MPML, ExplicitVRBigEndian, ExplicitVRLittleEndian, JPEGBaseline8Bit

from fedmed.dicom.deid.pixel_data import clean, j2k_frame, jpeg_frame, rle_frame
from fedmed.dicom.reasons import Quarantined
from tests.fedmed.dicom.deidentification import CANARY, instance

WORDS = CANARY.encode()


def jpeg(**options: Any) -> bytes:
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 60, 3), np.uint8))
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", **options)
    return buffer.getvalue()


def picture(stream: bytes) -> np.ndarray[Any, Any]:
    return np.asarray(Image.open(io.BytesIO(stream)))


@pytest.mark.parametrize("progressive", [False, True])
def test_jpeg_loses_what_is_not_the_picture(progressive: bool) -> None:
    exif = Image.Exif()
    exif[0x010E] = CANARY
    stream = jpeg(comment=WORDS, exif=exif, progressive=progressive, restart_marker_rows=1) + WORDS
    # A thumbnail's place, filled with words, in the segment that says how colours are coded.
    jfif = (
        b"\xff\xe0" + (16 + len(WORDS)).to_bytes(2, "big") + b"JFIF\0\x01\x02\0\0\x01\0\x01\x03\x01" + WORDS
    )
    stream = stream[:2] + jfif + stream[2:]
    assert stream.count(WORDS) == 4
    result = jpeg_frame(stream)
    assert WORDS not in result
    np.testing.assert_array_equal(picture(result), picture(stream))


def test_a_damaged_jpeg_is_refused() -> None:
    for stream in (b"", b"GIF89a", jpeg()[:200], jpeg()[:2] + b"\xff\xe0\0\0"):
        with pytest.raises(Quarantined, match="unreadable"):
            jpeg_frame(stream)


def test_a_jpeg_without_its_end_gets_one() -> None:
    np.testing.assert_array_equal(picture(jpeg_frame(jpeg()[:-2])), picture(jpeg()))


@pytest.mark.parametrize("name", ["JPEG2000.dcm", "693_J2KR.dcm", "GDCMJ2K_TextGBR.dcm"])
def test_jpeg_2000_loses_what_is_not_the_picture(name: str) -> None:
    dataset = dcmread(str(get_testdata_file(name)))
    before = dataset.pixel_array
    frame = next(generate_frames(dataset.PixelData, number_of_frames=1))
    comment = b"\xff\x64" + (len(WORDS) + 4).to_bytes(2, "big") + b"\0\x01" + WORDS
    place = frame.index(b"\xff\x52")  # After the size, before the coding style.
    tile = frame.index(b"\xff\x90")
    length = int.from_bytes(frame[tile + 6 : tile + 10], "big")
    longer = (length + len(comment) if length else 0).to_bytes(4, "big")
    part = frame[tile : tile + 6] + longer + frame[tile + 10 : tile + 12] + comment + frame[tile + 12 :]
    dirty = b"\0\0\0\x0cjP  " + WORDS + frame[:place] + comment + frame[place:tile] + part + WORDS
    assert dirty.count(WORDS) == 4
    result = j2k_frame(dirty)
    assert WORDS not in result
    dataset.PixelData = encapsulate([result])
    np.testing.assert_array_equal(dataset.pixel_array, before)


def test_rle_ends_with_the_last_pixel() -> None:
    dataset = dcmread(str(get_testdata_file("MR_small_RLE.dcm")))
    before = dataset.pixel_array
    frame = next(generate_frames(dataset.PixelData, number_of_frames=1))
    result = rle_frame(frame + WORDS, dataset.Rows * dataset.Columns)
    assert WORDS not in result
    dataset.PixelData = encapsulate([result])
    np.testing.assert_array_equal(dataset.pixel_array, before)


@pytest.mark.parametrize("number", [0, 16, 200, 0xFFFFFFFF])
def test_a_damaged_rle_frame_is_refused(number: int) -> None:
    with pytest.raises(Quarantined, match="unreadable"):
        rle_frame(number.to_bytes(4, "little") + bytes(100), 16)


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("signed", [False, True])
def test_an_overlay_in_unused_bits_goes(order: str, signed: bool) -> None:
    dataset = instance()
    stored = np.arange(16, dtype=np.int16) - (8 if signed else 0)
    dataset.PixelRepresentation = int(signed)
    dirty = (stored & 0x0FFF).astype(np.uint16) | np.uint16(0xA000)
    dataset.PixelData = dirty.astype(f"{order}u2").tobytes()
    clean(dataset, ExplicitVRLittleEndian if order == "<" else ExplicitVRBigEndian)
    np.testing.assert_array_equal(np.frombuffer(dataset.PixelData, f"{order}i2"), stored)


def test_bytes_after_the_last_pixel_go() -> None:
    dataset = instance()
    dataset.PixelData += WORDS
    clean(dataset, ExplicitVRLittleEndian)
    assert len(dataset.PixelData) == 32


def test_frames_after_the_last_one_go() -> None:
    dataset = instance(PixelData=encapsulate([jpeg(), jpeg(), WORDS]), NumberOfFrames=2)
    clean(dataset, JPEGBaseline8Bit)
    assert WORDS not in dataset.PixelData
    assert len(list(generate_frames(dataset.PixelData, number_of_frames=2))) == 2


@pytest.mark.parametrize(
    "change",
    [{"PixelData": b"\0\0"}, {"BitsAllocated": None}, {"HighBit": 17}, {"Rows": 60000}, {"BitsStored": 15}],
    ids=str,
)
def test_pixels_that_contradict_their_description_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(Quarantined, match="unreadable"):
        clean(instance(**change), ExplicitVRLittleEndian)


def test_video_is_refused() -> None:
    with pytest.raises(Quarantined, match="transfer-syntax"):
        clean(Dataset(), MPEG2MPML)
