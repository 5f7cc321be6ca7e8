"""The curve of AUC against labelled patients: its points, its bands, its rows, and one small part of it run."""

import statistics
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from experiments.data_efficiency import hospitals, results, run
from experiments.shared.pages import BEGIN, END
from experiments.shared.rows import Row, read_rows
from fedmed.compose import compose
from fedmed.dicom.store import ImageStore
from tests.stores import hospital


def row(**values: Any) -> Row:
    base = dict.fromkeys(results.COLUMNS, "0") | {"data": "phantoms", "method": "head", "epsilon": "off"}
    return base | {name: str(value) for name, value in values.items()}


def test_every_point_composes_with_its_patients_as_declared_sizes() -> None:
    points = results.points("phantoms", seeds=range(1))
    assert len(points) == len(results.SIZES) * len(results.METHODS) * len(results.EPSILONS)
    kinds = {}
    for point in points:
        config = compose(run.overrides_of(point, Path("data"), Path("out")))
        trained = [config.task.declared_train(name) for name in config.task.declared_sizes]
        assert trained == [point.patients // 2] * 2
        assert (config.privacy.epsilon if config.private else "off") == (
            float(point.epsilon) if point.epsilon != "off" else "off"
        )
        kinds[point.method] = config.model.name, config.adapter.kind
    assert kinds == {
        "head": ("fedmed:models/phantom_encoder", "head"),
        "lora": ("fedmed:models/phantom_encoder", "lora"),
        "scratch": ("cnn", "full"),
    }


def test_a_band_is_student_s_interval() -> None:
    values = [0.7, 0.8, 0.9]
    mean, low, high = results.band(values)
    # Of 2 degrees of freedom, from a table.
    half = 4.303 * statistics.stdev(values) / 3**0.5
    assert (mean, low, high) == pytest.approx((0.8, 0.8 - half, min(1, 0.8 + half)), abs=1e-3)
    assert results.band([0.6]) == (0.6, 0.6, 0.6)


def test_fewer_patients_are_a_part_of_more(tmp_path: Path) -> None:
    names = hospitals.NAMES
    for seed, name in enumerate(names):
        hospital(tmp_path / "all" / name, patients=12, most=2, name=name, seed=seed)
    whole = {name: ImageStore.open(tmp_path / "all" / name) for name in names}
    chosen: dict[tuple[int, str], set[str]] = {}
    for patients in (4, 7):
        folder = hospitals.cut(tmp_path / "all", tmp_path / str(patients), patients=patients)
        for name in names:
            store = ImageStore.open(folder / name, verify=True)
            chosen[patients, name] = set(store.records["patient"])
            assert len(chosen[patients, name]) == patients
            everything = whole[name].records
            mine = np.flatnonzero(everything["patient"].isin(chosen[patients, name]))
            assert len(store.records) == len(mine)
            for new, old in enumerate(mine):
                np.testing.assert_array_equal(store.image(new), whole[name].image(int(old)))
                assert store.records["label"].iloc[new] == everything["label"].iloc[old]
    assert all(chosen[4, name] < chosen[7, name] for name in names)
    with pytest.raises(ValueError, match="has 12 patients; expected at least 13"):
        hospitals.cut(tmp_path / "all", tmp_path / "more", patients=13)


def test_a_point_is_run_and_scored_on_the_common_test_set(tmp_path: Path) -> None:
    names = hospitals.NAMES
    for part in ("train", "test"):
        for seed, name in enumerate(names):
            hospital(tmp_path / part / name, patients=20, most=1, name=f"{part}-{name}", seed=seed)
    cut = hospitals.cut(tmp_path / "train", tmp_path / "few", patients=6)
    tests = run.Tests(tmp_path / "test")
    for epsilon in results.EPSILONS:
        found = run.measure(results.Point("phantoms", "head", epsilon, 10, 0), cut, tests, "commit")
        assert tuple(found) == results.COLUMNS
        assert results.key(found) == ("phantoms", "head", epsilon, "10", "0")
        assert 0 <= float(found["auc"]) <= 1
        assert found["epsilon_spent"] == "off" if epsilon == "off" else 0 < float(found["epsilon_spent"]) <= 8
    # Both hospitals' 20 records, of which none is left out.
    assert [len(part.labels) for part in tests._parts["head"]] == [20, 20]


def test_the_script_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[Any] = []

    def measure(point: Any, *_: Any) -> dict[str, str]:
        if len(done) == 3:
            raise KeyboardInterrupt
        done.append(point)
        return row(**dict(zip(results.COLUMNS, point.key, strict=False)), auc=0.75)

    for name in ("pool", "cut"):
        monkeypatch.setattr(run, name, lambda *_, **__: tmp_path)
    monkeypatch.setattr(run, "measure", measure)
    typed = ["run.py", "--quick", "--output", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", typed)
    assert run.main() == 130
    first, done[:] = done[:], []
    assert run.main() == 130
    assert len({point.key for point in first + done}) == 6
    assert len(read_rows(tmp_path / "out" / "results.csv")) == 6
    assert (tmp_path / "out" / "figure.png").read_bytes().startswith(b"\x89PNG")


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    read = read_rows(results.FOLDER / "results.csv")
    assert read
    return read


def test_rows_are_unique_and_cost_what_they_say(rows: list[Row]) -> None:
    assert tuple(rows[0]) == results.COLUMNS
    keys = [results.key(one) for one in rows]
    assert len(set(keys)) == len(keys)
    for one in rows:
        assert 0 <= float(one["auc"]) <= 1
        private = one["epsilon"] != "off"
        assert (
            (0 < float(one["epsilon_spent"]) <= float(one["epsilon"]))
            if private
            else (one["epsilon_spent"] == "off")
        )
    # A whole curve of phantoms, several seeds of each point.
    for method in results.METHODS:
        for epsilon in results.EPSILONS:
            points = results.curve(rows, data="phantoms", method=method.name, epsilon=epsilon)
            assert tuple(points) == results.SIZES
            assert min(map(len, points.values())) >= 3


def test_readme_shows_the_rows(rows: list[Row]) -> None:
    text = (results.FOLDER / "README.md").read_text()
    shown = text.partition(BEGIN)[2].partition(END)[0].strip()
    assert shown == results.table(rows)
    auc = [
        float(one["auc"])
        for one in rows
        if (one["data"], one["method"], one["epsilon"], one["patients"]) == ("phantoms", "head", "8", "10")
    ]
    # Recomputed here: the second line of the first table, first size.
    line = next(line for line in shown.splitlines() if line.startswith("| linear probe | 8 |"))
    assert float(line.split("|")[3].split()[0]) == pytest.approx(statistics.fmean(auc), abs=6e-4)
