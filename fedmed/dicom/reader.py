"""One DICOM file into facts and pixels. Runs in a worker process; raises `Quarantined` for what cannot be used."""

import io
import os
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom.dataset import Dataset
from pydicom.errors import InvalidDicomError

from fedmed.dicom.burned_in import KnownRegion, mask_pixels, text_to_blank
from fedmed.dicom.deidentify import Deidentifier, DeidentifyOptions
from fedmed.dicom.hashes import keyed_hash
from fedmed.dicom.pixels import Frames, Window, read_frames, to_display
from fedmed.dicom.reasons import Quarantined, Reason
from fedmed.dicom.slices import dicom_slices

READER = "dicom/1"
# Modalities whose single-frame files are slices of a volume.
SLICED = ("CT", "MR")
# A file without preamble, as old systems wrote it, begins with an element of group 0008, in either byte order.
_BARE = (b"\x08\x00", b"\x00\x08")
# A file that parses within any worker's memory.
SMALL = 20 * 2**20
_PIXELS = (0x7FE00010, 0x7FE00008, 0x7FE00009)
_DIRECTORY = "1.2.840.10008.1.3.10"


class StoreFailed(OSError):
    """Our own file could not be written, which is no fault of the file that was read."""


class Reader:
    """Reads files one after the other, and appends their pixels to a file of its own.

    Args:
        settings: `key` (hex), `folder` (where pixels and de-identified files go), and the fields of `Options`.
    """

    def __init__(self, settings: dict[str, Any]) -> None:
        self.key = bytes.fromhex(settings["key"])
        self.size: int = settings["size"]
        self.modalities = frozenset(settings["modalities"])
        self.window = (
            Window(function="linear", center=settings["window"][0], width=settings["window"][1])
            if settings["window"]
            else None
        )
        self.burned_in: str = settings["burned_in"]
        self.regions = tuple(KnownRegion(**region) for region in settings["regions"])
        self.folder = Path(settings["folder"])
        self.deidentifier = (
            Deidentifier(
                self.key,
                DeidentifyOptions(
                    modified_dates=settings["modified_dates"],
                    retain_uids=settings["keep_uids"],
                    burned_in="mask" if self.burned_in == "mask" else "refuse",
                    known_regions=self.regions,
                ),
            )
            if settings["deidentify"]
            else None
        )
        self.part = f"part-{os.getpid()}-{os.urandom(4).hex()}.bin"
        self._pixels = (self.folder / self.part).open("ab", buffering=0)

    def read(self, path: str) -> dict[str, Any]:
        """Facts of one image file, as JSON: keyed hashes, numbers and words that name nobody. Its pixels are stored.

        Raises:
            Quarantined: it cannot be used.
            StoreFailed: the pixels cannot be stored.
        """
        dataset = parse(path)
        facts = self._identity(dataset)
        if self.deidentifier is not None:
            dataset = self.deidentifier.deidentify(dataset)
        elif self.burned_in != "keep":
            mask = text_to_blank(dataset, mask=self.burned_in == "mask", regions=self.regions)
            if mask is not None:
                mask_pixels(dataset, mask)
        sliced = facts["modality"] in SLICED
        window = self.window if facts["modality"] == "CT" else None
        frames = read_frames(dataset, size=self.size, modality_values=sliced, window=window)
        facts |= {"spacing": [frames.row_spacing, frames.column_spacing]}
        values = frames.values
        if sliced and frames.window is not None:
            facts |= {"slices": [asdict(one) for one in dicom_slices(dataset)], "inverted": frames.inverted}
            values = _windowed_later(frames, facts)
        facts |= self._store(values)
        if self.deidentifier is not None:
            facts["deidentified"] = self._write(dataset)
        return facts

    def _identity(self, dataset: Dataset) -> dict[str, Any]:
        """Whose it is and what it is, which only the holder of the key can lead back to a person."""
        if "Rows" not in dataset or not any(tag in dataset for tag in _PIXELS):
            raise Quarantined(Reason.NOT_AN_IMAGE)
        modality = _text(dataset, "Modality")
        if modality not in self.modalities:
            raise Quarantined(Reason.MODALITY)
        patient = _text(dataset, "PatientID")
        if not patient:
            raise Quarantined(Reason.PATIENT_ID_MISSING)
        uids = {
            kind: _text(dataset, f"{name}InstanceUID")
            for kind, name in (("study", "Study"), ("series", "Series"), ("instance", "SOP"))
        }
        if not all(uids.values()):
            raise Quarantined(Reason.UID_MISSING)
        birth = re.sub(r"\D", "", _text(dataset, "PatientBirthDate"))
        return {
            "patient": keyed_hash(self.key, "patient", patient),
            "birth": keyed_hash(self.key, "birth", birth) if birth else "",
            **{kind: keyed_hash(self.key, kind, uid) for kind, uid in uids.items()},
            "modality": modality,
            "manufacturer": " ".join(_text(dataset, "Manufacturer").split())[:64],
            "year": _year(dataset),
        }

    def _write(self, dataset: Dataset) -> str:
        """Write a de-identified file to where its new UIDs say, and return its name."""
        study, series, instance = (
            str(dataset.get(f"{name}InstanceUID")) for name in ("Study", "Series", "SOP")
        )
        name = f"{study}/{series}/{instance}.dcm"
        path = self.folder / "dicom" / name
        content = io.BytesIO()
        # Whatever cannot be written as DICOM is the file's fault; what cannot be put on the disk is ours.
        dataset.save_as(content, enforce_file_format=True)
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            path.write_bytes(content.getvalue())
        except OSError as error:
            raise StoreFailed(error.errno, "") from None
        return name

    def _store(self, values: NDArray[Any]) -> dict[str, Any]:
        """Append values to our file, whole or not at all."""
        content = np.ascontiguousarray(values).data.cast("B")
        start = self._pixels.tell()
        try:
            written = 0
            while written < len(content):
                written += self._pixels.write(content[written:]) or 0
        except OSError as error:
            os.ftruncate(self._pixels.fileno(), start)
            raise StoreFailed(error.errno, "") from None
        return {
            "part": self.part,
            "offset": start,
            "shape": list(values.shape),
            "type": values.dtype.name,
            "bytes": len(content),
        }


