"""What ingestion leaves behind: read back as it was written, or refused."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from fedmed.dicom import store
from fedmed.dicom.store import ImageStore, StoredImage, write_store
from fedmed.errors import DataError

PATIENT = "0123456789abcdef" * 2
OTHER = "f" * 32


def images() -> list[StoredImage]:
    draws = np.random.default_rng(0)
    shapes = [(1, 4, 6), (3, 5, 5), (1, 7, 2, 3)]
    return [
        StoredImage(
            pixels=draws.integers(0, 65536, size=shape, dtype=np.uint16),
            patient=PATIENT if number < 2 else OTHER, label="NA" if number else "", modality="CR",
            manufacturer='A, "B"', year="2020", row_spacing=0.1 if number else None,
        )
        for number, shape in enumerate(shapes)
    ]  # fmt: skip


def test_what_was_written_is_read_back(tmp_path: Path) -> None:
    made = write_store(
        tmp_path / "s", images=iter(images()), size=7, quarantine={"unreadable": 2},
        labels={"unmatched_rows": 1}, warnings=["w"], deidentified=True,
    )  # fmt: skip
    opened = ImageStore.open(tmp_path / "s", verify=True)
    assert opened.manifest == made
    for number, image in enumerate(images()):
        assert np.array_equal(opened.image(number), image.pixels)
        row = opened.records.iloc[number]
        assert (row["patient"], row["label"], row["manufacturer"]) == (
            image.patient,
            image.label,
            'A, "B"',
        )
    assert np.isnan(opened.records["row_spacing"][0])
    assert opened.records["row_spacing"][1] == 0.1
    assert tuple(opened.records.columns) == store.COLUMNS
    assert made["by_label"] == {"": 1, "NA": 2}
    assert made["quarantine"] == {"unreadable": 2}
    assert made["labels"] == {"unmatched_rows": 1, "unmatched_images": 0}
    assert (made["records"], made["patients"], made["size"]) == (3, 2, 7)


def test_pixels_are_mapped_and_a_plain_npy_file(tmp_path: Path) -> None:
    write_store(tmp_path, images=images())
    opened = ImageStore.open(tmp_path)
    assert isinstance(opened.pixels, np.memmap)
    assert np.shares_memory(opened.image(1), opened.pixels)
    plain = np.load(tmp_path / "pixels.npy")
    assert np.array_equal(plain, np.concatenate([image.pixels.ravel() for image in images()]))


def test_only_the_owner_may_look(tmp_path: Path) -> None:
    write_store(tmp_path / "s", images=images())
    assert (tmp_path / "s").stat().st_mode & 0o777 == 0o700
    for name in ("pixels.npy", "records.csv"):
        assert (tmp_path / "s" / name).stat().st_mode & 0o777 == 0o600


def test_a_store_that_was_not_finished_is_no_store(tmp_path: Path) -> None:
    """Also where an earlier store lay in the same folder."""
    write_store(tmp_path, images=images())

    def killed() -> Iterator[StoredImage]:
        yield images()[0]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_store(tmp_path, images=killed())
    with pytest.raises(DataError, match="not finished"):
        ImageStore.open(tmp_path)
    with pytest.raises(DataError, match="no such folder"):
        ImageStore.open(tmp_path / "nowhere")
    with pytest.raises(DataError, match="no image"):
        write_store(tmp_path, images=[])
    with pytest.raises(DataError, match="not finished"):
        ImageStore.open(tmp_path)


def _truncate(path: Path) -> None:
    os.truncate(path / "pixels.npy", 140)


def _longer(path: Path) -> None:
    np.save(path / "pixels.npy", np.zeros(1000, dtype=np.uint16))


def _other_type(path: Path) -> None:
    np.save(path / "pixels.npy", np.load(path / "pixels.npy").astype(np.int32))


def _pickled(path: Path) -> None:
    np.save(path / "pixels.npy", np.array([{}], dtype=object), allow_pickle=True)


def _no_records(path: Path) -> None:
    (path / "records.csv").unlink()


def _row_lost(path: Path) -> None:
    lines = (path / "records.csv").read_text().splitlines()
    (path / "records.csv").write_text("\n".join(lines[:-1]) + "\n")


def _offset(path: Path) -> None:
    _set(path, "offset", 3)


def _negative(path: Path) -> None:
    _set(path, "rows", -5)


def _text_for_a_number(path: Path) -> None:
    _set(path, "frames", "Ada")


def _patient(path: Path) -> None:
    _set(path, "patient", "Ada Lovelace")


def _set(path: Path, column: str, value: object) -> None:
    table = pd.read_csv(path / "records.csv", dtype=str, keep_default_na=False)
    table.loc[1, column] = str(value)
    table.to_csv(path / "records.csv", index=False)


def _not_json(path: Path) -> None:
    (path / "manifest.json").write_text("{")


def _keys_lost(path: Path) -> None:
    (path / "manifest.json").write_text('{"format": "fedmed-images/1"}')


DAMAGE = [
    _truncate, _longer, _other_type, _pickled, _no_records, _row_lost, _offset, _negative, _text_for_a_number,
    _patient, _not_json, _keys_lost,
]  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_store_is_refused_without_its_cells(tmp_path: Path, damage: object) -> None:
    write_store(tmp_path, images=images())
    assert callable(damage)
    damage(tmp_path)
    with pytest.raises(DataError, match="damaged; ingest it again") as error:
        ImageStore.open(tmp_path)
    assert "Ada" not in str(error.value)


def test_a_flipped_bit_is_found_on_request(tmp_path: Path) -> None:
    write_store(tmp_path, images=images())
    content = bytearray((tmp_path / "pixels.npy").read_bytes())
    content[-1] ^= 1
    (tmp_path / "pixels.npy").write_bytes(content)
    ImageStore.open(tmp_path)
    with pytest.raises(DataError, match="damaged"):
        ImageStore.open(tmp_path, verify=True)


def test_another_format_is_not_read(tmp_path: Path) -> None:
    write_store(tmp_path, images=images())
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    (tmp_path / "manifest.json").write_text(json.dumps(manifest | {"format": "fedmed-images/9"}))
    with pytest.raises(DataError, match="another version"):
        ImageStore.open(tmp_path)


@pytest.mark.parametrize("shape", [(4, 6), (1, 4, 6, 2), (1, 0, 6)])
def test_an_image_has_frames_rows_and_columns(shape: tuple[int, ...]) -> None:
    with pytest.raises(DataError, match="expected"):
        StoredImage(pixels=np.zeros(shape, dtype=np.uint16), patient=PATIENT)
