"""Text drawn into pixels: what a file says of it, and masking (PS3.15 E.3.1, Clean Pixel Data).

What is not detected, since nothing here reads the pixels:

- text in a file that says `BurnedInAnnotation` NO, or says nothing and comes from a modality that seldom
  draws text (CT, MR, CR, DX, MG): a name written on a film before it was put on the detector, for example;
- text in a reformatted slice or a processed picture of these modalities, unless it is stored as a secondary capture;
- text inside the region that masking keeps (measurements or a name on top of the ultrasound picture);
- faces, which can be rebuilt from CT or MR of the head (`RecognizableVisualFeatures`).
"""

import csv
from collections.abc import Iterable
from dataclasses import dataclass, fields
from enum import StrEnum
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydicom import Dataset
from pydicom.pixels import pixel_array

from fedmed.dicom.reasons import Quarantined, Reason
from fedmed.errors import DataError

# Modalities whose pixels are usually a screen, a camera's picture or a scanned sheet.
SCREEN_MODALITIES = frozenset(
    [
        "US",
        "IVUS",
        "BDUS",
        "BMD",
        "ES",
        "XC",
        "GM",
        "DOC",
        "SC",
        "OT",
        "DG",
        "ECG",
        "EPS",
        "HD",
        "HC",
        "RG",
        "TG",
    ]
)
# Of these, SECONDARY says that a slice was reformatted or a picture processed, not that a screen was copied.
RECONSTRUCTED = frozenset({"CT", "MR", "CR", "DX", "MG"})
_SECONDARY_CAPTURE = "1.2.840.10008.5.1.4.1.1.7"
# Columns of a regions' file that are text.
_WORDS = ("manufacturer", "model", "modality")
# No ultrasound or screen is larger; a file that says so is not worth the memory.
_MAX_PIXELS = 1 << 26
# SequenceOfUltrasoundRegions: 1 two-dimensional, 2 M-mode, 3 spectral, 4 wave form; 5 is graphics.
_PICTURES = frozenset({1, 2, 3, 4})


class Verdict(StrEnum):
    """What a file's attributes say about text in its pixels."""

    DECLARED_FREE = "declared_free"
    """The file says NO, and nothing in it says otherwise."""
    UNLIKELY = "unlikely"
    """The file says nothing; its modality seldom draws text."""
    LIKELY = "likely"
    """The file says nothing, or NO for a picture of a screen."""
    DECLARED = "declared"
    """The file says YES."""

    @property
    def suspect(self) -> bool:
        """True where the pixels must be masked or the file refused."""
        return self in (Verdict.LIKELY, Verdict.DECLARED)


@dataclass(frozen=True, kw_only=True)
class KnownRegion:
    """Where a device writes text: pixels `[top:bottom, left:right]` of its pictures of a given size.

    A site declares what it has looked at; none is built in.
    """

    manufacturer: str
    model: str
    modality: str
    rows: int
    columns: int
    top: int
    left: int
    bottom: int
    right: int

    def __post_init__(self) -> None:
        if not (0 <= self.top < self.bottom <= self.rows and 0 <= self.left < self.right <= self.columns):
            raise ValueError(
                f"region={self.top},{self.left},{self.bottom},{self.right}:"
                f" expected a rectangle within {self.rows} rows and {self.columns} columns"
            )

    def matches(self, dataset: Dataset) -> bool:
        return (
            _text(dataset, "Manufacturer") == self.manufacturer
            and _text(dataset, "ManufacturerModelName") == self.model
            and _text(dataset, "Modality") == self.modality
            and (dataset.get("Rows"), dataset.get("Columns")) == (self.rows, self.columns)
        )


def read_regions(path: Path) -> tuple[dict[str, Any], ...]:
    """The fields of a `KnownRegion` in each row of a CSV file that has them as columns.

    Raises:
        DataError: no such file, another column, or a row that is no rectangle of pixels; by its line.
    """
    columns = [field.name for field in fields(KnownRegion)]
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, skipinitialspace=True)
            found = list(reader)
    except (OSError, UnicodeDecodeError, csv.Error):
        raise DataError(f"{path}: cannot be read as CSV in UTF-8") from None
    if sorted(reader.fieldnames or ()) != sorted(columns):
        raise DataError(f"{path}: expected the columns {','.join(columns)}")
    regions = []
    for line, row in enumerate(found, start=2):
        try:
            region: dict[str, Any] = {
                name: row[name] if name in _WORDS else int(row[name]) for name in columns
            }
            KnownRegion(**region)
        except (ValueError, TypeError):
            raise DataError(f"{path}: line {line} is no rectangle of pixels within an image") from None
        regions.append(region)
    return tuple(regions)


def _text(dataset: Dataset, name: str) -> str:
    return str(dataset.get(name) or "").strip(" \0")