def _windowed_later(frames: Frames, facts: dict[str, Any]) -> NDArray[Any]:
    """The values of slices, and how they are to be shown, which is chosen once a volume.

    A table of greys is not a matter of a centre and a width: it is applied at once.
    """
    window = frames.window
    assert window is not None
    if window.function == "table":
        return to_display(frames.values, window, inverted=frames.inverted)
    facts["window"] = {"function": window.function, "center": window.center, "width": window.width}
    return frames.values


def parse(path: str) -> Dataset:
    """The file's data set, its pixels not yet decoded.

    Raises:
        Quarantined: it does not begin as DICOM does, or is a DICOMDIR.
    """
    try:
        dataset = pydicom.dcmread(path)
    except MemoryError:
        # A length that no file has, in one that is damaged; a file of this size can be opened.
        if os.path.getsize(path) < SMALL:
            raise Quarantined(Reason.UNREADABLE) from None
        raise
    except InvalidDicomError:
        with open(path, "rb") as file:
            if file.read(2) not in _BARE:
                raise Quarantined(Reason.NOT_DICOM) from None
        dataset = pydicom.dcmread(path, force=True)
    if dataset.file_meta.get("MediaStorageSOPClassUID") == _DIRECTORY:
        raise Quarantined(Reason.NOT_AN_IMAGE)
    return dataset


def _text(dataset: Dataset, keyword: str) -> str:
    """An element's value without surrounding blanks; '' where it is absent, empty, or several."""
    value = dataset.get(keyword)
    return "" if value is None else str(value).strip(" \0")


def _year(dataset: Dataset) -> int | None:
    for keyword in ("StudyDate", "AcquisitionDate", "ContentDate"):
        digits = _text(dataset, keyword)[:4]
        if digits.isascii() and digits.isdigit() and 1900 <= int(digits) <= 2100:
            return int(digits)
    return None
