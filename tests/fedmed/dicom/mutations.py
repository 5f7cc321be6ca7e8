"""Real DICOM files, broken in every way that a disk, a network or an enemy breaks them."""

import io
import random
import struct
import zlib
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path

import pydicom
from pydicom.data import get_testdata_files
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import DeflatedExplicitVRLittleEndian

LARGEST = 300_000
_NUMBERS = ("Rows", "Columns", "NumberOfFrames", "SamplesPerPixel", "BitsAllocated", "BitsStored", "HighBit")
_SYNTAXES = (
    "1.2.840.10008.1.2", "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.2", "1.2.840.10008.1.2.5",
    "1.2.840.10008.1.2.4.50", "1.2.840.10008.1.2.4.70", "1.2.840.10008.1.2.4.80", "1.2.840.10008.1.2.4.90",
    "1.2.840.10008.1.2.1.99", "1.2.840.10008.1.2.4.201",
)  # fmt: skip


@lru_cache
def originals() -> list[bytes]:
    """pydicom's own test files of moderate size that hold pixels, made into files that an ingestion would read."""
    made = []
    for name in sorted(get_testdata_files()):
        if not Path(name).is_file() or Path(name).stat().st_size > LARGEST:
            continue
        try:
            dataset = pydicom.dcmread(name)
            if "PixelData" in dataset and "TransferSyntaxUID" in dataset.file_meta:
                made.append(whole(dataset))
        # Some of them are broken as they come.
        except (pydicom.errors.InvalidDicomError, AttributeError, NotImplementedError, ValueError, TypeError):
            continue
    return made


def whole(dataset: Dataset) -> bytes:
    """The data set as a file that names a patient and a modality that is read."""
    if dataset.get("Modality") not in ("CR", "DX", "CT", "MR", "US", "MG"):
        dataset.Modality = "DX"
    for keyword in ("PatientID", "StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID"):
        if not dataset.get(keyword):
            setattr(dataset, keyword, "1.2.3")
    dataset.BurnedInAnnotation = "NO"
    file = io.BytesIO()
    dataset.save_as(file, enforce_file_format=True)
    return file.getvalue()


def _truncated(content: bytes, draw: random.Random) -> bytes:
    return content[: draw.randrange(1, len(content))]


def _flipped(content: bytes, draw: random.Random) -> bytes:
    broken = bytearray(content)
    for _ in range(draw.choice((1, 4, 64))):
        broken[draw.randrange(128, len(broken))] ^= 1 << draw.randrange(8)
    return bytes(broken)


def _header(content: bytes, draw: random.Random) -> bytes:
    broken = bytearray(content)
    for _ in range(draw.randint(1, 8)):
        broken[draw.randrange(128, min(1500, len(broken)))] = draw.randrange(256)
    return bytes(broken)


def _pixels(content: bytes, draw: random.Random) -> bytes:
    """Broken only where the decoder works."""
    broken = bytearray(content)
    start = max(broken.rfind(b"\xe0\x7f\x10\x00"), 0)
    for _ in range(draw.randint(1, 32)):
        broken[draw.randrange(start, len(broken))] = draw.randrange(256)
    return bytes(broken)


def _moved(content: bytes, draw: random.Random) -> bytes:
    start, length = draw.randrange(132, len(content)), draw.randrange(1, 4096)
    piece = content[start : start + length]
    match draw.randrange(3):
        case 0:
            return content[:start] + content[start + length :]
        case 1:
            return content[:start] + piece * draw.randint(2, 5) + content[start:]
        case _:
            return content[:start] + draw.randbytes(length) + content[start:]


def _absurd(content: bytes, draw: random.Random) -> bytes:
    """Dimensions that no image has, or that its data cannot fill."""
    dataset = pydicom.dcmread(io.BytesIO(content))
    for name in draw.sample(_NUMBERS, draw.randint(1, 3)):
        number = draw.choice((0, 1, 3, 7, 255, 4096, 32767, 65535))
        setattr(dataset, name, number * 1000 if name == "NumberOfFrames" else number)
    return _saved(dataset, content)