def burned_in(dataset: Dataset, regions: Iterable[KnownRegion] = ()) -> Verdict:
    """Whether text may be drawn into the pixels of `dataset`, judged from its attributes alone.

    A device of which `regions` says where it writes is suspected whatever its files declare. Overlays
    (group 60xx) are no part of this: they are always removed, also from a pixel's unused bits.
    """
    if not any(name in dataset for name in ("PixelData", "FloatPixelData", "DoubleFloatPixelData")):
        return Verdict.DECLARED_FREE
    declared = _text(dataset, "BurnedInAnnotation").upper()
    if declared == "YES":
        return Verdict.DECLARED
    image_type = " ".join(str(value) for value in np.atleast_1d(dataset.get("ImageType") or "")).upper()
    if "SCREEN" in image_type or any(region.matches(dataset) for region in regions):
        return Verdict.LIKELY
    if declared == "NO":
        return Verdict.DECLARED_FREE
    likely = (
        _text(dataset, "Modality").upper() in SCREEN_MODALITIES
        or not _text(dataset, "Modality")
        or _text(dataset, "SOPClassUID").startswith(_SECONDARY_CAPTURE)
        or ("SECONDARY" in image_type and _text(dataset, "Modality").upper() not in RECONSTRUCTED)
        or "ConversionType" in dataset
        or "SequenceOfUltrasoundRegions" in dataset
    )
    return Verdict.LIKELY if likely else Verdict.UNLIKELY


def blank(dataset: Dataset, regions: Iterable[KnownRegion]) -> NDArray[np.bool_] | None:
    """(rows, columns), True where text may stand: outside the ultrasound regions, or in a device's known ones.

    None where neither is known, where they would blank nothing, or for a picture of absurd size.
    """
    rows, columns = int(dataset.get("Rows") or 0), int(dataset.get("Columns") or 0)
    if rows * columns > _MAX_PIXELS:
        return None
    mask = np.zeros((rows, columns), bool)
    pictures = np.zeros((rows, columns), bool)
    for item in dataset.get("SequenceOfUltrasoundRegions") or ():
        left, top, right, bottom = (
            int(item.get(f"RegionLocation{corner}") or 0) for corner in ("MinX0", "MinY0", "MaxX1", "MaxY1")
        )
        if item.get("RegionSpatialFormat") in _PICTURES and 0 <= top < bottom and 0 <= left < right:
            pictures[top : bottom + 1, left : right + 1] = True
    if pictures.any():
        mask = ~pictures
    for region in regions:
        if region.matches(dataset):
            mask[region.top : region.bottom, region.left : region.right] = True
    return mask if mask.any() else None


def text_to_blank(
    dataset: Dataset, *, mask: bool, regions: Iterable[KnownRegion] = ()
) -> NDArray[np.bool_] | None:
    """(rows, columns), True where text may stand and is to be blanked; None for a picture that needs no cleaning.

    Args:
        mask: blank what can be told apart from the picture; else a picture that may hold text is refused.

    Raises:
        Quarantined: text may be in the pixels, and either nothing tells where, or `mask` is not wanted.
    """
    if not burned_in(dataset, regions).suspect:
        return None
    found = blank(dataset, regions) if mask else None
    if found is None:
        raise Quarantined(Reason.BURNED_IN_TEXT)
    return found


def mask_pixels(dataset: Dataset, mask: NDArray[np.bool_]) -> None:
    """Blank the pixels under `mask` (rows, columns) in every frame, in place.

    The pixels are decoded and stored uncompressed (Explicit VR Little Endian); colours become RGB; the
    pixels outside the mask keep their decoded values.

    Raises:
        Quarantined: the pixels cannot be decoded or stored.
    """
    try:
        photometric = str(dataset.PhotometricInterpretation)
        stored = int(dataset.get("BitsStored") or dataset.BitsAllocated)
        values = np.array(pixel_array(dataset))
        if photometric.startswith("YBR"):
            photometric = "RGB"
        places: Any = mask
        if int(dataset.get("NumberOfFrames") or 1) > 1:
            places = (slice(None), mask)
        values[places] = _black(dataset, photometric, stored)
        dataset.set_pixel_data(values, photometric, stored, generate_instance_uid=False)
        for name in ("ExtendedOffsetTable", "ExtendedOffsetTableLengths"):
            dataset.pop(name, None)
    except Exception:
        # Its text may hold a value of the file.
        raise Quarantined(Reason.UNREADABLE) from None


def _black(dataset: Dataset, photometric: str, stored: int) -> int:
    signed = dataset.get("PixelRepresentation", 0) == 1
    low, high = (-(1 << (stored - 1)), (1 << (stored - 1)) - 1) if signed else (0, (1 << stored) - 1)
    return high if photometric == "MONOCHROME1" else low
