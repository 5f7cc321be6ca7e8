"""The folder that ingestion leaves behind: pixels in one memory-mapped file, a table of records, a manifest.

The manifest is written last and in one step: a folder without it is not a dataset, whatever else lies in it.
"""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from fedmed.atomic import write_json
from fedmed.dicom.reasons import Reason
from fedmed.errors import DataError

FORMAT = "fedmed-images/1"
PIXELS, RECORDS, MANIFEST = "pixels.npy", "records.csv", "manifest.json"
TEXTS = ("patient", "label", "modality", "manufacturer", "year")
WHOLES = ("record", "frames", "rows", "columns", "channels", "offset")
SPACINGS = ("row_spacing", "column_spacing", "slice_spacing")
COLUMNS = (
    "record", "patient", "label", "modality", "frames", "rows", "columns", "channels", "offset", "manufacturer",
    "year", *SPACINGS,
)  # fmt: skip
KEYS = frozenset({
    "format", "reader", "content_sha256", "size", "records", "patients", "by_modality", "by_label",
    "by_manufacturer", "by_year", "quarantine", "labels", "warnings", "deidentified",
})  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class StoredImage:
    """One image, clip or volume, as it goes into the store.

    Attributes:
        pixels: (frames, rows, columns) or (frames, rows, columns, 3) uint16, 0 black to 65535 white.
        patient: 32 hex digits, as `fedmed.data.split.pseudonym` makes them.
        label: a class of the labels' table; blank where there is none.
        row_spacing, column_spacing, slice_spacing: millimetres between centres; None where unknown.
    """

    pixels: NDArray[np.uint16] = field(repr=False)
    patient: str = field(repr=False)
    label: str = field(default="", repr=False)
    modality: str = ""
    manufacturer: str = ""
    year: str = ""
    row_spacing: float | None = None
    column_spacing: float | None = None
    slice_spacing: float | None = None

    def __post_init__(self) -> None:
        shape = self.pixels.shape
        ok = self.pixels.dtype == np.uint16 and (len(shape) == 3 or (len(shape) == 4 and shape[3] == 3))
        if not ok or 0 in shape:
            raise DataError(
                f"an image of shape {shape} and type {self.pixels.dtype}: expected (frames, rows, columns[, 3]) uint16"
            )


@dataclass(frozen=True, kw_only=True)
class ImageStore:
    """An ingested folder, opened: facts in memory, pixels mapped from the disk.

    Attributes:
        records: one row a record, the columns `COLUMNS`; texts are never missing, unknown spacings are NaN.
        pixels: (values,) uint16 of all records, one after the other.
    """

    path: Path
    manifest: dict[str, Any]
    records: pd.DataFrame
    pixels: NDArray[np.uint16]

    @classmethod
    def open(cls, path: str | Path, *, verify: bool = False) -> "ImageStore":
        """The store in a folder.

        Args:
            verify: also hold the content against the manifest's digest, which reads every byte.

        Raises:
            DataError: no such folder, one that ingestion never finished, or a damaged one.
        """
        path = Path(path)
        manifest = read_manifest(path)
        try:
            records = _read_records(path / RECORDS)
            pixels = np.load(path / PIXELS, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, KeyError, pd.errors.ParserError):
            # The parser's words are not shown: they may quote a cell.
            raise _damaged(path) from None
        whole = (
            manifest["records"] == len(records) > 0
            and manifest["patients"] == records["patient"].nunique()
            and pixels.dtype == np.uint16
            and pixels.ndim == 1
            and _contiguous(records, len(pixels))
        )
        if not whole or (verify and manifest["content_sha256"] != content_sha256(path)):
            raise _damaged(path)
        return cls(path=path, manifest=manifest, records=records, pixels=pixels)

    @cached_property
    def _places(self) -> list[list[int]]:
        names = ["frames", "rows", "columns", "channels", "offset"]
        # Row by row, pandas would take longer than the pixels.
        return self.records[names].to_numpy(dtype=np.int64).tolist()

    def image(self, record: int) -> NDArray[np.uint16]:
        """The pixels of one record: (frames, rows, columns) or (frames, rows, columns, 3), not copied."""
        frames, rows, columns, channels, offset = self._places[record]
        flat = self.pixels[offset : offset + frames * rows * columns * channels]
        return flat.reshape((frames, rows, columns) if channels == 1 else (frames, rows, columns, channels))


def write_store(
    path: str | Path,
    *,
    images: Iterable[StoredImage],
    size: int = 0,
    reader: str = "dicom/1",
    quarantine: Mapping[str, int] | None = None,
    labels: Mapping[str, int] | None = None,
    warnings: Iterable[str] = (),
    deidentified: bool = False,
) -> dict[str, Any]:
    """Write a store, one image in memory at a time, and return its manifest.

    Until the last step the folder holds no manifest, not even an earlier one.

    Args:
        size: the longest side that images were resampled to; 0: as they came.
        quarantine: reason -> files left out.
        labels: the counts `unmatched_rows` and `unmatched_images`.

    Raises:
        DataError: there is no image at all.
        OSError: the disk is full or cannot be written to.
    """
    path = Path(path)
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    (path / MANIFEST).unlink(missing_ok=True)
    with _private(path / PIXELS) as file:
        records = _write_pixels(file, images)
        _flush(file)
    if records.empty:
        raise DataError(f"{path}: no image to keep")
    with _private(path / RECORDS) as file:
        file.write(records.to_csv(index=False, lineterminator="\n").encode())
        _flush(file)
    manifest = {
        "format": FORMAT,
        "reader": reader,
        "content_sha256": content_sha256(path),
        "size": size,
        "records": len(records),
        "patients": int(records["patient"].nunique()),
        **{f"by_{name}": _counts(records, name) for name in ("modality", "label", "manufacturer", "year")},
        "quarantine": dict(quarantine or {}),
        "labels": {"unmatched_rows": 0, "unmatched_images": 0, **(labels or {})},
        "warnings": list(warnings),
        "deidentified": deidentified,
    }
    write_json(path / MANIFEST, manifest)
    return manifest


