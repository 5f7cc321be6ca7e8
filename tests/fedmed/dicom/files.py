"""Small real DICOM files, each of whose attributes a test may choose."""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian

CLASSES = {
    "CR": "1.2.840.10008.5.1.4.1.1.1", "DX": "1.2.840.10008.5.1.4.1.1.1.1", "CT": "1.2.840.10008.5.1.4.1.1.2",
    "MR": "1.2.840.10008.5.1.4.1.1.4", "US": "1.2.840.10008.5.1.4.1.1.6.1", "MG": "1.2.840.10008.5.1.4.1.1.1.2",
}  # fmt: skip


def image(side: int = 16, *, level: int = 1000) -> NDArray[np.uint16]:
    """A ramp, brighter to the right."""
    return (np.linspace(0, level, side)[None, :] * np.ones((side, 1))).astype(np.uint16)


def dataset(pixels: NDArray[Any] | None = None, **attributes: Any) -> Dataset:
    """A grey image of patient `p`, study 1.2, series 1.2.3; None deletes an attribute."""
    pixels = image() if pixels is None else pixels
    made = Dataset()
    made.update({})
    values = {
        "Modality": "DX", "PatientID": "p", "PatientName": "Doe^Jane", "PatientBirthDate": "19500101",
        "StudyInstanceUID": "1.2", "SeriesInstanceUID": "1.2.3", "SOPInstanceUID": "1.2.3.4",
        "StudyDate": "20240317", "StudyTime": "101112", "StudyID": "1", "AccessionNumber": "", "SeriesNumber": 1,
        "InstanceNumber": 1, "Manufacturer": "ACME", "BurnedInAnnotation": "NO", "ImageType": ["ORIGINAL", "PRIMARY"],
        "PixelSpacing": [0.5, 0.5], "PhotometricInterpretation": "MONOCHROME2", "SamplesPerPixel": 1,
        "Rows": pixels.shape[-2], "Columns": pixels.shape[-1], "BitsAllocated": 16, "BitsStored": 16,
        "HighBit": 15,
        "PixelRepresentation": int(pixels.dtype.kind == "i"),
        "PixelData": pixels.astype(f"<{pixels.dtype.kind}2").tobytes(),
    } | attributes  # fmt: skip
    if pixels.ndim == 3:
        values.setdefault("NumberOfFrames", len(pixels))
    values.setdefault("SOPClassUID", CLASSES.get(values["Modality"], CLASSES["DX"]))
    for keyword, value in values.items():
        if value is not None:
            setattr(made, keyword, value)
    return made


def write(path: Path, pixels: NDArray[Any] | None = None, **attributes: Any) -> Path:
    """The data set of `dataset` as a file."""
    made = dataset(pixels, **attributes)
    made.file_meta = FileMetaDataset()
    made.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    made.file_meta.MediaStorageSOPClassUID = made.get("SOPClassUID", CLASSES["DX"])
    made.file_meta.MediaStorageSOPInstanceUID = made.get("SOPInstanceUID") or "1.2.3.4"
    path.parent.mkdir(parents=True, exist_ok=True)
    made.save_as(path, enforce_file_format=True)
    return path


def export(folder: Path, *, patients: int = 4, images: int = 2) -> Path:
    """An export of several patients with several images each, one study a patient."""
    for patient in range(patients):
        for number in range(images):
            write(
                folder / f"p{patient}" / f"{number}.dcm",
                image(level=100 + 900 * patient + number),
                PatientID=f"id-{patient}",
                StudyInstanceUID=f"1.2.{patient}",
                SeriesInstanceUID=f"1.2.{patient}.1",
                SOPInstanceUID=f"1.2.{patient}.1.{number}",
            )
    return folder
