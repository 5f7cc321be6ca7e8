"""Arrays of MedMNIST's shape; everything else in one line."""

import io
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedmed.dicom.synthetic.npz import read_npz
from fedmed.errors import ConfigError, DataError

IMAGES, LABELS = np.zeros((6, 28, 28), np.uint8), np.array([[0], [1]] * 3, np.uint8)
CANARY = "PATIENT-4711"


def test_splits_are_read(tmp_path: Path) -> None:
    arrays = {
        "train_images": IMAGES, "train_labels": LABELS, "val_images": IMAGES[:2] + 7, "val_labels": LABELS[:2, 0],
    }  # fmt: skip
    np.savez_compressed(tmp_path / "a.npz", **arrays)
    images, labels = read_npz(tmp_path / "a.npz")
    assert (images.shape, labels.shape) == ((6, 28, 28), (6, 1))
    assert read_npz(tmp_path / "a.npz", "val")[0].max() == 7


def test_all_splits_follow_one_another(tmp_path: Path) -> None:
    np.savez(
        tmp_path / "a.npz",
        train_images=IMAGES,
        train_labels=LABELS,
        test_images=IMAGES[:2] + 7,
        test_labels=LABELS[:2],
    )
    images, labels = read_npz(tmp_path / "a.npz", "all")
    assert (images.shape, labels.shape) == ((8, 28, 28), (8, 1))
    assert images[6:].min() == 7
    with pytest.raises(
        DataError, match=r"no arrays val_images and val_labels; it has train, test \(--split\)"
    ):
        read_npz(tmp_path / "a.npz", "val")


BAD: list[tuple[dict[str, Any], str]] = [
    ({"x": IMAGES}, "no arrays train_images and train_labels; as MedMNIST names them"),
    ({"train_images": IMAGES}, "no arrays train_images and train_labels"),
    ({"train_images": IMAGES[0], "train_labels": LABELS}, "train_images: shape (28, 28); expected (images, "),
    ({"train_images": np.zeros((6, 28, 28, 28), np.uint8), "train_labels": LABELS}, "shape (6, 28, 28, 28)"),
    ({"train_images": IMAGES[:0], "train_labels": LABELS[:0]}, "shape (0, 28, 28)"),
    ({"train_images": IMAGES / 255, "train_labels": LABELS}, "train_images: float64; expected uint8"),
    (
        {"train_images": IMAGES, "train_labels": LABELS[:5]},
        "train_labels: shape (5, 1); expected (6,) or (6, 1)",
    ),
    ({"train_images": IMAGES, "train_labels": np.zeros((6, 14), int)}, "train_labels: shape (6, 14)"),
    ({"train_images": IMAGES, "train_labels": LABELS / 2}, "train_labels: float64; expected whole numbers"),
    ({"train_images": IMAGES, "train_labels": np.array([[CANARY]] * 6)}, "expected whole numbers"),
    ({"train_images": IMAGES, "train_labels": np.array([[CANARY]] * 6, object)}, "Python objects"),
]


@pytest.mark.parametrize(("arrays", "says"), BAD, ids=[says[:40] for _, says in BAD])
def test_wrong_arrays_are_named(arrays: dict[str, Any], says: str, tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(DataError) as raised:
        read_npz(tmp_path / "a.npz")
    assert says in str(raised.value)
    assert CANARY not in str(raised.value)


class Boom:
    """What would make a file where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    mine = tmp_path / "ran"
    (tmp_path / "a.npz").write_bytes(pickle.dumps(Boom(mine)))
    np.savez(
        tmp_path / "b.npz",
        train_images=np.array([Boom(mine)], object),
        train_labels=LABELS,
        allow_pickle=True,
    )
    for name in ("a.npz", "b.npz"):
        with pytest.raises(DataError):
            read_npz(tmp_path / name)
    assert not mine.exists()


def test_other_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "text.npz").write_text(CANARY)
    np.save(tmp_path / "one.npy", IMAGES)
    with zipfile.ZipFile(tmp_path / "zip.npz", "w") as file:
        file.writestr("train_images", CANARY)
        file.writestr("train_labels", CANARY)
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {"descr": "|u1", "fortran_order": False, "shape": (10**9, 2**14, 2**14)}
    )
    with zipfile.ZipFile(tmp_path / "huge.npz", "w") as file:
        for name in ("train_images.npy", "train_labels.npy"):
            file.writestr(name, header.getvalue() + b"\0" * 99)
    for name, says in (
        ("none.npz", "no such file"), (".", "a folder or a device"), ("text.npz", "not an .npz file"),
        ("one.npy", "not an .npz file"), ("zip.npz", "no array"), ("huge.npz", "do not fit into memory"),
    ):  # fmt: skip
        with pytest.raises(DataError, match=says) as raised:
            read_npz(tmp_path / name)
        assert CANARY not in str(raised.value)
        assert "\n" not in str(raised.value)
    with pytest.raises(ConfigError, match="--split=tets: expected train, val, test or all"):
        read_npz(tmp_path / "text.npz", "tets")


def test_no_truncation_gets_through(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    np.savez_compressed(
        tmp_path / "a.npz", train_images=rng.integers(0, 9, IMAGES.shape, dtype=np.uint8), train_labels=LABELS
    )
    whole = (tmp_path / "a.npz").read_bytes()
    refused = 0
    for trial in range(300):
        broken = bytearray(whole)
        if trial < 50:
            del broken[trial * len(whole) // 50 :]
        else:
            broken[rng.integers(len(whole))] ^= 1 << rng.integers(8)
        (tmp_path / "b.npz").write_bytes(broken)
        try:
            read_npz(tmp_path / "b.npz")
        except DataError:
            refused += 1
    assert refused > 200
