"""The benchmark's files agree with each other, and its targets hold in the rows that were measured."""

import csv
import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

from fedmed.compose import compose

ROOT = Path(__file__).resolve().parents[1]
HEART = ROOT / "experiments" / "heart"


@pytest.fixture(scope="module")
def results() -> ModuleType:
    spec = importlib.util.spec_from_file_location("heart_results", HEART / "results.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def rows() -> list[dict[str, str]]:
    with (HEART / "results.csv").open(newline="") as file:
        read = list(csv.DictReader(file))
    assert read
    return read


def mean_over_seeds(rows: list[dict[str, str]], setting: str, column: str) -> float:
    by_seed: dict[str, list[float]] = {}
    for row in rows:
        if row["setting"] == setting:
            by_seed.setdefault(row["seed"], []).append(float(row[column]))
    means = [sum(values) / len(values) for values in by_seed.values()]
    return sum(means) / len(means)


EXPERIMENTS = sorted(path.stem for path in (ROOT / "configs" / "experiment").glob("*.yaml"))


def test_there_are_experiments() -> None:
    assert {"demo", "heart10", "heart_lora"} <= set(EXPERIMENTS)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_experiment_composes(name: str) -> None:
    assert compose([f"experiment={name}"]).rounds >= 1


def test_settings_compose_with_the_privacy_of_their_names(results: ModuleType) -> None:
    for setting in results.SETTINGS:
        privacy = compose(setting.overrides.split()).privacy
        if setting.name.endswith("-off"):
            assert privacy.kind == "off"
        else:
            assert privacy.kind == "dp"
            assert privacy.epsilon == float(setting.name.rpartition("eps")[2])


def test_rows_parse_and_are_unique(results: ModuleType, rows: list[dict[str, str]]) -> None:
    assert tuple(rows[0]) == results.COLUMNS
    assert {row["setting"] for row in rows} <= {setting.name for setting in results.SETTINGS}
    keys = [(row["setting"], row["seed"], row["draw"]) for row in rows]
    assert len(set(keys)) == len(keys)
    for row in rows:
        assert row["commit"]
        assert float(row["seconds"]) > 0
        for name in ("pooled_auc", "pooled_accuracy", "mean_hospital_accuracy"):
            assert 0 <= float(row[name]) <= 1
        if row["epsilon_target"] == "off":
            assert row["epsilon_spent"] == "off"
        else:
            assert 0 < float(row["epsilon_spent"]) <= float(row["epsilon_target"])


def test_every_setting_has_seeds_and_draws(results: ModuleType, rows: list[dict[str, str]]) -> None:
    for setting in results.SETTINGS:
        assert results.missing(setting, rows, results.SEEDS, range(setting.draws)) == [], setting.name


@pytest.mark.parametrize(
    ("setting", "column", "target"),
    [
        ("head-eps1", "pooled_auc", 0.84),
        ("head-eps3", "pooled_auc", 0.865),
        ("head-off", "pooled_auc", 0.875),
        ("logistic10-eps1", "mean_hospital_accuracy", 0.78),
        ("logistic10-off", "mean_hospital_accuracy", 0.80),
    ],
)
def test_target(
    rows: list[dict[str, str]], results: ModuleType, setting: str, column: str, target: float
) -> None:
    assert mean_over_seeds(rows, setting, column) >= target
    # The table is held to the same number.
    declared = next(one for one in results.SETTINGS if one.name == setting)
    assert (declared.metric, declared.target) == (column, target)


def test_readme_shows_the_rows(results: ModuleType, rows: list[dict[str, str]]) -> None:
    text = (HEART / "README.md").read_text()
    shown = text.partition(results.BEGIN)[2].partition(results.END)[0].strip().splitlines()[2:]
    assert len(shown) == len(results.SETTINGS)
    for line, setting in zip(shown, results.SETTINGS, strict=True):
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        assert cells[0] == setting.label
        # Recomputed here, not by the function that wrote the table.
        assert float(cells[2]) == pytest.approx(mean_over_seeds(rows, setting.name, "pooled_auc"), abs=6e-4)
        accuracy = mean_over_seeds(rows, setting.name, "mean_hospital_accuracy")
        assert float(cells[5]) == pytest.approx(accuracy, abs=6e-4)
    assert text.partition(results.BEGIN)[2].partition(results.END)[0].strip() == results.table(rows)


def test_figure_is_there() -> None:
    assert (HEART / "figure.png").read_bytes().startswith(b"\x89PNG")
    assert re.search(r"<svg\b", (HEART / "figure.svg").read_text())


def test_missing_rows_are_those_not_there(results: ModuleType) -> None:
    setting = results.Setting(name="x", label="x", overrides="", draws=2)
    have = [{"setting": "x", "seed": "0", "draw": "0"}, {"setting": "y", "seed": "1", "draw": "0"}]
    assert results.missing(setting, have, range(2), range(2)) == [(0, [1]), (1, [0, 1])]


def test_spread_separates_seeds_from_draws(results: ModuleType) -> None:
    values = {("0", "0"): 0.8, ("0", "1"): 0.6, ("1", "0"): 0.9, ("1", "1"): 0.9}
    rows = [{"seed": seed, "draw": draw, "v": str(v)} for (seed, draw), v in values.items()]
    mean, between, within = results.spread(rows, "v")
    assert mean == pytest.approx(0.8)
    assert between == pytest.approx(0.02**0.5)
    assert within == pytest.approx(0.1)
    assert results.spread(rows[::2], "v")[2] is None


def test_rows_survive_writing(results: ModuleType, rows: list[dict[str, str]], tmp_path: Path) -> None:
    results.write_rows(tmp_path / "results.csv", reversed(rows))
    assert (tmp_path / "results.csv").read_text() == (HEART / "results.csv").read_text()
    assert [path.name for path in tmp_path.iterdir()] == ["results.csv"]
