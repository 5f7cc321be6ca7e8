"""Pixels against pydicom's own pipeline on every real file there is, and against the standard's formulas by hand."""

import logging
import math
import warnings
from pathlib import Path

import data_store
import numpy as np
import pydicom
import pytest
from numpy.typing import NDArray
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.pixels import apply_color_lut, apply_modality_lut, apply_voi_lut
from pydicom.sequence import Sequence
from pydicom.uid import ExplicitVRBigEndian, ExplicitVRLittleEndian, JPEG2000Lossless, RLELossless

from fedmed.dicom.image.pixels import Window, read_frames, to_display
from fedmed.dicom.reasons import Quarantined, Reason
from tests.evidence import FULL, some

ROOTS = [Path(pydicom.__file__).parent / "data" / "test_files", Path(data_store.__file__).parent / "data"]
REFUSED = {
    "JPEG-lossy.dcm": Reason.DECODE_FAILED,
    "JPEG2000-embedded-sequence-delimiter.dcm": Reason.IMPLAUSIBLE_SIZE,
    "MR_truncated.dcm": Reason.PIXEL_LENGTH,
    "badVR.dcm": Reason.MALFORMED_VALUE,
    "meta_missing_tsyntax.dcm": Reason.TRANSFER_SYNTAX,
    "nested_priv_SQ.dcm": Reason.MALFORMED_VALUE,
    "emri_small_jpeg_2k_lossless_too_short.dcm": Reason.DECODE_FAILED,
    # Its coloured pixels would need a Supplemental Palette (PS3.3 C.7.6.19).
    "eCT_Supplemental.dcm": Reason.PHOTOMETRIC_INTERPRETATION,
}


@pytest.fixture(autouse=True)
def _quiet():
    logging.disable(logging.CRITICAL)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    logging.disable(logging.NOTSET)


def _files_with_pixels() -> list[Path]:
    found = []
    for root in ROOTS:
        for path in sorted(root.rglob("*")):
            if path.is_file() and path.suffix not in (".zip", ".json", ".txt", ".py"):
                try:
                    dataset = pydicom.dcmread(path, defer_size=64)
                except Exception:
                    continue
                if any(word in dataset for word in ("PixelData", "FloatPixelData", "DoubleFloatPixelData")):
                    found.append(path)
    return found


with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    FILES = _files_with_pixels()


def _square(path: Path) -> Dataset:
    """The file as read, with square pixels, so that size 0 leaves its grid alone."""
    dataset = pydicom.dcmread(path)
    for word in ("PixelSpacing", "PixelAspectRatio", "ImagerPixelSpacing"):
        if word in dataset:
            del dataset[word]
    return dataset


def _pydicom_frames(path: Path) -> NDArray:
    dataset = pydicom.dcmread(path)
    values = dataset.pixel_array
    return values if int(dataset.get("NumberOfFrames") or 1) > 1 else values[None]


def _pydicom_grey(path: Path) -> tuple[NDArray, NDArray | None]:
    """pydicom's modality values, and its display values stretched to 0 … 65535 where the file has a window."""
    dataset = pydicom.dcmread(path)
    modality = apply_modality_lut(_pydicom_frames(path), dataset)
    if dataset.get("VOILUTSequence"):
        shown = apply_voi_lut(modality, dataset).astype(np.float64)
        low, high = 0.0, float(2 ** dataset.VOILUTSequence[0].LUTDescriptor[2] - 1)
    elif dataset.get("WindowWidth") is not None:
        shown = apply_voi_lut(modality, dataset)
        bits, signed = dataset.BitsStored, dataset.PixelRepresentation
        ends = np.array([-(2 ** (bits - 1)), 2 ** (bits - 1) - 1] if signed else [0, 2**bits - 1], np.float64)
        if dataset.get("RescaleSlope") is not None:
            ends = ends * float(dataset.RescaleSlope) + float(dataset.RescaleIntercept)
        low, high = ends
    else:
        return modality, None
    grey = (shown - low) / (high - low) * 65535
    return modality, 65535 - grey if dataset.PhotometricInterpretation == "MONOCHROME1" else grey


