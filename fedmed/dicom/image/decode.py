"""Stored pixel values, one frame at a time."""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset
from pydicom.encaps import generate_frames
from pydicom.pixels import get_decoder
from pydicom.pixels.processing import convert_color_space
from pydicom.uid import UID, RLELossless

from fedmed.dicom.image.codestream import check_codestream
from fedmed.dicom.image.elements import Elements
from fedmed.dicom.image.layout import DOUBLE_PIXEL_DATA, FLOAT_PIXEL_DATA, PIXEL_DATA, PixelLayout
from fedmed.dicom.reasons import Quarantined, Reason

_EXTENDED_OFFSETS, _EXTENDED_LENGTHS = 0x7FE00001, 0x7FE00002


def stored_frames(dataset: Dataset, elements: Elements, layout: PixelLayout) -> Iterator[NDArray]:
    """Yield each frame's stored values: (rows, columns), or (rows, columns, 3) as RGB.

    Exactly `layout.frames` arrays in file order; only one decoded frame is held; possibly read-only views. Grey values
    may still hold what lies beyond the stored bits, e.g. overlays: `stored_bits` of any part of them does not. Raises
    `Quarantined`.
    """
    data = elements.buffer(layout.tag)
    return (
        _native(data, elements, layout) if layout.native else _encapsulated(data, dataset, elements, layout)
    )


def _native(data: bytes, elements: Elements, layout: PixelLayout) -> Iterator[NDArray]:
    needed = -(-layout.frame_bits * layout.frames // 8)
    if len(data) < needed or len(data) - needed >= max(2, layout.frame_bits // 8):
        raise Quarantined(Reason.PIXEL_LENGTH)
    swapped_bytes = (
        not layout.little_endian
        and layout.bits_allocated == 8
        and elements.vr(layout.tag) == "OW"
        and len(data) % 2 == 0
    )
    if swapped_bytes:
        # PS3.5 A.3: OW words are swapped as words, also where they hold two 8-bit pixels.
        data = np.frombuffer(data, "u2").byteswap().tobytes()
    if layout.bits_allocated == 1:
        yield from _packed_bits(data, layout)
        return
    dtype = _dtype(layout)
    count = layout.frame_bits // layout.bits_allocated
    for frame in range(layout.frames):
        values = np.frombuffer(data, dtype, count, frame * layout.frame_bits // 8)
        yield _coloured(values, layout)


def _dtype(layout: PixelLayout) -> np.dtype:
    kind = {PIXEL_DATA: "i" if layout.signed else "u", FLOAT_PIXEL_DATA: "f", DOUBLE_PIXEL_DATA: "f"}[
        layout.tag
    ]
    return np.dtype(f"{'<' if layout.little_endian else '>'}{kind}{layout.bits_allocated // 8}")


def _packed_bits(data: bytes, layout: PixelLayout) -> Iterator[NDArray]:
    """PS3.5 8.1.1: pixels of one bit follow each other across bytes and frames, lowest bit first."""
    pixels = layout.rows * layout.columns
    packed = np.frombuffer(data, np.uint8)
    for frame in range(layout.frames):
        first, offset = divmod(frame * pixels, 8)
        bits = np.unpackbits(packed[first : first + (offset + pixels + 7) // 8], bitorder="little")
        yield bits[offset : offset + pixels].reshape(layout.rows, layout.columns)


def stored_bits(values: NDArray, layout: PixelLayout) -> NDArray:
    """The part of each stored value that belongs to the pixel: `bits_stored` bits from `high_bit` down (PS3.5 8.1.1).

    `values`: any part of a frame of `stored_frames`; returned as they are where nothing else is in them.
    """
    if layout.bits_stored == layout.bits_allocated or layout.tag != PIXEL_DATA or not layout.native:
        return values
    if layout.high_bit == layout.bits_stored - 1 and values.dtype.kind in "iu" and values.size:
        low = -(1 << (layout.bits_stored - 1)) if layout.signed else 0
        # Two glances cost a tenth of two shifts, and most files have nothing there.
        if values.min() >= low and values.max() < low + (1 << layout.bits_stored):
            return values
    # Arithmetic shifts on the signed type extend the sign; they bring the value down at the same time.
    bits = values << (layout.bits_allocated - 1 - layout.high_bit)
    bits >>= layout.bits_allocated - layout.bits_stored
    return bits


def _coloured(values: NDArray, layout: PixelLayout) -> NDArray:
    if layout.samples == 1:
        return values.reshape(layout.rows, layout.columns)
    values = stored_bits(values, layout)
    if layout.photometric == "YBR_FULL_422":
        # Y1 Y2 Cb Cr for two neighbours of a row (PS3.3 C.7.6.3.1.2).
        pairs = values.reshape(-1, 4)
        full = np.empty((len(pairs), 2, 3), values.dtype)
        full[:, :, 0], full[:, :, 1], full[:, :, 2] = pairs[:, :2], pairs[:, 2:3], pairs[:, 3:4]
        values = full
    if layout.planar:
        values = values.reshape(3, layout.rows, layout.columns).transpose(1, 2, 0)
    values = values.reshape(layout.rows, layout.columns, 3)
    return (
        convert_color_space(values, "YBR_FULL", "RGB")
        if layout.photometric.startswith("YBR_FULL")
        else values
    )


def _encapsulated(
    data: bytes, dataset: Dataset, elements: Elements, layout: PixelLayout
) -> Iterator[NDArray]:
    try:
        decoder = get_decoder(UID(layout.transfer_syntax))
        available = decoder.is_available
    except NotImplementedError:
        available = False
    if not available:
        raise Quarantined(Reason.TRANSFER_SYNTAX)
    _check_frames(data, elements, layout)
    shape = (layout.rows, layout.columns) + ((3,) if layout.samples == 3 else ())
    frames = decoder.iter_array(dataset, raw=False)
    for _ in range(layout.frames):
        try:
            values, found = next(frames)
        except MemoryError:
            raise Quarantined(Reason.TOO_LARGE) from None
        except BaseException as error:
            # Decoders raise whatever their libraries return, with the file's values in the text. The Rust one panics,
            # which is no Exception, and writes to the process's standard error itself.
            if isinstance(error, KeyboardInterrupt | SystemExit | GeneratorExit):
                raise
            raise Quarantined(Reason.DECODE_FAILED) from None
        if values.shape != shape:
            raise Quarantined(Reason.IMPLAUSIBLE_SIZE)
        if layout.samples == 3 and found["photometric_interpretation"] != "RGB":
            raise Quarantined(Reason.PHOTOMETRIC_INTERPRETATION)
        yield values


def _check_frames(data: bytes, elements: Elements, layout: PixelLayout) -> None:
    """Find every frame and read the size that it states, before the first is decoded."""
    offsets = None
    if _EXTENDED_OFFSETS in elements and _EXTENDED_LENGTHS in elements:
        offsets = (elements.buffer(_EXTENDED_OFFSETS), elements.buffer(_EXTENDED_LENGTHS))
    count = 0
    try:
        for code in generate_frames(data, number_of_frames=layout.frames, extended_offsets=offsets):
            count += 1
            if layout.transfer_syntax != RLELossless:
                check_codestream(
                    code,
                    rows=layout.rows,
                    columns=layout.columns,
                    samples=layout.samples,
                    jpeg_2000=layout.jpeg_2000,
                )
    except Quarantined:
        raise
    except Exception:
        raise Quarantined(Reason.DECODE_FAILED) from None
    if count != layout.frames:
        raise Quarantined(Reason.PIXEL_LENGTH)
