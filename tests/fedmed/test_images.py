"""Ingested images become records: the right patients, the right side, the right pixels, nothing of the others."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedmed.data import images
from fedmed.data.images import check_site, locate, prepared, read_site, sites_in, squared, version_of
from fedmed.data.split import hash_split
from fedmed.dicom.store import write_store
from fedmed.errors import DataError
from fedmed.task import ImageTaskConfig
from tests.stores import KEY, changed, hospital


def task(path: Path, **changes: Any) -> ImageTaskConfig:
    values: dict[str, Any] = {"positive": ["opacity"], "negative": ["clear"], "image_size": 16}
    return ImageTaskConfig(path=str(path), **values | changes)


def test_a_site_s_images_come_with_their_patients_labels_and_side(tmp_path: Path) -> None:
    made = hospital(tmp_path / "a")
    data = read_site(task(tmp_path), "a", seed=0, key=KEY)
    assert data.images.shape == (len(made), 1, 16, 16)
    assert data.images.dtype == np.float32
    assert 0 <= data.images.min() < data.images.max() <= 1
    assert data.labels.tolist() == [float(image.label == "opacity") for image in made]
    assert [data.pseudonyms[code].hex() for code in data.patients] == [image.patient for image in made]
    assert data.manifest.patients == len(data.pseudonyms) == 40
    assert (data.manifest.records, data.manifest.quarantined) == (len(made), {})
    # Keyed, and by patient: all of a patient's images fall on one side.
    expected = hash_split([p.hex() for p in data.pseudonyms], fraction=0.34, key=KEY)
    assert np.array_equal(data.test, expected[data.patients])
    assert 0 < data.test.sum() < len(made)
    other = read_site(task(tmp_path), "a", seed=0, key=b"j" * 32)
    assert not np.array_equal(other.test, data.test)
    # Without a key there is no ledger to enrol them in.
    assert read_site(task(tmp_path), "a", seed=0).pseudonyms == ()


def test_removing_a_patient_moves_nobody(tmp_path: Path) -> None:
    made = hospital(tmp_path / "a")
    gone = made[5].patient
    write_store(tmp_path / "b", images=[image for image in made if image.patient != gone])
    more, fewer = (read_site(task(tmp_path), site, seed=0, key=KEY) for site in "ab")
    stays = np.array([image.patient != gone for image in made])
    assert not stays.all()
    assert np.array_equal(more.images[stays], fewer.images)
    assert np.array_equal(more.test[stays], fewer.test)


def test_the_image_as_the_unit_splits_by_patient_all_the_same(tmp_path: Path) -> None:
    hospital(tmp_path / "a")
    patient = read_site(task(tmp_path), "a", seed=0, key=KEY)
    image = read_site(task(tmp_path, unit="image", public_benchmark=True), "a", seed=0, key=KEY)
    assert image.patients.tolist() == list(range(len(image.labels)))
    assert np.array_equal(image.test, patient.test)
    assert image.pseudonyms == ()


def test_what_the_task_does_not_allow_is_left_out_and_counted(tmp_path: Path) -> None:
    made = hospital(tmp_path / "x")
    odd = [
        changed(made[0], label=""), changed(made[1], label="n/a"), changed(made[2], label="Ada Lovelace"),
        changed(made[3], modality="PT"), *made[4:],
    ]  # fmt: skip
    write_store(tmp_path / "a", images=odd)
    manifest = check_site(task(tmp_path), "a", seed=0)
    assert manifest.quarantined == {"label-blank": 2, "label-not-declared": 1, "modality-not-allowed": 1}
    assert manifest == read_site(task(tmp_path), "a", seed=0).manifest
    assert "Ada" not in repr(manifest)
    capped = read_site(task(tmp_path, images_per_patient=2), "x", seed=0)
    assert np.bincount(capped.patients).max() == 2
    assert capped.manifest.quarantined == {"more-images-than-declared": 13}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"positive": ["mass"], "negative": ["none"]}, r"no usable image \(\d+ x label-not-declared\)"),
        ({"modalities": ["CT"]}, r"no usable image \(\d+ x modality-not-allowed\)"),
        ({"test_fraction": 1e-9}, "no test record"),
    ],
)
def test_a_site_without_usable_images_says_why(
    tmp_path: Path, changes: dict[str, Any], expected: str
) -> None:
    hospital(tmp_path / "a", patients=6)
    for read in (check_site, read_site):
        with pytest.raises(DataError, match=expected):
            read(task(tmp_path, **changes), "a", seed=0)


def test_one_class_is_a_warning(tmp_path: Path) -> None:
    made = hospital(tmp_path / "a")
    write_store(tmp_path / "b", images=[changed(image, label="clear") for image in made])
    warnings = check_site(task(tmp_path), "b", seed=0).warnings
    assert warnings == ["training part has one class", "test part has one class"]


def test_a_folder_of_sites_or_a_site_s_own_folder(tmp_path: Path) -> None:
    hospital(tmp_path / "a", patients=6)
    hospital(tmp_path / "b", patients=9)
    (tmp_path / "c").mkdir()
    assert locate(task(tmp_path), "a") == tmp_path / "a"
    assert locate(task(tmp_path / "b"), "a") == tmp_path / "b"
    assert sites_in(task(tmp_path)) == {"a": 12, "b": 18}
    for path, said in ((tmp_path, "not finished"), (tmp_path / "d", "no such folder")):
        for read in (check_site, read_site):
            with pytest.raises(DataError, match=said):
                read(task(path), "c", seed=0)
        with pytest.raises(DataError, match=said):
            version_of(task(path), "c")
    with pytest.raises(DataError, match="No such file"):
        sites_in(task(tmp_path / "d"))


def test_data_that_was_ingested_again_has_another_version(tmp_path: Path) -> None:
    hospital(tmp_path / "a", patients=6)
    before = version_of(task(tmp_path), "a")
    assert version_of(task(tmp_path), "a") == before
    hospital(tmp_path / "a", patients=6)
    assert version_of(task(tmp_path), "a") != before


# Pixels.


def test_resampling_by_area_keeps_the_mean_and_is_exact_where_sizes_divide() -> None:
    frame = np.random.default_rng(0).uniform(size=(48, 48)).astype(np.float32)
    small = squared(frame, 16)
    assert np.allclose(small, frame.reshape(16, 3, 16, 3).mean(axis=(1, 3)), atol=1e-6)
    odd = squared(frame[:47, :47], 16)
    assert odd.mean() == pytest.approx(frame[:47, :47].mean(), abs=1e-5)
    larger = squared(frame[:8, :8], 16)
    assert np.allclose(larger, np.kron(frame[:8, :8], np.ones((2, 2))), atol=1e-6)


@pytest.mark.parametrize(
    ("rows", "columns", "box"),
    [(40, 20, (0, 16, 4, 12)), (10, 40, (6, 10, 0, 16)), (1, 90, (7, 8, 0, 16))],
)
def test_an_image_keeps_its_aspect_in_the_middle_of_a_black_square(
    rows: int, columns: int, box: tuple[int, int, int, int]
) -> None:
    square = squared(np.ones((rows, columns), dtype=np.float32), 16)
    top, bottom, left, right = box
    expected = np.zeros((16, 16))
    expected[top:bottom, left:right] = 1
    assert np.allclose(square, expected, atol=1e-6)


def test_slices_are_evenly_spaced_and_one_is_the_middle(tmp_path: Path) -> None:
    volume = np.broadcast_to(np.arange(9, dtype=np.uint16)[:, None, None] * 6553, (9, 16, 16))
    found = {
        slices: np.rint(prepared(task(tmp_path, slices=slices), volume).mean(axis=(1, 2)) * 10).tolist()
        for slices in (1, 3, 9, 18)
    }
    assert found[1] == [4]
    assert found[3] == [1, 4, 7]
    assert found[9] == list(range(9))
    assert found[18] == [n // 2 for n in range(18)]


def test_constants_alone_normalise_and_colours_become_grey(tmp_path: Path) -> None:
    white = np.full((1, 16, 16, 3), 65535, dtype=np.uint16)
    assert np.allclose(prepared(task(tmp_path), white), 1)
    green = white * np.array([0, 1, 0], dtype=np.uint16)
    assert np.allclose(prepared(task(tmp_path), green), 0.587, atol=1e-6)
    faint = np.full((1, 16, 16), 655, dtype=np.uint16)
    assert prepared(task(tmp_path), faint).max() == pytest.approx(0.01, abs=1e-5)


def test_made_up_images_look_like_a_site_s(tmp_path: Path) -> None:
    made = images.made_up(task(tmp_path, slices=3), 5)["images"]
    assert (made.shape, made.dtype) == ((5, 3, 16, 16), np.float32)
