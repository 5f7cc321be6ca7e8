"""The size that a compressed frame states, read before a decoder allocates for it."""

import struct

from fedmed.dicom.reasons import Quarantined, Reason

# Start-of-frame markers of JPEG (ISO 10918-1 table B.1) and JPEG-LS (ISO 14495-1 table C.1).
_START_OF_FRAME = {*range(0xC0, 0xD0), 0xF7} - {0xC4, 0xC8, 0xCC}
_STANDALONE = {0x01, *range(0xD0, 0xD9)}
_MAX_TILES = 65535
_SIZ = b"\xff\x4f\xff\x51"


def check_codestream(code: bytes, *, rows: int, columns: int, samples: int, jpeg_2000: bool) -> None:
    """Raise unless a compressed frame is of the size that the file states.

    Without this check a 200-byte header makes a decoder allocate gigabytes. `DECODE_FAILED` where the frame has no
    header, `IMPLAUSIBLE_SIZE` where it contradicts the file.
    """
    try:
        stated = _jpeg_2000_size(code) if jpeg_2000 else _jpeg_size(code)
    except (struct.error, IndexError):
        stated = None
    if stated is None:
        raise Quarantined(Reason.DECODE_FAILED)
    if stated != (rows, columns, samples):
        raise Quarantined(Reason.IMPLAUSIBLE_SIZE)


def _jpeg_2000_size(code: bytes) -> tuple[int, int, int] | None:
    # ISO 15444-1 A.5.1; a frame may be wrapped in JP2 boxes, whose headers are short.
    start = code.find(_SIZ, 0, 4096)
    if start < 0:
        return None
    right, bottom, left, top, tile_width, tile_height, _, _, components = struct.unpack_from(
        ">8IH", code, start + 8
    )
    if not tile_width or not tile_height:
        return None
    tiles = -(-right // tile_width) * -(-bottom // tile_height)
    # Subsampled components (XRsiz, YRsiz) are not used in DICOM; they would be caught after decoding.
    return (bottom - top, right - left, components) if tiles <= _MAX_TILES else (0, 0, 0)


def _jpeg_size(code: bytes) -> tuple[int, int, int] | None:
    if code[:2] != b"\xff\xd8":
        return None
    at = 2
    while at + 4 <= len(code):
        if code[at] != 0xFF:
            return None
        marker = code[at + 1]
        if marker == 0xFF or marker in _STANDALONE:
            at += 1 if marker == 0xFF else 2
        elif marker in _START_OF_FRAME:
            _, rows, columns, components = struct.unpack_from(">BHHB", code, at + 4)
            return rows, columns, components
        else:
            at += 2 + struct.unpack_from(">H", code, at + 2)[0]
    return None
