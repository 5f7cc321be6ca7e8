"""The hospitals of the curve: made as DICOM, ingested, and cut down to few patients."""

import hashlib
import os
import shutil
import tempfile
from pathlib import Path

import numpy as np

from fedmed.dicom.ingest import ingest
from fedmed.dicom.options import Options
from fedmed.dicom.store import MANIFEST, ImageStore, StoredImage, write_store
from fedmed.dicom.synthetic.hospitals import make_hospitals, write_phantom_hospitals
from fedmed.dicom.synthetic.npz import read_npz

NAMES = ("Northside", "Riverbank")
CLASSES = ("clear", "opacity")
# Of the test set; the seeds of what is learned from are below it.
TEST_SEED = 1000
DIFFICULTY = 1.0


def pool(folder: Path, data: str, *, patients: int, seed: int) -> Path:
    """Two ingested hospitals with an image of each of `patients` patients, made once; half of them have the finding.

    Of PneumoniaMNIST the test set is drawn from its own test split, the others from its training split.
    """
    if all((folder / name / MANIFEST).exists() for name in NAMES):
        return folder
    with tempfile.TemporaryDirectory(prefix="fedmed-curve-") as draft:
        export = Path(draft, "export")
        if data == "phantoms":
            write_phantom_hospitals(
                export, names=NAMES, patients=patients, prevalences=(0.5, 0.5), images_per_patient=(1, 1),
                difficulty=DIFFICULTY, seed=seed,
            )  # fmt: skip
        else:
            file = Path(os.environ["FEDMED_DATA"], "pneumoniamnist.npz")
            # Of an odd number there is no half: someone would be left out.
            patients += patients % 2
            images, labels = read_npz(file, "test" if seed == TEST_SEED else "train")
            draws, wanted = np.random.default_rng([seed, 4]), labels.ravel()
            chosen = np.concatenate(
                [draws.permutation(np.flatnonzero(wanted == sick))[:patients] for sick in (0, 1)]
            )
            make_hospitals(
                images[chosen], labels[chosen], export, hospitals=2, names=NAMES, class_names=CLASSES,
                prevalences=(0.5, 0.5), seed=seed,
            )  # fmt: skip
        for name in NAMES:
            shutil.rmtree(folder / name, ignore_errors=True)
            ingest(
                export / name / "dicom", folder / name, key=hashlib.sha256(f"{seed} {name}".encode()).digest(),
                labels=export / name / "labels.csv", classes=CLASSES, options=Options(workers=1),
            )  # fmt: skip
    return folder


def cut(source: Path, folder: Path, *, patients: int) -> Path:
    """The same hospitals with `patients` each: those whose pseudonyms, keyed hashes, come first.

    Whether a patient is among them depends on pseudonyms and on nothing in the records; fewer are a part of more.
    """
    for name in NAMES:
        if (folder / name / MANIFEST).exists():
            continue
        store = ImageStore.open(source / name)
        table = store.records
        first = sorted(set(table["patient"]))[:patients]
        if len(first) < patients:
            raise ValueError(f"{source / name} has {len(first)} patients; expected at least {patients}")
        write_store(
            folder / name,
            images=[
                StoredImage(
                    pixels=store.image(index), patient=row.patient, label=row.label, modality=row.modality,
                    manufacturer=row.manufacturer,
                )
                for index, row in enumerate(table.itertuples())
                if row.patient in first
            ],
        )  # fmt: skip
    return folder