def test_the_real_files_are_all_there():
    assert len(FILES) >= 155
    assert {path.name for path in FILES} >= set(REFUSED) - {"emri_small_jpeg_2k_lossless_too_short.dcm"}
    syntaxes = {str(pydicom.dcmread(path).file_meta.get("TransferSyntaxUID")) for path in FILES}
    assert len(syntaxes) >= 12
    assert {str(pydicom.dcmread(path).file_meta.get("TransferSyntaxUID")) for path in CHOSEN} == syntaxes
    assert {path.name for path in CHOSEN} & set(REFUSED) == {path.name for path in FILES} & set(REFUSED)


def _kind(path: Path) -> tuple[object, ...]:
    """What decides how pixels are read; a file that is refused is a kind of its own."""
    if path.name in REFUSED:
        return (path.name,)
    dataset = pydicom.dcmread(path, stop_before_pixels=True)
    syntax = dataset.file_meta.get("TransferSyntaxUID")
    words = "PhotometricInterpretation", "BitsAllocated", "PixelRepresentation", "PlanarConfiguration"
    optional = "WindowWidth", "VOILUTSequence", "ModalityLUTSequence", "RescaleSlope", "PixelPaddingValue"
    frames = int(dataset.get("NumberOfFrames") or 1) > 1
    return (syntax, frames, *(dataset.get(word) for word in words), *(word in dataset for word in optional))


with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    # In `make test` the smallest file of each kind.
    OF_EACH_KIND = {_kind(path): path for path in sorted(FILES, key=lambda path: -path.stat().st_size)}
CHOSEN = FILES if FULL else list(OF_EACH_KIND.values())


