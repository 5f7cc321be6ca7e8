"""How one file's pixels are laid out, checked before anything is decoded or allocated."""

from dataclasses import dataclass

from pydicom.dataset import Dataset

from fedmed.dicom.image.elements import Elements
from fedmed.dicom.reasons import Quarantined, Reason

MAX_FRAME_PIXELS = 1 << 25
"""Pixels of a frame: twice the largest detector in use (mammography, 4,096 x 3,328), and 134 MB as float32."""
MAX_FRAMES = 1 << 14
"""Frames of a file."""
MAX_STORED_BYTES = 1 << 32
"""Bytes of all frames when not compressed."""

PIXEL_DATA = 0x7FE00010
FLOAT_PIXEL_DATA = 0x7FE00008
DOUBLE_PIXEL_DATA = 0x7FE00009

_SAMPLES = {
    "MONOCHROME1": 1,
    "MONOCHROME2": 1,
    "PALETTE COLOR": 1,
    "RGB": 3,
    "YBR_FULL": 3,
    "YBR_FULL_422": 3,
    "YBR_ICT": 3,
    "YBR_RCT": 3,
}
_NATIVE = {"1.2.840.10008.1.2", "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.1.99", "1.2.840.10008.1.2.2"}
_JPEG_2000 = {"1.2.840.10008.1.2.4.90", "1.2.840.10008.1.2.4.91"} | {
    f"1.2.840.10008.1.2.4.{n}" for n in (201, 202, 203)
}


@dataclass(frozen=True, kw_only=True)
class PixelLayout:
    """The Image Pixel module (PS3.3 C.7.6.3): sizes in pixels, `bits_*` in bits, `photometric` a defined term."""

    tag: int
    transfer_syntax: str
    photometric: str
    rows: int
    columns: int
    frames: int
    samples: int
    bits_allocated: int
    bits_stored: int
    high_bit: int
    signed: bool
    planar: bool

    @property
    def native(self) -> bool:
        """Whether the pixel data is not compressed (deflated files are inflated when read)."""
        return self.transfer_syntax in _NATIVE

    @property
    def jpeg_2000(self) -> bool:
        """Whether the pixel data is JPEG 2000 or high-throughput JPEG 2000."""
        return self.transfer_syntax in _JPEG_2000

    @property
    def little_endian(self) -> bool:
        """The byte order of the file."""
        return self.transfer_syntax != "1.2.840.10008.1.2.2"

    @property
    def frame_bits(self) -> int:
        """Bits of one native frame; a pixel of YBR_FULL_422 has two samples on average (PS3.3 C.7.6.3.1.2)."""
        samples = 2 if self.photometric == "YBR_FULL_422" else self.samples
        return self.rows * self.columns * samples * self.bits_allocated


def read_layout(dataset: Dataset, elements: Elements) -> PixelLayout:
    """The layout of a dataset's pixels.

    Every field is plausible and consistent with the others afterwards; `Quarantined` otherwise. Costs no decoding.
    """
    tags = [tag for tag in (PIXEL_DATA, FLOAT_PIXEL_DATA, DOUBLE_PIXEL_DATA) if tag in elements]
    if not tags:
        raise Quarantined(Reason.NO_PIXELS)
    if len(tags) > 1:
        raise Quarantined(Reason.PIXEL_LAYOUT)
    syntax = getattr(dataset, "file_meta", {}).get("TransferSyntaxUID", None)
    if not syntax:
        raise Quarantined(Reason.TRANSFER_SYNTAX)
    floats = tags[0] != PIXEL_DATA
    samples = _required(elements, 0x00280002)
    allocated = _required(elements, 0x00280100)
    stored = allocated if floats else _required(elements, 0x00280101)
    high = elements.integer(0x00280102)
    frames = elements.integer(0x00280008)
    layout = PixelLayout(
        tag=tags[0],
        transfer_syntax=str(syntax),
        photometric=elements.text(0x00280004).replace("_COLOR", " COLOR"),
        rows=_required(elements, 0x00280010),
        columns=_required(elements, 0x00280011),
        # PS3.3 C.7.6.6: absent means one; present, it is at least 1.
        frames=1 if frames is None else frames,
        samples=samples,
        bits_allocated=allocated,
        bits_stored=stored,
        high_bit=stored - 1 if high is None or floats else high,
        signed=not floats and _flag(elements, 0x00280103, required=True),
        planar=samples > 1 and _flag(elements, 0x00280006, required=False),
    )
    _check_bits(layout)
    _check_sizes(layout)
    _check_colour(layout)
    return layout


