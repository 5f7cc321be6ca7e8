"""What Pixel Data carries beside pixels, taken out: comments in compressed streams, unused bits, bytes after the end.

No pixel changes. Overlays drawn into the unused bits of a pixel (retired, still found) go with them.
"""

import re

import numpy as np
from pydicom import Dataset
from pydicom.encaps import encapsulate, encapsulate_extended, generate_frames
from pydicom.pixels.utils import get_expected_length
from pydicom.uid import (
    UID,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000TransferSyntaxes,
    JPEGLSTransferSyntaxes,
    JPEGTransferSyntaxes,
    RLELossless,
)

from fedmed.dicom.reasons import Quarantined, Reason

NATIVE = (
    ImplicitVRLittleEndian,
    ExplicitVRLittleEndian,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
)
SUPPORTED = (*NATIVE, *JPEGTransferSyntaxes, *JPEGLSTransferSyntaxes, *JPEG2000TransferSyntaxes, RLELossless)

# Segments that say how colours are coded, and how much of each is kept; all other application segments go.
_COLOUR_SEGMENTS = {0xE0: (b"JFIF\0", 14), 0xEE: (b"Adobe", 12), 0xE8: (b"mrfx", 5)}
_JPEG_MARKER = re.compile(rb"\xff[\x80-\xcf\xd8-\xfe]")


def clean(dataset: Dataset, syntax: UID) -> None:
    """Rewrite `dataset`'s Pixel Data in place so that it holds its pixels and nothing else.

    Raises:
        Quarantined: the stream is damaged, or its encoding cannot be cleaned (video, private syntaxes).
    """
    if syntax not in SUPPORTED:
        raise Quarantined(Reason.TRANSFER_SYNTAX)
    try:
        for name, width in (("FloatPixelData", 4), ("DoubleFloatPixelData", 8)):
            if name in dataset:
                dataset[name].value = dataset[name].value[: _values(dataset) * width]
        if "PixelData" not in dataset:
            return
        if syntax in NATIVE:
            _clean_native(dataset, little_endian=syntax != ExplicitVRBigEndian)
        else:
            _clean_encapsulated(dataset, syntax)
    except Quarantined:
        raise
    except Exception:
        # Its text may hold a value of the file.
        raise Quarantined(Reason.UNREADABLE) from None


def _values(dataset: Dataset) -> int:
    frames = int(dataset.get("NumberOfFrames") or 1)
    return int(frames * dataset.Rows * dataset.Columns * dataset.get("SamplesPerPixel", 1))


def _clean_native(dataset: Dataset, *, little_endian: bool) -> None:
    allocated, stored = dataset.BitsAllocated, dataset.get("BitsStored", dataset.BitsAllocated)
    high = dataset.get("HighBit", stored - 1)
    expected = get_expected_length(dataset)
    data = dataset["PixelData"].value
    if len(data) < expected:
        raise Quarantined(Reason.UNREADABLE)
    if dataset.PhotometricInterpretation == "YBR_FULL_422" and len(data) >= expected // 2 * 3:
        # Some files say that colours are subsampled where they are not; readers go by the length.
        expected = expected // 2 * 3
    # Rounded up: of swapped bytes, the last one stands before its padding.
    data = data[: expected + expected % 2]
    if stored < allocated and allocated in (8, 16, 32):
        order = "<" if little_endian or dataset["PixelData"].VR == "OB" else ">"
        signed = dataset.get("PixelRepresentation", 0) == 1
        low = high - stored + 1
        if low < 0 or high >= allocated:
            raise Quarantined(Reason.UNREADABLE)
        # Up to the top bit and down again: what is above is lost, and a sign is repeated.
        above = allocated - 1 - high
        content = bytearray(data)
        words = np.frombuffer(content, f"{order}{'i' if signed else 'u'}{allocated // 8}")
        for start in range(0, len(words), 1 << 20):
            part = words[start : start + (1 << 20)]
            part[:] = ((part << above) >> (above + low)) << low
        data = bytes(content)
    dataset["PixelData"].value = data + b"\0" * (len(data) % 2)


def _clean_encapsulated(dataset: Dataset, syntax: UID) -> None:
    number = int(dataset.get("NumberOfFrames") or 1)
    tables = (dataset.get("ExtendedOffsetTable"), dataset.get("ExtendedOffsetTableLengths"))
    extended = (tables[0], tables[1]) if tables[0] and tables[1] else None
    frames: list[bytes] = []
    for frame in generate_frames(dataset.PixelData, number_of_frames=number, extended_offsets=extended):
        if len(frames) == number:
            break
        if syntax == RLELossless:
            frames.append(rle_frame(frame, dataset.Rows * dataset.Columns))
        elif syntax in JPEG2000TransferSyntaxes:
            frames.append(j2k_frame(frame))
        else:
            frames.append(jpeg_frame(frame))
    if len(frames) != number:
        raise Quarantined(Reason.UNREADABLE)
    if extended:
        dataset.PixelData, dataset.ExtendedOffsetTable, dataset.ExtendedOffsetTableLengths = (
            encapsulate_extended(frames)
        )
    else:
        dataset.PixelData = encapsulate(frames)
    dataset["PixelData"].VR = "OB"
    dataset["PixelData"].is_undefined_length = True