def read_manifest(path: Path) -> dict[str, Any]:
    """What is known of the store without opening its pixels.

    Raises:
        DataError: no such folder, one that ingestion never finished, or a manifest that is damaged or of another
            format.
    """
    try:
        manifest = json.loads((path / MANIFEST).read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        made = "ingestion was not finished there" if path.is_dir() else "no such folder"
        raise DataError(f"{path}: {made}; make it with: fedmed site ingest SRC DST") from None
    except PermissionError:
        raise DataError(f"{path}: no permission to read it") from None
    except (OSError, ValueError):
        raise _damaged(path) from None
    if isinstance(manifest, dict) and manifest.get("format") not in (None, FORMAT):
        raise DataError(f"{path}: written by another version of fedmed; ingest it again")
    if not isinstance(manifest, dict) or not manifest.keys() >= KEYS or not _sound(manifest):
        raise _damaged(path)
    return manifest


def _sound(manifest: dict[str, Any]) -> bool:
    """Whether its values are of the kinds that `write_store` writes."""
    tables = ("by_modality", "by_label", "by_manufacturer", "by_year", "quarantine", "labels")
    return (
        all(type(manifest[name]) is int for name in ("size", "records", "patients"))
        and isinstance(manifest["content_sha256"], str)
        and all(
            isinstance(manifest[name], dict) and all(type(count) is int for count in manifest[name].values())
            for name in tables
        )
        and manifest["quarantine"].keys() <= set(Reason)
        and manifest["labels"].keys() >= {"unmatched_rows", "unmatched_images"}
        and isinstance(manifest["warnings"], list)
        and all(isinstance(warning, str) for warning in manifest["warnings"])
    )


def content_sha256(path: Path) -> str:
    """One digest of the pixels and the records. It stays at the site."""
    digest = hashlib.sha256()
    for name in (PIXELS, RECORDS):
        with (path / name).open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def _write_pixels(file: BinaryIO, images: Iterable[StoredImage]) -> pd.DataFrame:
    """Write the pixels; the table of what was written."""
    # NumPy leaves room in the header for a longer first axis, so that it can be written again.
    _header(file, 0)
    start, offset, rows = file.tell(), 0, []
    for number, image in enumerate(images):
        pixels = np.ascontiguousarray(image.pixels, dtype="<u2")
        frames, height, width, *channels = pixels.shape
        rows.append({
            **{name: getattr(image, name) for name in (*TEXTS, *SPACINGS)},
            "record": number, "frames": frames, "rows": height, "columns": width,
            "channels": channels[0] if channels else 1, "offset": offset,
        })  # fmt: skip
        file.write(pixels.data)
        offset += pixels.size
    file.seek(0)
    _header(file, offset)
    if file.tell() != start:
        raise RuntimeError("NumPy's header changed its length")
    return pd.DataFrame(rows, columns=list(COLUMNS))


def _header(file: BinaryIO, values: int) -> None:
    header = {"descr": "<u2", "fortran_order": False, "shape": (values,)}
    np.lib.format.write_array_header_1_0(file, header)


def _read_records(path: Path) -> pd.DataFrame:
    cells = pd.read_csv(path, dtype=str, keep_default_na=False, encoding="utf-8")
    if tuple(cells.columns) != COLUMNS:
        raise ValueError
    for name in WHOLES:
        cells[name] = cells[name].astype(np.int64)
    for name in SPACINGS:
        cells[name] = [float(cell) if cell else np.nan for cell in cells[name]]
    # What becomes a pseudonym: 16 bytes.
    if not cells["patient"].str.fullmatch(r"[0-9a-f]{32}").all():
        raise ValueError
    return cells


def _contiguous(records: pd.DataFrame, values: int) -> bool:
    """Whether the records lie one after the other in the file and fill it."""
    shape = records[["frames", "rows", "columns", "channels"]].to_numpy(dtype=np.int64)
    if (shape < 1).any() or (shape > 2**31).any() or not np.isin(shape[:, 3], (1, 3)).all():
        return False
    # As Python's integers, which do not overflow.
    ends = np.cumsum([int(a) * int(b) * int(c) * int(d) for a, b, c, d in shape], dtype=object)
    starts = [0, *ends[:-1]]
    return (
        ends[-1] == values
        and records["offset"].tolist() == starts
        and records["record"].tolist() == list(range(len(records)))
    )


def _counts(records: pd.DataFrame, name: str) -> dict[str, int]:
    return dict(sorted(Counter(map(str, records[name])).items()))


def _private(path: Path) -> BinaryIO:
    """A new file that its owner alone can read."""
    path.unlink(missing_ok=True)
    return os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb")


def _flush(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _damaged(path: Path) -> DataError:
    return DataError(f"{path}: the ingested data is damaged; ingest it again")