def _required(elements: Elements, tag: int) -> int:
    value = elements.integer(tag)
    if value is None:
        raise Quarantined(Reason.MALFORMED_VALUE)
    return value


def _flag(elements: Elements, tag: int, *, required: bool) -> bool:
    value = elements.integer(tag)
    if value not in ((0, 1) if required else (0, 1, None)):
        raise Quarantined(Reason.PIXEL_LAYOUT)
    return value == 1


def _check_bits(layout: PixelLayout) -> None:
    allowed = {FLOAT_PIXEL_DATA: (32,), DOUBLE_PIXEL_DATA: (64,)}.get(layout.tag, (1, 8, 16, 32))
    if layout.bits_allocated not in allowed or not 1 <= layout.bits_stored <= layout.bits_allocated:
        raise Quarantined(Reason.IMPLAUSIBLE_SIZE)
    if not layout.bits_stored - 1 <= layout.high_bit < layout.bits_allocated:
        raise Quarantined(Reason.PIXEL_LAYOUT)
    if layout.bits_allocated == 1 and layout.signed:
        raise Quarantined(Reason.PIXEL_LAYOUT)
    # Decoders put the stored bits lowest; a file that says otherwise (allowed until PS3.5-2006) is read only natively.
    if not layout.native and layout.high_bit != layout.bits_stored - 1:
        raise Quarantined(Reason.PIXEL_LAYOUT)
    if not layout.native and layout.tag != PIXEL_DATA:
        raise Quarantined(Reason.PIXEL_LAYOUT)


def _check_sizes(layout: PixelLayout) -> None:
    sane = (
        1 <= layout.rows <= 65535
        and 1 <= layout.columns <= 65535
        and layout.frames >= 1
        and layout.samples in (1, 3)
    )
    if not sane:
        raise Quarantined(Reason.IMPLAUSIBLE_SIZE)
    too_large = (
        layout.rows * layout.columns > MAX_FRAME_PIXELS
        or layout.frames > MAX_FRAMES
        or layout.frame_bits * layout.frames > 8 * MAX_STORED_BYTES
    )
    if too_large:
        raise Quarantined(Reason.TOO_LARGE)


def _check_colour(layout: PixelLayout) -> None:
    if _SAMPLES.get(layout.photometric) != layout.samples:
        raise Quarantined(Reason.PHOTOMETRIC_INTERPRETATION)
    # The transforms of PS3.5 8.2.4 exist only inside JPEG 2000.
    if layout.photometric in ("YBR_ICT", "YBR_RCT") and not layout.jpeg_2000:
        raise Quarantined(Reason.PHOTOMETRIC_INTERPRETATION)
    # The conversion is defined for 8 bits (PS3.3 C.7.6.3.1.2).
    if layout.photometric in ("YBR_FULL", "YBR_FULL_422") and (layout.bits_stored, layout.bits_allocated) != (
        8,
        8,
    ):
        raise Quarantined(Reason.PHOTOMETRIC_INTERPRETATION)
    if layout.samples == 3 and (layout.signed or layout.tag != PIXEL_DATA or layout.bits_allocated == 1):
        raise Quarantined(Reason.PIXEL_LAYOUT)
    if layout.native and layout.photometric == "YBR_FULL_422" and (layout.planar or layout.columns % 2):
        raise Quarantined(Reason.PIXEL_LAYOUT)
    if layout.photometric == "PALETTE COLOR" and layout.bits_allocated not in (8, 16):
        raise Quarantined(Reason.PIXEL_LAYOUT)
