"""Recordings: what is read of them, what is left out, and what nobody is told."""

import dataclasses
import os
import struct
from pathlib import Path

import numpy as np
import pytest
from scipy.io import wavfile

from fedmed.data.readers import check_site, made_up, read_site, sites_in, version_of
from fedmed.data.sounds import RATE, SAMPLES
from fedmed.errors import DataError
from fedmed.task import SoundTaskConfig
from tests.recordings import hum, recordings

KEY = bytes(32)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return recordings(tmp_path / "data" / "a")


def task(folder: Path, **changes: object) -> SoundTaskConfig:
    return SoundTaskConfig(path=str(folder.parent), positive=["cough"], negative=["breath"], **changes)  # type: ignore[arg-type]


def test_a_site_is_read_by_its_index(folder: Path) -> None:
    found = read_site(task(folder, clips=3), "a", seed=0, key=KEY)
    assert found.sounds.shape == (12, 3, SAMPLES)
    assert found.sounds.dtype == np.float32
    assert found.labels.tolist() == [1, 0] * 6
    # Two recordings a patient, on one side.
    assert found.patients.tolist() == [n // 2 for n in range(12)]
    assert all(len(set(found.test[found.patients == n])) == 1 for n in range(6))
    assert len(set(found.pseudonyms)) == 6
    assert found.manifest.records == 12
    assert check_site(task(folder), "a", seed=0).content_sha256 == found.manifest.content_sha256
    assert sites_in(task(folder)) == {"a": 12}
    assert made_up(task(folder, clips=2), 5).sounds.shape == (5, 2, SAMPLES)
    # The folder of one site may be named itself.
    alone = read_site(dataclasses.replace(task(folder), path=str(folder)), "a", seed=0, key=KEY)
    assert np.array_equal(alone.labels, found.labels)


@pytest.mark.parametrize("rate", [RATE, 8_000, 44_100, 48_000])
@pytest.mark.parametrize("kind", ["uint8", "int16", "int32", "float32"])
def test_a_tone_is_the_same_tone_in_every_file(tmp_path: Path, rate: int, kind: str) -> None:
    folder = recordings(tmp_path / "a", patients=2)
    wave = hum(440, rate, seconds=3)
    white = {"uint8": 127, "int16": 32767, "int32": 2**31 - 1, "float32": 1}[kind]
    values = (wave * white + (128 if kind == "uint8" else 0)).astype(kind)
    # The other ear hears nothing: the mean of both.
    silent = np.full_like(values, 128 if kind == "uint8" else 0)
    wavfile.write(folder / "0.wav", rate, np.stack([values, silent], axis=1))
    found = read_site(task(folder), "a", seed=0, key=KEY, maybe_empty=True).sounds[0, 0]
    # From the middle of what is longer than a clip; the ends ring where they were cut.
    expected = 0.5 * hum(440, RATE, seconds=3)[RATE // 2 :][:SAMPLES]
    inside = slice(200, -200)
    assert np.abs(found[inside] - expected[inside]).max() < (0.02 if kind == "uint8" else 0.01)


def test_clips_lie_in_the_middle_of_equal_parts(tmp_path: Path) -> None:
    folder = recordings(tmp_path / "a", patients=2)
    ramp = np.linspace(0, 1, 10 * RATE, dtype=np.float32)
    wavfile.write(folder / "0.wav", RATE, ramp)
    wavfile.write(folder / "1.wav", RATE, np.full(RATE, 0.5, dtype=np.float32))
    found = read_site(task(folder, clips=4), "a", seed=0, key=KEY, maybe_empty=True).sounds
    starts = [0.1 * 8 * (n + 0.5) / 4 for n in range(4)]
    assert found[0, :, 100].tolist() == pytest.approx(starts, abs=0.01)
    # A short one is followed by silence, in every clip alike.
    assert np.array_equal(found[1], np.tile(found[1, 0], (4, 1)))
    assert found[1, 0, 100] == pytest.approx(0.5, abs=0.01)
    assert not found[1, 0, RATE:].any()


LEFT_OUT = {
    "no-such-file": lambda folder: (folder / "0.wav").unlink(),
    "not-a-wav": lambda folder: (folder / "0.wav").write_bytes(b"RIFF" + bytes(40)),
    "empty": lambda folder: wavfile.write(folder / "0.wav", RATE, np.zeros(0, dtype=np.int16)),
    "not-finite": lambda folder: wavfile.write(folder / "0.wav", RATE, np.full(RATE, np.nan, dtype=np.float32)),
    "rate-not-allowed": lambda folder: wavfile.write(folder / "0.wav", 100, np.zeros(100, dtype=np.int16)),
    "outside-the-folder": lambda folder: rewrite(folder, "0.wav,", "../secret.wav,"),
    "label-not-declared": lambda folder: rewrite(folder, "0.wav,P0,cough", "0.wav,P0,sneeze"),
    "label-blank": lambda folder: rewrite(folder, "0.wav,P0,cough", "0.wav,P0,"),
    "patient-blank": lambda folder: rewrite(folder, "0.wav,P0,cough", "0.wav,,cough"),
    "file-blank": lambda folder: rewrite(folder, "\n0.wav,", "\n,"),
}  # fmt: skip


def rewrite(folder: Path, old: str, new: str) -> None:
    index = folder / "index.csv"
    assert old in index.read_text()
    index.write_text(index.read_text().replace(old, new, 1))


@pytest.mark.parametrize("reason", LEFT_OUT)
def test_what_cannot_be_used_is_left_out_with_its_reason(reason: str, folder: Path) -> None:
    wavfile.write(folder.parent / "secret.wav", RATE, np.ones(RATE, dtype=np.float32))
    LEFT_OUT[reason](folder)
    found = read_site(task(folder), "a", seed=0, key=KEY)
    assert found.manifest.quarantined == {reason: 1}
    assert found.manifest.records == 11


def test_a_file_that_lies_about_its_size_is_left_out(folder: Path) -> None:
    content = bytearray((folder / "0.wav").read_bytes())
    at = content.index(b"fmt ")
    content[at + 8 : at + 24] = struct.pack("<HHIIHH", 0xFFFF, 0, 0, 0, 0, 0)
    (folder / "0.wav").write_bytes(bytes(content))
    assert read_site(task(folder), "a", seed=0, key=KEY).manifest.quarantined == {"not-a-wav": 1}


def test_no_message_holds_a_cell(folder: Path) -> None:
    for path in folder.glob("*.wav"):
        path.unlink()
    with pytest.raises(
        DataError, match=r"no usable recording \(12 x no-such-file\); check index.csv"
    ) as wrong:
        read_site(task(folder), "a", seed=0)
    assert "P0" not in str(wrong.value)
    (folder / "index.csv").write_text("file,person,label\nx.wav,P0,cough\n")
    with pytest.raises(DataError, match="no column 'patient'; expected file, patient, label"):
        read_site(task(folder), "a", seed=0)
    with pytest.raises(DataError, match=r"index\.csv: no such file"):
        read_site(task(folder), "b", seed=0)
    with pytest.raises(DataError, match="expected a folder of recordings"):
        sites_in(task(folder / "nowhere" / "x"))


def test_another_version_is_told_from_the_index_and_every_file(folder: Path) -> None:
    seen = [version_of(task(folder), "a")]
    assert version_of(task(folder), "a") == seen[0]
    os.utime(folder / "3.wav", ns=(1, 1))
    seen.append(version_of(task(folder), "a"))
    (folder / "4.wav").unlink()
    seen.append(version_of(task(folder), "a"))
    rewrite(folder, "5.wav", "6.wav")
    seen.append(version_of(task(folder), "a"))
    assert len(set(seen)) == 4


def test_content_is_told_by_every_byte(folder: Path) -> None:
    before = read_site(task(folder), "a", seed=0, key=KEY).manifest.content_sha256
    content = bytearray((folder / "0.wav").read_bytes())
    content[-1] ^= 1
    (folder / "0.wav").write_bytes(bytes(content))
    assert read_site(task(folder), "a", seed=0, key=KEY).manifest.content_sha256 != before