def _long(content: bytes, draw: random.Random) -> bytes:
    """An element that claims to be larger than the file, or than any."""
    at = draw.randrange(132, len(content) - 4)
    return (
        content[:at]
        + struct.pack("<I", draw.choice((0xFFFFFFFF, 0x7FFFFFFF, 0xFFFFFFFE)))
        + content[at + 4 :]
    )


def _syntax(content: bytes, draw: random.Random) -> bytes:
    dataset = pydicom.dcmread(io.BytesIO(content))
    old = dataset.file_meta.TransferSyntaxUID.encode()
    new = draw.choice(_SYNTAXES).encode()
    return content.replace(
        old.ljust(len(old) + len(old) % 2, b"\0"), new[: len(old)].ljust(len(old) + len(old) % 2, b"\0"), 1
    )


def _recursion(content: bytes, draw: random.Random) -> bytes:
    """Sequences in sequences in sequences."""
    depth = draw.choice((100, 1000, 20_000))
    opened = struct.pack("<HH2sHI", 0x0008, 0x1140, b"SQ", 0, 0xFFFFFFFF) + struct.pack(
        "<HHI", 0xFFFE, 0xE000, 0xFFFFFFFF
    )
    return _with_first(content, opened * depth)


def _with_first(content: bytes, elements: bytes) -> bytes:
    """The file with bytes before its first element after the file meta information."""
    end = 132 + 12 + struct.unpack("<I", content[140:144])[0]
    return content[:end] + elements + content[end:]


def _bomb(_: bytes, draw: random.Random) -> bytes:
    """A deflated data set of a few hundred kilobytes that inflates to gigabytes."""
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    dataset.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.1"
    dataset.file_meta.MediaStorageSOPInstanceUID = "1.2.3"
    file = io.BytesIO()
    dataset.save_as(file, enforce_file_format=True)
    meta = file.getvalue()
    meta = meta[: 132 + 12 + struct.unpack("<I", meta[140:144])[0]]
    return meta + _zeros(draw.choice((600, 1200)))


@lru_cache
def _zeros(megabytes: int) -> bytes:
    packer = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    head = struct.pack("<HH2sHI", 0x7FE0, 0x0010, b"OW", 0, (megabytes << 20) & 0xFFFFFFFE)
    begun = packer.compress(head) + packer.flush(zlib.Z_FULL_FLUSH)
    # After a full flush each megabyte is packed as the one before it.
    megabyte = packer.compress(bytes(1 << 20)) + packer.flush(zlib.Z_FULL_FLUSH)
    return begun + megabytes * megabyte + packer.flush()


def _swollen(content: bytes, draw: random.Random) -> bytes:
    """Compressed pixels whose own header speaks of another size: JPEG, JPEG-LS and JPEG 2000 keep it in theirs."""
    broken = bytearray(content)
    for marker in (b"\xff\xc0", b"\xff\xc1", b"\xff\xc3", b"\xff\xf7", b"\xff\x51"):
        at = broken.find(marker, 132)
        if at >= 0:
            for place in range(at + 4, min(at + 40, len(broken))):
                if draw.random() < 0.3:
                    broken[place] = draw.choice((0, 0x7F, 0xFF))
            return bytes(broken)
    return _flipped(content, draw)


def _saved(dataset: Dataset, otherwise: bytes) -> bytes:
    file = io.BytesIO()
    try:
        dataset.save_as(file, enforce_file_format=True)
    except (ValueError, AttributeError, TypeError, struct.error):
        return otherwise[: len(otherwise) // 2]
    return file.getvalue()


MUTATIONS: tuple[Callable[[bytes, random.Random], bytes], ...] = (
    _truncated, _flipped, _header, _pixels, _moved, _absurd, _long, _syntax, _recursion, _bomb, _swollen,
)  # fmt: skip


def mutations(count: int, *, seed: int) -> Iterator[tuple[str, bytes]]:
    """`count` broken files, each kind of break in turn, with the name of the break."""
    draw = random.Random(seed)
    files = originals()
    for number in range(count):
        mutate = MUTATIONS[number % len(MUTATIONS)]
        yield mutate.__name__, mutate(draw.choice(files), draw)
