"""One DICOM file into facts and pixels. Runs in a worker process; raises `Quarantined` for what cannot be used."""

import io
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydicom.datadict import tag_for_keyword
from pydicom.dataset import Dataset

from fedmed.dicom.deid.burned_in import KnownRegion, mask_pixels, text_to_blank
from fedmed.dicom.deid.deidentify import Deidentifier, DeidentifyOptions
from fedmed.dicom.hashes import keyed_hash
from fedmed.dicom.image.pixels import Frames, Window, read_frames, to_display
from fedmed.dicom.image.slices import dicom_slices
from fedmed.dicom.parse import parse
from fedmed.dicom.reasons import Quarantined, Reason

READER = "dicom/1"
# Modalities whose single-frame files are slices of a volume.
SLICED = ("CT", "MR")
DATES = ("StudyDate", "AcquisitionDate", "ContentDate")
_ROWS = 0x00280010
_PIXELS = (0x7FE00010, 0x7FE00008, 0x7FE00009)
_TAGS = {
    name: int(tag_for_keyword(name) or 0)
    for name in ("Modality", "PatientID", "PatientBirthDate", "StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID",
                 "Manufacturer", *DATES)
}  # fmt: skip
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
        self._pixels: io.FileIO | None = None

    def read(self, path: str) -> dict[str, Any]:
        """Facts of one image file, as JSON: keyed hashes, numbers and words that name nobody. Its pixels are stored.

        Raises:
            Quarantined: it cannot be used.
            StoreFailed: the pixels cannot be stored.
        """
        dataset = parse(path)
        if dataset.file_meta.get("MediaStorageSOPClassUID") == _DIRECTORY:
            raise Quarantined(Reason.NOT_AN_IMAGE)
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
            facts |= {"slices": [vars(one) for one in dicom_slices(dataset)], "inverted": frames.inverted}
            values = _windowed_later(frames, facts)
        facts |= self._store(values)
        if self.deidentifier is not None:
            facts["deidentified"] = self._write(dataset)
        return facts

    def _identity(self, dataset: Dataset) -> dict[str, Any]:
        """Whose it is and what it is, which only the holder of the key can lead back to a person."""
        texts = Texts(dataset)
        if _ROWS not in texts.raw or not any(tag in texts.raw for tag in _PIXELS):
            raise Quarantined(Reason.NOT_AN_IMAGE)
        modality = texts["Modality"]
        if modality not in self.modalities:
            raise Quarantined(Reason.MODALITY)
        patient = texts["PatientID"]
        if not patient:
            raise Quarantined(Reason.PATIENT_ID_MISSING)
        uids = {
            kind: texts[f"{name}InstanceUID"]
            for kind, name in (("study", "Study"), ("series", "Series"), ("instance", "SOP"))
        }
        if not all(uids.values()):
            raise Quarantined(Reason.UID_MISSING)
        birth = re.sub(r"\D", "", texts["PatientBirthDate"])
        return {
            "patient": keyed_hash(self.key, "patient", patient),
            "birth": keyed_hash(self.key, "birth", birth) if birth else "",
            **{kind: keyed_hash(self.key, kind, uid) for kind, uid in uids.items()},
            "modality": modality,
            "manufacturer": " ".join(texts["Manufacturer"].split())[:64],
            "year": _year(texts),
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
        start = None
        try:
            # Only now: a disk that takes no file at all is an outcome as well.
            if self._pixels is None:
                self._pixels = (self.folder / self.part).open("ab", buffering=0)
            start, written = self._pixels.tell(), 0
            while written < len(content):
                written += self._pixels.write(content[written:]) or 0
        except OSError as error:
            if self._pixels is not None and start is not None:
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


class Texts:
    """The elements of a data set as text without surrounding blanks, by keyword; '' where one is absent or empty."""

    def __init__(self, dataset: Dataset) -> None:
        self._dataset = dataset
        # Unconverted, and by tags that are compared as numbers: a tenth of the time.
        self.raw: dict[Any, Any] = dict(dataset.items())

    def __getitem__(self, keyword: str) -> str:
        raw = getattr(self.raw.get(_TAGS[keyword]), "value", None)
        if isinstance(raw, bytes) and raw.isascii():
            return raw.decode().strip(" \0")
        value = self._dataset.get(keyword)
        return "" if value is None else str(value).strip(" \0")


def _year(texts: Texts) -> int | None:
    for keyword in DATES:
        digits = texts[keyword][:4]
        if digits.isascii() and digits.isdigit() and 1900 <= int(digits) <= 2100:
            return int(digits)
    return None
