"""Who is held out depends on the patient and the site's secret alone; the secret is one and stays secret."""

import os
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from fedmed.data.split import hash_split, shuffle_split, site_key
from fedmed.data.table import read_site
from fedmed.errors import DataError
from fedmed.task import TableTaskConfig

KEY = bytes(range(32))


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "home"
    monkeypatch.setenv("FEDMED_HOME", str(path))
    return path


def test_hash_split_moves_nobody_when_others_come_go_or_change_places() -> None:
    ids = [f"p{n}" for n in range(200)]
    side = dict(zip(ids, hash_split(ids, fraction=0.34, key=KEY), strict=True))
    for removed in ids[::20]:
        rest = [name for name in reversed(ids) if name != removed]
        assert dict(zip(rest, hash_split(rest, fraction=0.34, key=KEY), strict=True)).items() <= side.items()


def test_hash_split_holds_out_about_the_fraction_and_another_part_under_another_key() -> None:
    ids = [f"p{n}" for n in range(10_000)]
    first, second = (hash_split(ids, fraction=0.34, key=key) for key in (KEY, KEY[::-1]))
    for held_out in (first, second):
        # Five standard deviations of a binomial with 10,000 draws.
        assert held_out.mean() == pytest.approx(0.34, abs=0.024)
    assert (first & second).mean() == pytest.approx(0.34**2, abs=0.02)


def test_shuffle_split_is_exact_and_follows_its_seed() -> None:
    first = shuffle_split(304, fraction=0.34, seed=0)
    assert first.sum() == 103
    assert (first == shuffle_split(304, fraction=0.34, seed=0)).all()
    assert (first != shuffle_split(304, fraction=0.34, seed=1)).any()


@pytest.mark.parametrize("patient_column", ["patient", None])
def test_removing_a_patient_from_the_table_moves_no_other(tmp_path: Path, patient_column: str | None) -> None:
    """Also where the record is the unit: its id is made of its own cells, not of its place."""
    lines = [f"A,p{n // 2},{n},{n % 2}" for n in range(120)] + ["A,twin,7,1"] * 3
    path = tmp_path / "table.csv"
    columns = {"value": {"kind": "numeric", "low": 0, "high": 200, "phrase": "{value}"}}
    task = TableTaskConfig(
        path=str(path), site_column="site", label="sick", patient_column=patient_column, columns=columns
    )

    def sides(rows: list[str]) -> list[tuple[str, bool]]:
        path.write_text("\n".join(["site,patient,value,sick", *rows]) + "\n")
        data = read_site(task, "A", seed=0)
        return sorted(zip(data.texts, data.test.tolist(), strict=True))

    whole = sides(lines)
    assert {test for _, test in whole} == {True, False}
    for removed in [*(f"p{n}" for n in range(0, 60, 7)), "twin"]:
        rest = [line for line in lines if line.split(",")[1] != removed]
        gone = {f"{line.split(',')[2]}." for line in lines if line.split(",")[1] == removed} - {"7."}
        left = [entry for entry in whole if entry[0] not in gone]
        after = sides(rest)
        if removed == "twin":
            assert set(after) <= set(left)
        else:
            assert after == left
    assert sides(lines[::-1]) == whole


def test_site_key_is_made_once_for_its_owner_and_differs_between_sites(home: Path) -> None:
    key = site_key("Hôpital / A")
    assert len(key) == 32
    assert site_key("Hôpital / A") == key
    assert site_key("Hôpital / B") != key
    folders = list((home / "sites").iterdir())
    assert len(folders) == 2
    for folder in folders:
        assert [path.name for path in folder.iterdir()] == ["key"]
        assert stat.S_IMODE((folder / "key").stat().st_mode) == 0o600
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_processes_that_ask_at_once_get_the_same_key(home: Path, tmp_path: Path) -> None:
    start = tmp_path / "start"
    code = (
        "import sys, pathlib, time\n"
        "from fedmed.data.split import site_key\n"
        "print('ready', flush=True)\n"
        f"while not pathlib.Path({str(start)!r}).exists(): pass\n"
        "print(*(site_key(f'site {n}').hex() for n in range(50)))\n"
    )
    command = [sys.executable, "-c", code]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    start.touch()
    keys = {process.communicate(timeout=200)[0] for process in processes}
    assert [process.returncode for process in processes] == [0] * 4
    assert len(keys) == 1
    assert len(set(keys.pop().split())) == 50
    assert len(list(home.rglob("*"))) == 1 + 2 * 50


def test_a_key_that_another_process_made_first_is_kept(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The race, in slow motion: the file appears between the look and the link."""
    link = os.link

    def late(source: Path, target: Path) -> None:
        target.write_bytes(KEY)
        link(source, target)

    monkeypatch.setattr(os, "link", late)
    assert site_key("A") == KEY
    assert [path.name for path in home.rglob("*") if path.is_file()] == ["key"]


def test_a_damaged_key_is_refused_and_not_replaced(home: Path) -> None:
    """An empty key would make the split predictable, a new one would mix test into training patients."""
    site_key("A")
    path = next(path for path in home.rglob("key"))
    path.write_bytes(b"")
    with pytest.raises(DataError, match=r"^site 'A': .*key is damaged; restore it from a backup$"):
        site_key("A")
    assert path.read_bytes() == b""


def test_a_home_that_cannot_keep_keys_is_one_clear_line(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home.write_text("a file in the way")
    with pytest.raises(DataError, match=r"^site 'A': its key cannot be kept in .*; set FEDMED_HOME$"):
        site_key("A")

    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    home.unlink()
    monkeypatch.setattr(os, "link", refuse)
    with pytest.raises(DataError, match="Permission denied"):
        site_key("A")
    assert [path for path in home.rglob("*") if path.is_file()] == []


def test_sides_are_the_sites_own_secret(tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two sites that hold the same patients split them differently, and so does the same site elsewhere."""
    rows = [f"{site},p{n},{n},{n % 2}" for site in "AB" for n in range(200)]
    path = tmp_path / "table.csv"
    path.write_text("\n".join(["site,patient,value,sick", *rows]) + "\n")
    columns = {"value": {"kind": "numeric", "low": 0, "high": 200}}
    task = TableTaskConfig(path=str(path), label="sick", patient_column="patient", columns=columns)
    first, again, other = (
        read_site(task, site, seed=seed).test for site, seed in (("A", 0), ("A", 1), ("B", 0))
    )
    assert (first == again).all()
    assert np.mean(first != other) > 0.2
    monkeypatch.setenv("FEDMED_HOME", str(home.with_name("elsewhere")))
    assert np.mean(first != read_site(task, "A", seed=0).test) > 0.2
