"""What the tests of de-identification share: a small valid file, values by VR, and a file as bytes."""

import io
import warnings
from typing import Any

import numpy as np
from pydicom import Dataset, Sequence, dcmread
from pydicom.dataset import FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian

from fedmed.dicom.deid.deidentify import Deidentifier, DeidentifyOptions

KEY = bytes(range(32))
CANARY = "Kanarienvogel"
PATIENT = "MRN 4711"
UID = "1.3.6.1.4.1.9999.4711"

VALUES: dict[str, Any] = {
    "AE": CANARY,
    "AS": "047Y",
    "AT": 0x00100010,
    "CS": CANARY.upper(),
    "DA": "20240229",
    "DS": "47.11",
    "DT": "20240229101112.131415+0100",
    "FD": 47.11,
    "FL": 47.0,
    "IS": "4711",
    "LO": CANARY,
    "LT": CANARY,
    "OB": CANARY.encode() + b"\0",
    "OD": b"4711471147114711",
    "OF": b"4711",
    "OL": b"4711",
    "OV": b"47114711",
    "OW": CANARY.encode() + b"\0",
    "PN": f"{CANARY}^Given",
    "SH": CANARY,
    "SL": 4711,
    "SS": 4711,
    "ST": CANARY,
    "SV": 4711,
    "TM": "101112.131415",
    "UC": CANARY,
    "UI": f"{UID}.1",
    "UL": 4711,
    "UN": CANARY.encode() + b"\0",
    "UR": f"https://example.org/{CANARY}",
    "US": 4711,
    "UT": CANARY,
    "UV": 4711,
}


def value_of(vr: str) -> Any:
    """A value that can be recognised, valid for `vr`; a sequence holds names and references."""
    if vr != "SQ":
        return VALUES[vr]
    item = Dataset()
    item.PatientName = f"{CANARY}^Item"
    item.ReferencedSOPClassUID = "1.2.840.10008.5.1.4.1.1.2"
    item.ReferencedSOPInstanceUID = f"{UID}.2"
    item.StudyDate = "20240229"
    return Sequence([item])


def instance(**attributes: Any) -> Dataset:
    """A CT slice of 4 by 4 pixels with everything that de-identification needs."""
    dataset = Dataset()
    dataset.SOPClassUID = "1.2.840.10008.5.1.4.1.1.2"
    dataset.SOPInstanceUID = f"{UID}.3"
    dataset.StudyInstanceUID = f"{UID}.4"
    dataset.SeriesInstanceUID = f"{UID}.5"
    dataset.PatientID = PATIENT
    dataset.PatientName = f"{CANARY}^Patient"
    dataset.Modality = "CT"
    dataset.set_pixel_data(
        np.arange(16, dtype=np.uint16).reshape(4, 4), "MONOCHROME2", 12, generate_instance_uid=False
    )
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    for name, value in attributes.items():
        setattr(dataset, name, value)
    return dataset


def written(dataset: Dataset) -> bytes:
    """`dataset` as a DICOM file."""
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dataset.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


def read(content: bytes) -> Dataset:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return dcmread(io.BytesIO(content), force=True)


def deidentified(dataset: Dataset, key: bytes = KEY, **options: Any) -> Dataset:
    return Deidentifier(key, DeidentifyOptions(**options)).deidentify(dataset)
