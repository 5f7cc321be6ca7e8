"""Hospitals on disk: whose images lie where, the labels, and that a folder is there as a whole or not at all."""

import csv
import itertools
import json
import os
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from numpy.typing import NDArray

import fedmed.dicom.synthetic.tree
from fedmed.dicom.ingest import ingest
from fedmed.dicom.options import Options
from fedmed.dicom.store import ImageStore
from fedmed.dicom.synthetic.allot import allot, group_patients
from fedmed.dicom.synthetic.hospitals import make_hospitals, write_phantom_hospitals
from fedmed.dicom.synthetic.tree import KEYS, Written
from fedmed.errors import ConfigError
from tests.evidence import figure
from tests.timing import best


def arrays(count: int = 60, shape: tuple[int, ...] = (28, 28)) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Images that are all different, and labels of which a third are 1."""
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (count, *shape), dtype=np.uint8), (np.arange(count) % 3 == 0).astype(
        np.int64
    )[:, None]


def read(folder: Path) -> list[pydicom.Dataset]:
    files = sorted((folder / "dicom").rglob("*.dcm"))
    assert files
    return [pydicom.dcmread(file) for file in files]


def labels_of(folder: Path) -> dict[str, str]:
    with (folder / "labels.csv").open(newline="") as file:
        _, *rows = csv.reader(file)
    assert len(dict(rows)) == len(rows)
    return dict(rows)


def contents(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Written:
    images, labels = arrays()
    out = tmp_path_factory.mktemp("made") / "out"
    return make_hospitals(
        images,
        labels,
        out,
        hospitals=4,
        class_names=["well", "ill"],
        images_per_patient=(1, 4),
        scanner_shift=0.0,
    )


def test_every_image_is_in_one_hospital_with_its_label(made: Written) -> None:
    images, labels = arrays()
    # The first hospital's pixels are those of the array, at 12 bits.
    wanted = {
        np.rint(image / 255 * 4095).astype(int).tobytes(): label
        for image, label in zip(images, labels, strict=True)
    }
    first = Path(made.path) / made.hospitals[0].name
    names = labels_of(first)
    for dataset in read(first):
        label = wanted.pop(dataset.pixel_array.astype(int).tobytes())
        assert names[dataset.StudyInstanceUID] == ("well", "ill")[int(label[0])]
    assert len(wanted) == 60 - made.hospitals[0].images
    assert sum(hospital.images for hospital in made.hospitals) == 60
    for hospital in made.hospitals:
        assert len(read(Path(made.path) / hospital.name)) == hospital.images


def test_uids_are_valid_and_of_one_place_each(made: Written) -> None:
    seen: dict[str, set[Any]] = defaultdict(set)
    instances = []
    for hospital in made.hospitals:
        for dataset in read(Path(made.path) / hospital.name):
            for uid in (dataset.SOPInstanceUID, dataset.SeriesInstanceUID, dataset.StudyInstanceUID):
                assert uid.is_valid
                assert uid.startswith("2.25.")
                # A UUID as RFC 9562 has it: version 8, variant 2.
                number = int(uid.split(".")[2])
                assert ((number >> 76) & 0xF, (number >> 62) & 0x3) == (8, 2)
            instances.append(dataset.SOPInstanceUID)
            seen[dataset.StudyInstanceUID].add((hospital.name, dataset.PatientID, dataset.StudyDate))
            seen[dataset.SeriesInstanceUID].add(dataset.StudyInstanceUID)
            seen[dataset.PatientID].add((dataset.PatientName, dataset.PatientBirthDate, dataset.PatientSex))
            assert dataset.StudyDate > dataset.PatientBirthDate
    assert len(set(instances)) == 60
    assert {len(values) for values in seen.values()} == {1}


def test_patients_have_one_class_and_the_images_that_were_asked_for(made: Written) -> None:
    counts: Counter[str] = Counter()
    for hospital in made.hospitals:
        names = labels_of(Path(made.path) / hospital.name)
        classes = defaultdict(set)
        for dataset in read(Path(made.path) / hospital.name):
            counts[dataset.PatientID] += 1
            classes[dataset.PatientID].add(names[dataset.StudyInstanceUID])
        assert {len(found) for found in classes.values()} == {1}
        by_label = Counter(found.pop() for found in classes.values())
        assert by_label == Counter(hospital.by_label)
        assert len(classes) == hospital.patients
    assert set(counts.values()) == {1, 2, 3, 4}
    assert made.images_per_patient == 4


def test_the_declaration_says_what_a_run_needs(made: Written) -> None:
    said = json.loads((Path(made.path) / "hospitals.json").read_text())
    assert said["format"] == "fedmed-hospitals/1"
    assert (said["positive"], said["negative"]) == (["ill"], ["well"])
    sizes = {hospital["name"]: hospital["patients"] for hospital in said["hospitals"]}
    assert sum(sizes.values()) == sum(hospital.patients for hospital in made.hospitals)
    *ingests, run = made.commands()
    assert len(ingests) == 4
    assert ingests[0].startswith(
        f"fedmed site ingest {made.path}/hospital-1/dicom ingested/hospital-1 --labels "
    )
    assert "task.positive=[ill]" in run
    readme = (Path(made.path) / "README.md").read_text()
    assert "fedmed site ingest hospital-1/dicom" in readme
    assert made.path not in readme


@pytest.mark.parametrize("key", KEYS)
def test_labels_are_keyed_as_was_asked(key: str, tmp_path: Path) -> None:
    images, labels = arrays()
    make_hospitals(images, labels, tmp_path / "out", hospitals=1, images_per_patient=(1, 4), key=key)
    names = labels_of(tmp_path / "out" / "hospital-1")
    assert set(names) == {str(dataset[key].value) for dataset in read(tmp_path / "out" / "hospital-1")}


def test_equal_arguments_make_equal_folders(tmp_path: Path) -> None:
    images, labels = arrays()
    for name, seed in (("one", 5), ("two", 5), ("other", 6)):
        make_hospitals(images, labels, tmp_path / name, images_per_patient=(1, 4), label_skew=1.0, seed=seed)
    one, two, other = (contents(tmp_path / name) for name in ("one", "two", "other"))
    assert one == two
    assert len(one) == 60 + 3 + 2
    assert not set(one.values()) & {content for name, content in other.items() if name.endswith(".dcm")}


def test_colour_is_written_as_colour(tmp_path: Path) -> None:
    images, labels = arrays(20, (32, 32, 3))
    made = make_hospitals(images, labels, tmp_path / "out", hospitals=4, scanner_shift=0.0)
    wanted = {image.tobytes() for image in images}
    for hospital in made.hospitals:
        for dataset in read(tmp_path / "out" / hospital.name):
            assert dataset.Modality == "US"
            wanted.remove(dataset.pixel_array.tobytes())
    assert not wanted


def test_phantoms_are_written_with_their_patients(tmp_path: Path) -> None:
    made = write_phantom_hospitals(tmp_path / "out", patients=20, size=32)
    assert [hospital.name for hospital in made.hospitals] == ["Northside", "Riverbank", "Lakeview"]
    assert [hospital.by_label["opacity"] for hospital in made.hospitals] == [6, 8, 10]
    assert {hospital.patients for hospital in made.hospitals} == {20}
    first = read(tmp_path / "out" / "Riverbank")
    assert {dataset.PhotometricInterpretation for dataset in first} == {"MONOCHROME1"}
    assert len({dataset.PatientID for dataset in first}) == 20
    names = labels_of(tmp_path / "out" / "Riverbank")
    # Neither the order of folders nor the numbers tell the class.
    order = [
        names[dataset.StudyInstanceUID] for dataset in sorted(first, key=lambda found: int(found.StudyID))
    ]
    assert sum(one != two for one, two in itertools.pairwise(order)) > 5


def test_ingestion_gives_back_the_arrays(tmp_path: Path) -> None:
    """Through every scanner's encoding, to the 8-bit value; 40 pixels, so that JPEG 2000 is among them."""
    images, labels = arrays(48, (40, 40))
    made = make_hospitals(
        images, labels, tmp_path / "out", hospitals=4, images_per_patient=(1, 4), scanner_shift=0.0
    )
    wanted = {image.tobytes(): str(label[0]) for image, label in zip(images, labels, strict=True)}
    syntaxes = set()
    for hospital in made.hospitals:
        folder = tmp_path / "out" / hospital.name
        syntaxes |= {dataset.file_meta.TransferSyntaxUID for dataset in read(folder)}
        manifest = ingest(
            folder / "dicom", tmp_path / hospital.name, key=b"k" * 32, labels=folder / "labels.csv",
            options=Options(size=64, workers=1),
        )  # fmt: skip
        assert (manifest["records"], manifest["patients"]) == (hospital.images, hospital.patients)
        assert not manifest["quarantine"]
        store = ImageStore.open(tmp_path / hospital.name)
        for record, label in enumerate(store.records["label"]):
            shown = np.rint(store.image(record)[0] / 257).astype(np.uint8)
            assert wanted.pop(shown.tobytes()) == label
    assert not wanted
    assert len(syntaxes) == 4