@pytest.mark.parametrize("path", CHOSEN, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_every_real_file_equals_pydicom_or_is_refused_for_its_reason(path):
    if path.name in REFUSED:
        with pytest.raises(Quarantined) as refused:
            read_frames(_square(path), size=0, modality_values=False)
        assert refused.value.reason == REFUSED[path.name]
        return
    frames = read_frames(_square(path), size=0, modality_values=False)
    dataset = pydicom.dcmread(path)
    assert frames.kind == "display"
    assert frames.values.dtype == np.uint16
    if frames.colour:
        expected = _pydicom_frames(path)
        if dataset.PhotometricInterpretation == "PALETTE COLOR":
            # pydicom does not swap the words of big-endian palettes; the same picture is there in little endian.
            twin = path.with_name(path.name.replace("_expb", ""))
            expected = apply_color_lut(expected, pydicom.dcmread(twin))
        white = 2 ** (8 * expected.dtype.itemsize) - 1
        np.testing.assert_allclose(frames.values, expected * (65535 / white), atol=1)
        return
    modality, grey = _pydicom_grey(path)
    values = read_frames(_square(path), size=0, modality_values=True).values
    padding = np.isnan(values)
    pad = dataset.get("PixelPaddingValue")
    np.testing.assert_array_equal(padding, _pydicom_frames(path) == (math.inf if pad is None else pad))
    np.testing.assert_allclose(values[~padding], modality[~padding], rtol=1e-6, atol=1e-3)
    assert not frames.values[padding].any()
    if grey is not None:
        assert frames.window is not None
        assert frames.window.function != "range"
        # A step of 1 in 65535 and, at windows of a few units, the rounding of float32.
        np.testing.assert_allclose(frames.values[~padding], grey[~padding], atol=2)
    elif modality[~padding].min() < modality[~padding].max():
        low, high = modality[~padding].min(), modality[~padding].max()
        np.testing.assert_allclose(
            frames.values[~padding], (modality[~padding] - low) / (high - low) * 65535, atol=1
        )


@pytest.mark.parametrize(
    "path",
    [path for path in FILES if path.stat().st_size < 400_000 and path.name not in REFUSED][::4],
    ids=lambda path: path.name,
)
def test_display_equals_to_display_of_the_modality_values_and_fits_the_size(path):
    display = read_frames(pydicom.dcmread(path), size=48, modality_values=False)
    modality = read_frames(pydicom.dcmread(path), size=48, modality_values=True)
    assert max(display.values.shape[1:3]) <= 48
    if display.colour:
        assert modality.kind == "display"
        np.testing.assert_array_equal(display.values, modality.values)
    else:
        assert modality.values.dtype == np.float32
        assert modality.window is not None
        shown = to_display(modality.values, modality.window, inverted=modality.inverted)
        np.testing.assert_array_equal(shown, display.values)


def _dataset(values: NDArray, **elements: object) -> Dataset:
    """A native file of `values`: (frames, rows, columns[, 3]) or (rows, columns)."""
    frames = values if values.ndim > 2 else values[None]
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.Rows, dataset.Columns = frames.shape[1:3]
    dataset.NumberOfFrames = len(frames)
    dataset.SamplesPerPixel = frames.shape[3] if frames.ndim == 4 else 1
    dataset.PhotometricInterpretation = "RGB" if frames.ndim == 4 else "MONOCHROME2"
    bits = 8 * values.dtype.itemsize
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = bits, bits, bits - 1
    dataset.PixelRepresentation = int(values.dtype.kind == "i")
    dataset.PixelData = values.astype(values.dtype.newbyteorder("<")).tobytes()
    for word, value in elements.items():
        setattr(dataset, word, value)
    return dataset


def _modality(dataset: Dataset, size: int = 0) -> NDArray:
    return read_frames(dataset, size=size, modality_values=True).values[0]


def _display(dataset: Dataset, size: int = 0) -> list:
    return read_frames(dataset, size=size, modality_values=False).values[0].tolist()


def _lut(first: int, entries: list[int], bits: int) -> Dataset:
    item = Dataset()
    item.add_new(0x00283002, "SS" if first < 0 else "US", [len(entries), first, bits])
    item.add_new(0x00283006, "US", entries)
    return item


def test_linear_by_hand():
    """PS3.3 C.11.2.1.2.1, centre 2, width 3: black to 0.5, white above 2.5, y = (x - 1.5) / 2 + 0.5 between."""
    dataset = _dataset(np.array([[0, 1, 2, 3]], np.uint8), WindowCenter=2, WindowWidth=3)
    assert _display(dataset) == [[0, round(0.25 * 65535), round(0.75 * 65535), 65535]]


def test_a_linear_window_of_width_one_is_a_step():
    dataset = _dataset(np.array([[0, 1, 2, 3]], np.uint8), WindowCenter=2, WindowWidth=1)
    assert _display(dataset) == [[0, 0, 65535, 65535]]
    inverted = _dataset(
        np.array([[0, 1, 2, 3]], np.uint8),
        WindowCenter=2,
        WindowWidth=1,
        PhotometricInterpretation="MONOCHROME1",
    )
    assert _display(inverted) == [[65535, 65535, 0, 0]]


def test_linear_exact_by_hand():
    """C.11.2.1.3.2: y = (x - 2) / 4 + 0.5."""
    dataset = _dataset(
        np.array([[0, 1, 2, 3, 4]], np.uint8), WindowCenter=2, WindowWidth=4, VOILUTFunction="LINEAR_EXACT"
    )
    assert _display(dataset) == [[0, 16384, 32768, 49151, 65535]]


def test_sigmoid_by_hand():
    """C.11.2.1.3.1: y = 1 / (1 + exp(-4 (x - c) / w))."""
    dataset = _dataset(
        np.array([[0, 2, 100]], np.uint8), WindowCenter=2, WindowWidth=4, VOILUTFunction="SIGMOID"
    )
    assert _display(dataset) == [[round(65535 / (1 + math.exp(2))), 32768, 65535]]


def test_the_first_of_several_windows_and_a_given_one_instead():
    dataset = _dataset(np.array([[0, 1, 2, 3]], np.uint8), WindowCenter=[2, 50], WindowWidth=[1, 200])
    assert _display(dataset) == [[0, 0, 65535, 65535]]
    given = Window(function="linear_exact", center=1.5, width=3)
    frames = read_frames(dataset, size=0, modality_values=False, window=given)
    assert frames.values[0].tolist() == [[0, 21845, 43690, 65535]]
    assert frames.window == given


def test_without_a_window_the_range_without_padding_is_black_to_white_over_all_frames():
    values = np.array([[[10, 20]], [[30, 255]]], np.uint8)
    frames = read_frames(_dataset(values, PixelPaddingValue=255), size=0, modality_values=False)
    assert frames.values.tolist() == [[[0, 32768]], [[65535, 0]]]
    assert frames.window == Window.of_range(10, 30)


def test_padding_stays_black_when_inverted_and_a_range_counts():
    dataset = _dataset(
        np.array([[-2000, -1999, 0, 100]], np.int16),
        PixelPaddingValue=-2000,
        PixelPaddingRangeLimit=-1990,
        PhotometricInterpretation="MONOCHROME1",
    )
    assert _display(dataset) == [[0, 0, 65535, 0]]
    # Explicit VR files state a negative value as US.
    del dataset.PixelPaddingRangeLimit
    dataset.add_new(0x00280120, "US", 63536)
    assert np.isnan(_modality(dataset)).tolist() == [[True, False, False, False]]


def test_padding_takes_no_part_in_averages():
    values = np.full((4, 4), 100, np.int16)
    values[:2, :2] = -2000
    values[0, 2] = -2000
    small = _modality(_dataset(values, PixelPaddingValue=-2000, RescaleSlope=1, RescaleIntercept=-50), size=2)
    assert math.isnan(small[0, 0])
    assert small.ravel()[1:].tolist() == [50.0, 50.0, 50.0]


def test_rescale_and_signed_values():
    dataset = _dataset(np.array([[-5, 7]], np.int16), RescaleSlope="0.5", RescaleIntercept="-1024")
    assert _modality(dataset).tolist() == [[-1026.5, -1020.5]]


def test_a_modality_table_and_its_ends():
    dataset = _dataset(np.array([[-9, -1, 0, 1, 9]], np.int16))
    dataset.ModalityLUTSequence = Sequence([_lut(-1, [10, 500, 65535], 16)])
    assert _modality(dataset).tolist() == [[10, 10, 500, 65535, 65535]]


@pytest.mark.parametrize(("bits", "white"), [(8, 255), (10, 1023), (12, 4095), (16, 65535)])
def test_a_voi_table_after_a_rescale(bits, white):
    dataset = _dataset(np.array([[0, 1, 2, 3]], np.uint8), RescaleSlope=1, RescaleIntercept=-1000)
    dataset.VOILUTSequence = Sequence([_lut(-999, [0, white // 3, white], bits)])
    assert _display(dataset) == [[0, 0, 21845, 65535]]


def test_unused_bits_hold_overlays_that_are_left_out():
    values = np.array([[0xF123, 0x0123]], np.uint16)
    assert _modality(_dataset(values, BitsStored=12, HighBit=11)).tolist() == [[0x123, 0x123]]
    signed = _dataset(values.view(np.int16), BitsStored=9, HighBit=8)
    assert _modality(signed).tolist() == [[0x123 - 512, 0x123 - 512]]
    # Until PS3.5-2006 the stored bits could end higher.
    high = _dataset(np.array([[0x1234, 0xABCF]], np.uint16), BitsStored=12, HighBit=15)
    assert _modality(high).tolist() == [[0x123, 0xABC]]


def test_one_bit_pixels_cross_bytes_and_frames():
    bits = np.random.default_rng(0).integers(0, 2, (3, 3, 5)).astype(np.uint8)
    dataset = _dataset(bits, BitsAllocated=1, BitsStored=1, HighBit=0)
    dataset.PixelData = np.packbits(bits.ravel(), bitorder="little").tobytes()
    np.testing.assert_array_equal(read_frames(dataset, size=0, modality_values=True).values, bits)


@pytest.mark.parametrize(("word", "dtype"), [("FloatPixelData", "f4"), ("DoubleFloatPixelData", "f8")])
def test_float_pixels_and_what_is_not_finite(word, dtype):
    values = np.array([[0.5, np.nan, np.inf, -3.25]], dtype)
    dataset = _dataset(np.zeros((1, 4), dtype), BitsAllocated=values.itemsize * 8)
    del dataset.PixelData
    setattr(dataset, word, values.tobytes())
    found = _modality(dataset)
    assert found[0, [0, 3]].tolist() == [0.5, -3.25]
    assert np.isnan(found[0, 1:3]).all()


@pytest.mark.parametrize("planar", [0, 1])
def test_colour_planes_and_sixteen_bits(planar):
    values = np.random.default_rng(1).integers(0, 65536, (2, 3, 4, 3)).astype(np.uint16)
    stored = values if planar == 0 else values.transpose(0, 3, 1, 2)
    dataset = _dataset(values, PlanarConfiguration=planar)
    dataset.PixelData = np.ascontiguousarray(stored).tobytes()
    np.testing.assert_array_equal(read_frames(dataset, size=0, modality_values=False).values, values)


def test_ten_bit_colour_reaches_white():
    dataset = _dataset(np.full((1, 2, 2, 3), 1023, np.uint16), BitsStored=10, HighBit=9)
    assert (read_frames(dataset, size=0, modality_values=False).values == 65535).all()


def test_a_signed_palette_starts_below_zero():
    dataset = _dataset(np.array([[-2, -1, 0, 5]], np.int8), PhotometricInterpretation="PALETTE COLOR")
    for channel in range(3):
        dataset.add_new(0x00281101 + channel, "SS", [3, -1, 8])
        dataset.add_new(0x00281201 + channel, "OW", bytes([10, 20, 30 + channel, 0]))
    assert read_frames(dataset, size=0, modality_values=False).values[0, :, :, 2].tolist() == [
        [10 * 257, 10 * 257, 20 * 257, 32 * 257]
    ]


def test_big_endian_equals_little_endian():
    values = np.array([[1, 2], [3, 400]], np.uint16)
    big = _dataset(values)
    big.file_meta.TransferSyntaxUID = ExplicitVRBigEndian
    big.PixelData = values.astype(">u2").tobytes()
    np.testing.assert_array_equal(_modality(big), values)


def test_frames_of_an_enhanced_file_have_their_own_rescale_and_window():
    dataset = _dataset(np.array([[[10, 20]], [[10, 20]]], np.uint8))
    frames = []
    for number in (1, 2):
        frame, transformation, voi = Dataset(), Dataset(), Dataset()
        transformation.RescaleSlope, transformation.RescaleIntercept = number, 100
        voi.WindowCenter, voi.WindowWidth = 100 + 15 * number + 0.5, 10 * number + 1
        frame.PixelValueTransformationSequence = Sequence([transformation])
        frame.FrameVOILUTSequence = Sequence([voi])
        frames.append(frame)
    dataset.PerFrameFunctionalGroupsSequence = Sequence(frames)
    assert read_frames(dataset, size=0, modality_values=True).values.tolist() == [[[110, 120]], [[120, 140]]]
    assert read_frames(dataset, size=0, modality_values=False).values.tolist() == [[[0, 65535]]] * 2


def test_pixels_become_square_and_the_spacing_is_reported():
    values = np.arange(4 * 8, dtype=np.uint16).reshape(4, 8)
    frames = read_frames(_dataset(values, PixelSpacing=[2, 1]), size=0, modality_values=True)
    np.testing.assert_array_equal(frames.values[0], values.reshape(4, 4, 2).mean(axis=2))
    assert (frames.row_spacing, frames.column_spacing, frames.spacing_source) == (2.0, 2.0, "pixel")
    small = read_frames(_dataset(values, ImagerPixelSpacing=[2, 1]), size=2, modality_values=True)
    assert small.values.shape == (1, 2, 2)
    assert (small.row_spacing, small.column_spacing, small.spacing_source) == (4.0, 4.0, "imager")
    ratio = read_frames(_dataset(values, PixelAspectRatio=[2, 1]), size=0, modality_values=True)
    assert ratio.values.shape == (1, 4, 4)
    assert (ratio.row_spacing, ratio.spacing_source) == (None, "none")


@pytest.mark.parametrize("shape", [(512, 512), (97, 301), (50, 1)])
@pytest.mark.parametrize("size", [1, 13, 64, 200])
def test_a_resampled_image_is_the_mean_over_areas(shape, size):
    """Against each pixel repeated so often that every area holds whole ones."""
    values = np.random.default_rng(2).integers(0, 65536, shape).astype(np.uint16)
    found = _modality(_dataset(values), size=size)
    rows, columns = found.shape
    assert max(rows, columns) == min(size, max(shape))
    if shape[0] * rows <= 512 * 64:
        tall = (
            np.repeat(values.astype(np.float64), rows, axis=0).reshape(rows, shape[0], shape[1]).mean(axis=1)
        )
        wide = np.repeat(tall, columns, axis=1).reshape(rows, columns, shape[1]).mean(axis=2)
        np.testing.assert_allclose(found, wide, rtol=1e-5)
    assert found.mean() == pytest.approx(values.mean(), rel=0.02)


def test_resampling_does_not_alias_and_never_enlarges():
    lines = np.tile(np.array([0, 65535], np.uint16), (64, 32))
    assert np.ptp(_modality(_dataset(lines), size=32)) == 0
    assert _modality(_dataset(lines), size=1000).shape == (64, 64)


@pytest.mark.parametrize(
    ("reason", "change"),
    [
        (Reason.WINDOW, {"WindowCenter": 2, "WindowWidth": 0}),
        (Reason.WINDOW, {"WindowCenter": 2, "WindowWidth": -5}),
        (Reason.WINDOW, {"WindowCenter": "nan", "WindowWidth": 5}),
        (Reason.WINDOW, {"WindowCenter": 2}),
        (Reason.WINDOW, {"WindowCenter": 2, "WindowWidth": 5, "VOILUTFunction": "CUBIC"}),
        (Reason.WINDOW, {"WindowCenter": 2, "WindowWidth": 0, "VOILUTFunction": "SIGMOID"}),
        (Reason.RESCALE, {"RescaleSlope": 0, "RescaleIntercept": 0}),
        (Reason.RESCALE, {"RescaleSlope": "nan", "RescaleIntercept": 0}),
        (Reason.RESCALE, {"RescaleSlope": "inf", "RescaleIntercept": 0}),
        (Reason.RESCALE, {"RescaleSlope": 1}),
        (Reason.IMPLAUSIBLE_SIZE, {"Rows": 0}),
        (Reason.IMPLAUSIBLE_SIZE, {"NumberOfFrames": 0}),
        (Reason.IMPLAUSIBLE_SIZE, {"NumberOfFrames": -1}),
        (Reason.IMPLAUSIBLE_SIZE, {"SamplesPerPixel": 2}),
        (Reason.IMPLAUSIBLE_SIZE, {"BitsStored": 0}),
        (Reason.IMPLAUSIBLE_SIZE, {"BitsStored": 17}),
        (Reason.IMPLAUSIBLE_SIZE, {"BitsAllocated": 12, "BitsStored": 12}),
        (Reason.PIXEL_LAYOUT, {"HighBit": 3}),
        (Reason.PIXEL_LAYOUT, {"PixelRepresentation": 2}),
        (Reason.TOO_LARGE, {"Rows": 65535, "Columns": 65535}),
        (Reason.TOO_LARGE, {"NumberOfFrames": 10**9}),
        (Reason.PIXEL_LENGTH, {"Rows": 5000, "Columns": 5000}),
        (Reason.PIXEL_LENGTH, {"Rows": 3}),
        (Reason.PIXEL_LENGTH, {"Rows": 1}),
        (Reason.PHOTOMETRIC_INTERPRETATION, {"PhotometricInterpretation": "HSV"}),
        (Reason.PHOTOMETRIC_INTERPRETATION, {"PhotometricInterpretation": "RGB"}),
        (Reason.PHOTOMETRIC_INTERPRETATION, {"PhotometricInterpretation": ""}),
        (Reason.LOOKUP_TABLE, {"PhotometricInterpretation": "PALETTE COLOR"}),
        (Reason.LOOKUP_TABLE, {"ModalityLUTSequence": [(0, [1, 2], 0)]}),
        (Reason.LOOKUP_TABLE, {"ModalityLUTSequence": [(0, [1, 2], 17)]}),
        (Reason.LOOKUP_TABLE, {"VOILUTSequence": [(0, [1, 256], 8)]}),
        (Reason.PIXEL_SPACING, {"PixelSpacing": [1, 40]}),
        (Reason.PIXEL_SPACING, {"PixelSpacing": [1, -1]}),
        (Reason.PIXEL_SPACING, {"PixelSpacing": [1]}),
    ],
)  # fmt: skip
def test_what_is_not_understood_is_refused(reason, change):
    dataset = _dataset(np.arange(4, dtype=np.uint16).reshape(2, 2))
    with pydicom.config.disable_value_validation():
        for word, value in change.items():
            if word.endswith("LUTSequence"):
                value = Sequence([_lut(*arguments) for arguments in value])
            setattr(dataset, word, value)
    with pytest.raises(Quarantined) as refused:
        read_frames(dataset, size=0, modality_values=False)
    assert refused.value.reason == reason
    assert str(refused.value) == str(reason)


def test_a_table_whose_descriptor_states_another_length_is_refused():
    dataset = _dataset(np.zeros((1, 2), np.uint16))
    item = _lut(0, [1, 2, 3], 16)
    item.add_new(0x00283002, "US", [4, 0, 16])
    for word in ("ModalityLUTSequence", "VOILUTSequence"):
        setattr(dataset, word, Sequence([item]))
        with pytest.raises(Quarantined, match="lookup-table"):
            read_frames(dataset, size=0, modality_values=False)
        delattr(dataset, word)


@pytest.mark.parametrize("missing", ["Rows", "Columns", "SamplesPerPixel", "BitsAllocated", "BitsStored"])
def test_a_missing_size_is_refused(missing):
    dataset = _dataset(np.zeros((2, 2), np.uint8))
    delattr(dataset, missing)
    with pytest.raises(Quarantined, match="malformed-value"):
        read_frames(dataset, size=0, modality_values=False)


def test_no_pixels_and_no_transfer_syntax():
    dataset = _dataset(np.zeros((2, 2), np.uint8))
    del dataset.PixelData
    with pytest.raises(Quarantined, match="no-pixels"):
        read_frames(dataset, size=0, modality_values=False)
    unknown = _dataset(np.zeros((2, 2), np.uint8))
    unknown.file_meta.TransferSyntaxUID = "1.2.840.10008.1.2.4.102"
    with pytest.raises(Quarantined, match="transfer-syntax"):
        read_frames(unknown, size=0, modality_values=False)


def test_a_compressed_frame_that_states_another_size_is_refused_before_it_is_decoded():
    """A 100,000 x 100,000 JPEG 2000 header in a file of 2 x 2: the decoder would ask for 20 GB."""
    size = (100_000).to_bytes(4, "big")
    header = (
        b"\xff\x4f\xff\x51\x00\x29\x00\x00"
        + size * 2
        + bytes(8)
        + size * 2
        + bytes(8)
        + b"\x00\x01\x0f\x01\x01"
    )
    dataset = _dataset(np.zeros((2, 2), np.uint16))
    dataset.file_meta.TransferSyntaxUID = JPEG2000Lossless
    dataset.PixelData = encapsulate([header])
    dataset["PixelData"].is_undefined_length = True
    with pytest.raises(Quarantined, match="implausible-size"):
        read_frames(dataset, size=0, modality_values=False)


def test_too_few_compressed_frames_are_refused():
    dataset = pydicom.dcmread(next(path for path in FILES if path.name == "emri_small_RLE.dcm"))
    assert dataset.file_meta.TransferSyntaxUID == RLELossless
    dataset.NumberOfFrames = 11
    with pytest.raises(Quarantined):
        read_frames(dataset, size=0, modality_values=False)
    dataset.NumberOfFrames = 9
    with pytest.raises(Quarantined, match="pixel-length"):
        read_frames(dataset, size=0, modality_values=False)


@pytest.mark.parametrize("seed", some(range(300), 2))
def test_random_damage_ends_in_frames_or_a_reason(seed):
    """Elements of the pixel module replaced by random values, and pixel data cut or changed: nothing else is raised."""
    generator = np.random.default_rng(seed)
    small = [path for path in FILES if path.stat().st_size < 100_000]
    path = small[generator.integers(len(small))]
    raw = bytearray(path.read_bytes())
    for _ in range(generator.integers(1, 6)):
        raw[generator.integers(132, len(raw))] = generator.integers(256)
    try:
        dataset = pydicom.dcmread(pydicom.filebase.DicomBytesIO(bytes(raw)))
    except Exception:
        return
    try:
        frames = read_frames(dataset, size=64, modality_values=bool(seed % 2))
    except Quarantined:
        return
    assert max(frames.values.shape[1:3]) <= 64


def test_to_display_is_monotone_ignores_its_neighbours_and_leaves_its_input():
    values = np.concatenate([np.linspace(-3000, 3000, 70_001, dtype=np.float32), [np.float32(np.nan)]])
    before = values.copy()
    for function in ("linear", "linear_exact", "sigmoid", "range"):
        window = Window(function=function, center=40, width=400)
        shown = to_display(values, window, inverted=False)
        assert (np.diff(shown[:-1].astype(int)) >= 0).all()
        assert (shown[0], shown[-2], shown[-1]) == (0, 65535, 0)
        assert (to_display(values[35_000:35_010], window, inverted=False) == shown[35_000:35_010]).all()
        dark = to_display(values, window, inverted=True)
        assert np.abs(dark[:-1].astype(int) + shown[:-1] - 65535).max() <= 1
        assert dark[-1] == 0
    np.testing.assert_array_equal(values, before)