def jpeg_frame(frame: bytes) -> bytes:
    """A JPEG or JPEG-LS stream without comments, application segments and bytes after its end.

    Raises:
        Quarantined: not such a stream.
    """
    if frame[:2] != b"\xff\xd8":
        raise Quarantined(Reason.UNREADABLE)
    parts, place = [b"\xff\xd8"], 2
    while place + 2 <= len(frame):
        if frame[place] != 0xFF:
            raise Quarantined(Reason.UNREADABLE)
        marker = frame[place + 1]
        if marker == 0xFF:  # A fill byte.
            place += 1
            continue
        if marker == 0xD9:
            return b"".join([*parts, b"\xff\xd9"])
        end = place + 2 + int.from_bytes(frame[place + 2 : place + 4], "big")
        if end < place + 4 or end > len(frame):
            raise Quarantined(Reason.UNREADABLE)
        segment = frame[place:end]
        if 0xE0 <= marker <= 0xEF:
            begins, length = _COLOUR_SEGMENTS.get(marker, (b"\0none", 0))
            if segment[4:].startswith(begins):
                parts.append(_colour_segment(segment, length))
        elif marker != 0xFE:
            parts.append(segment)
        if marker == 0xDA:
            # Up to the next marker that is neither a stuffed byte nor a restart.
            found = _JPEG_MARKER.search(frame, end)
            # Some devices forget the end of the image.
            stop = found.start() if found else len(frame)
            parts.append(frame[end:stop])
            end = stop
        place = end
    return b"".join([*parts, b"\xff\xd9"])


def _colour_segment(segment: bytes, length: int) -> bytes:
    """The first `length` bytes of a segment's content, without a JFIF thumbnail."""
    content = segment[4 : 4 + length]
    if segment[1] == 0xE0:
        content = content[:12] + b"\0\0"
    return segment[:2] + (len(content) + 2).to_bytes(2, "big") + content


def j2k_frame(frame: bytes) -> bytes:
    """A JPEG 2000 codestream without comments and bytes after its end (and without a file's boxes around it).

    Raises:
        Quarantined: not such a stream.
    """
    start = 0 if frame[:4] == b"\xff\x4f\xff\x51" else frame.find(b"\xff\x4f\xff\x51")
    if start < 0:
        raise Quarantined(Reason.UNREADABLE)
    parts, place = [b"\xff\x4f"], start + 2
    while place + 2 <= len(frame):
        marker = frame[place : place + 2]
        if marker == b"\xff\xd9":
            break
        end = place + 2 + int.from_bytes(frame[place + 2 : place + 4], "big")
        if marker[0] != 0xFF or end < place + 4 or end > len(frame):
            raise Quarantined(Reason.UNREADABLE)
        if (
            marker == b"\xff\x90"
        ):  # Start of a tile-part: its length counts from the marker; 0 is up to the end.
            length = int.from_bytes(frame[place + 6 : place + 10], "big")
            end = place + length if length else frame.rfind(b"\xff\xd9")
            if end < place + 12:
                raise Quarantined(Reason.UNREADABLE)
            end = min(end, len(frame))
            parts.append(_tile_part(frame[place:end]))
        elif marker not in (b"\xff\x64", b"\xff\x55"):
            # Comments go; so do tile-part lengths (TLM), which are optional and may no longer be right.
            parts.append(frame[place:end])
        place = end
    return b"".join([*parts, b"\xff\xd9"])


def _tile_part(part: bytes) -> bytes:
    """A tile-part without the comments of its own header."""
    kept, place = [], 12
    while part[place : place + 2] != b"\xff\x93":
        end = place + 2 + int.from_bytes(part[place + 2 : place + 4], "big")
        if part[place : place + 1] != b"\xff" or end > len(part) or end < place + 4:
            raise Quarantined(Reason.UNREADABLE)
        if part[place : place + 2] != b"\xff\x64":
            kept.append(part[place:end])
        place = end
    body = b"".join([*kept, part[place:]])
    length = b"\0\0\0\0" if part[6:10] == b"\0\0\0\0" else (12 + len(body)).to_bytes(4, "big")
    return part[:6] + length + part[10:12] + body


def rle_frame(frame: bytes, pixels: int) -> bytes:
    """An RLE frame whose segments end with their last pixel.

    Raises:
        Quarantined: not such a frame.
    """
    number = int.from_bytes(frame[:4], "little")
    if not 1 <= number <= 15:
        raise Quarantined(Reason.UNREADABLE)
    offsets = [int.from_bytes(frame[4 * at : 4 * at + 4], "little") for at in range(1, number + 1)]
    if offsets != sorted(offsets) or offsets[0] < 64:
        raise Quarantined(Reason.UNREADABLE)
    segments = []
    for start, stop in zip(offsets, [*offsets[1:], len(frame)], strict=True):
        segment = frame[start : _rle_end(frame, start, stop, pixels)]
        segments.append(segment + b"\0" * (len(segment) % 2))
    places = np.cumsum([64, *(len(segment) for segment in segments[:-1])])
    header = np.zeros(16, "<u4")
    header[0], header[1 : 1 + number] = number, places
    return header.tobytes() + b"".join(segments)


def _rle_end(frame: bytes, place: int, stop: int, pixels: int) -> int:
    """The place after the run that gives the last of `pixels` bytes."""
    given = 0
    while given < pixels:
        if place >= stop:
            raise Quarantined(Reason.UNREADABLE)
        head = frame[place]
        if head < 128:
            given, place = given + head + 1, place + head + 2
        else:
            given, place = given + (257 - head if head > 128 else 0), place + (2 if head > 128 else 1)
    return min(place, stop)