def test_progress_ends_at_all_images(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    images, labels = arrays()
    make_hospitals(images, labels, tmp_path / "out", progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (60, 60)
    assert seen == sorted(seen)


def test_writing_is_fast(tmp_path: Path) -> None:
    images, labels = arrays(1000)
    tries = itertools.count()
    seconds = best(lambda: make_hospitals(images, labels, tmp_path / f"out{next(tries)}"), enough=1000 / 120)
    figure("DICOM files of 28 x 28 written a CPU second", f"{1000 / seconds:.0f}")
    # 5,000 in well under a minute, also on a slow machine.
    assert 1000 / seconds >= 120


# Who lies where.


def spread(labels: NDArray[np.int64], **values: Any) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """The hospital of each patient, and each hospital's prevalence."""
    found = allot(labels, 4, rng=np.random.default_rng(0), **values)
    return found, np.array([labels[found == hospital].mean() for hospital in range(4)])


def test_without_skew_every_hospital_has_the_same_mix() -> None:
    labels = (np.arange(1000) % 4 == 0).astype(np.int64)
    found, prevalence = spread(labels)
    np.testing.assert_allclose(prevalence, 0.25, atol=0.01)
    assert np.bincount(found).tolist() == [250, 250, 250, 250]


def test_skew_is_graded() -> None:
    labels = (np.arange(1000) % 4 == 0).astype(np.int64)
    spreads = [
        np.mean([
            np.std([
                labels[found == hospital].mean() for hospital in range(4)
            ])
            for found in (allot(labels, 4, label_skew=alpha, rng=np.random.default_rng(seed)) for seed in range(10))
        ])
        for alpha in (0.3, 3.0, 300.0)
    ]  # fmt: skip
    assert spreads[0] > 2 * spreads[1] > 4 * spreads[2]
    found, _ = spread(labels, label_skew=0.3)
    assert len(found) == 1000
    assert found.min() == 0


def test_prevalences_are_met_and_who_has_no_room_is_counted(tmp_path: Path) -> None:
    labels = (np.arange(1000) % 4 == 0).astype(np.int64)
    found, prevalence = spread(labels, prevalences=[0.1, 0.3, 0.5, 0.7])
    np.testing.assert_allclose(prevalence, [0.1, 0.3, 0.5, 0.7], atol=0.01)
    sizes = np.bincount(found[found >= 0])
    assert len(set(sizes.tolist())) == 1
    # 250 positives are the limit: 1.6 of a hospital's size.
    assert sizes[0] in (155, 156, 157)
    images, mixed = arrays()
    made = make_hospitals(images, mixed, tmp_path / "out", hospitals=2, prevalences=[0.5, 0.9])
    assert made.left_out["images"] == 60 - sum(hospital.images for hospital in made.hospitals)
    assert made.left_out["images"] > 20


def test_patients_are_numbered_in_no_order() -> None:
    labels = (np.arange(300) < 150).astype(np.int64)
    patients = group_patients(labels, (1, 4), np.random.default_rng(0))
    assert sorted(set(patients.tolist())) == list(range(patients.max() + 1))
    assert set(np.bincount(patients).tolist()) <= {1, 2, 3, 4}
    by_patient = {int(patient): int(label) for patient, label in zip(patients, labels, strict=True)}
    order = [by_patient[patient] for patient in range(patients.max() + 1)]
    assert sum(one != two for one, two in itertools.pairwise(order)) > 30


# What goes wrong.

WRONG: list[tuple[dict[str, Any], str]] = [
    ({"hospitals": 0}, "hospitals=0: expected >= 1"),
    ({"hospitals": 61}, "hospitals=61: expected at most 60"),
    ({"hospitals": 30, "images_per_patient": (4, 4)}, "hospitals=30: expected at most 15"),
    ({"hospitals": 30, "label_skew": 0.01}, "label_skew=0.01: leaves one of 30 hospitals without a patient"),
    ({"label_skew": 0.0}, "label_skew=0.0: expected Dirichlet's alpha, 0.01 to 10000"),
    ({"label_skew": 1.0, "prevalences": [0.1, 0.2, 0.3]}, "expected null together with label_skew"),
    ({"prevalences": [0.1, 0.2]}, "expected 3, one each hospital"),
    ({"prevalences": [0.1, 0.2, 1.5]}, "prevalences=1.5: expected 0 to 1"),
    ({"prevalences": [1.0, 1.0, 1.0], "hospitals": 3, "images_per_patient": (20, 20)}, "too few patients"),
    ({"images_per_patient": (0, 4)}, "images_per_patient=0-4"),
    ({"images_per_patient": (4, 1)}, "images_per_patient=4-1"),
    ({"scanner_shift": -0.1}, "scanner_shift=-0.1: expected 0 to 3"),
    ({"scanner_shift": float("nan")}, "scanner_shift=nan: expected 0 to 3"),
    ({"class_names": ["one"]}, "class_names=one: expected a name for each"),
    ({"class_names": ["a", "a"]}, "expected different words"),
    ({"positive": ["2"]}, "positive=2: expected one of the classes 0, 1"),
    ({"positive": ["0", "1"]}, "expected at least one class less"),
    ({"names": ["a", "b"]}, "expected 3 different ones"),
    ({"names": ["a", "b", "../c"]}, "names=../c: expected names of folders"),
    ({"key": "PatientName"}, "key=PatientName: expected StudyInstanceUID or"),
    ({"seed": -1}, "seed=-1"),
    ({"patients": np.arange(60) // 2}, "patients=some with images of several classes"),
]


@pytest.mark.parametrize(("values", "says"), WRONG, ids=[says[:40] for _, says in WRONG])
def test_wrong_arguments_are_refused_and_leave_nothing(
    values: dict[str, Any], says: str, tmp_path: Path
) -> None:
    images, labels = arrays()
    with pytest.raises(ConfigError) as raised:
        make_hospitals(images, labels, tmp_path / "out", **values)
    assert says in str(raised.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"patients": 1}, "patients=1: expected 2 to"),
        ({"patients": 100_000, "size": 1024}, "do not fit into memory"),
        ({"prevalences": [0.5]}, "expected 3, one each hospital"),
        ({"prevalences": [0.5, 0.5, 2]}, "prevalences=2: expected 0 to 1"),
        ({"names": []}, "at least one hospital"),
        ({"difficulty": 0.0}, "difficulty=0.0: expected > 0"),
    ],
)
def test_wrong_phantoms_are_refused(values: dict[str, Any], says: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as raised:
        write_phantom_hospitals(tmp_path / "out", **values)
    assert says in str(raised.value)


def test_a_folder_that_holds_something_is_left_alone(tmp_path: Path) -> None:
    images, labels = arrays()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for name, says in (("full", "not empty"), ("file", "a file"), ("none/out", "no folder")):
        with pytest.raises(ConfigError, match=says):
            make_hospitals(images, labels, tmp_path / name)
    assert contents(tmp_path) == {"full/thesis.txt": b"mine", "file": b"mine"}
    (tmp_path / "empty").mkdir()
    assert make_hospitals(images, labels, tmp_path / "empty").hospitals


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device"), ValueError()])
def test_what_stops_half_way_leaves_nothing(
    error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, written = fedmed.dicom.synthetic.tree.dicom_bytes, []

    def stop(*arguments: Any, **values: Any) -> bytes:
        written.append(1)
        if len(written) == 30:
            assert len(list(tmp_path.rglob("*.dcm"))) == 29
            raise error
        return write(*arguments, **values)

    monkeypatch.setattr(fedmed.dicom.synthetic.tree, "dicom_bytes", stop)
    images, labels = arrays()
    expected = ConfigError if isinstance(error, OSError) else type(error)
    with pytest.raises(expected) as raised:
        make_hospitals(images, labels, tmp_path / "out")
    if isinstance(error, OSError):
        assert "cannot be written (No space left on device); nothing was kept" in str(raised.value)
    assert not os.listdir(tmp_path)
