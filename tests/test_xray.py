"""The chest X-ray benchmark: its settings say what they do, its table shows its rows, its score is the AUC."""

import csv
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from fedmed.atomic import write_json
from fedmed.compose import compose
from fedmed.dicom.ingest import ingest
from fedmed.dicom.options import Options
from fedmed.dicom.synthetic.hospitals import make_hospitals
from fedmed.models.build import build
from fedmed.schema import to_dict
from fedmed.training import set_adapter
from strategies.folder import Progress, RunFolder

XRAY = Path(__file__).resolve().parents[1] / "experiments" / "xray"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"xray_{name}", XRAY / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def results() -> ModuleType:
    return load("results")


@pytest.fixture(scope="module")
def rows() -> list[dict[str, str]]:
    with (XRAY / "results.csv").open(newline="") as file:
        read = list(csv.DictReader(file))
    assert read
    return read


def test_settings_compose_as_they_are_named(results: ModuleType) -> None:
    assert len({setting.name for setting in results.SETTINGS}) == len(results.SETTINGS) == 18
    for setting in results.SETTINGS:
        config = compose(setting.overrides.split())
        assert config.strategy.kind == setting.strategy
        assert config.private == (setting.epsilon != "off")
        # The official test images are looked at by no run.
        assert config.privacy.metrics == "none"
        if config.private:
            assert config.privacy.epsilon == float(setting.epsilon)
            assert config.privacy.delta == 1e-5


def test_rows_are_unique_and_within_their_epsilon(results: ModuleType, rows: list[dict[str, str]]) -> None:
    assert tuple(rows[0]) == results.COLUMNS
    assert sum(len(setting.rows(rows)) for setting in results.SETTINGS) == len(rows)
    for setting in results.SETTINGS:
        seeds = [int(row["seed"]) for row in setting.rows(rows)]
        assert len(set(seeds)) == len(seeds)
        assert set(seeds) <= set(results.SEEDS)
    for row in rows:
        assert 0 <= float(row["auc"]) <= 1
        assert float(row["cpu_seconds"]) > 0
        if row["epsilon_target"] == "off":
            assert row["epsilon_spent"] == "off"
        else:
            assert 0 < float(row["epsilon_spent"]) <= float(row["epsilon_target"])


def test_readme_shows_the_rows(results: ModuleType, rows: list[dict[str, str]]) -> None:
    text = (XRAY / "README.md").read_text()
    shown = text.partition(results.BEGIN)[2].partition(results.END)[0].strip()
    assert shown == results.table(rows)
    # Recomputed here, not by the functions that wrote the table.
    first = [row for row in rows if (row["split"], row["epsilon_target"]) == ("even", "8")]
    mean = sum(float(row["auc"]) for row in first) / len(first)
    assert shown.splitlines()[2].split("|")[5].split()[0] == f"{mean:.3f}"


def test_rows_survive_writing(results: ModuleType, rows: list[dict[str, str]], tmp_path: Path) -> None:
    results.write_rows(tmp_path / "results.csv", reversed(rows))
    assert (tmp_path / "results.csv").read_text() == (XRAY / "results.csv").read_text()
    assert [path.name for path in tmp_path.iterdir()] == ["results.csv"]


def test_score_is_the_auc_of_what_was_released(tmp_path: Path) -> None:
    draws = np.random.default_rng(0)
    images = draws.integers(0, 256, size=(14, 28, 28)).astype(np.uint8)
    labels = np.arange(14) % 2
    made = {"hospitals": 1, "names": ["val"], "class_names": ["normal", "pneumonia"], "scanner_shift": 0.0}
    make_hospitals(images, labels, tmp_path / "export", **made)  # type: ignore[arg-type]
    source, hospital = tmp_path / "export" / "val", tmp_path / "ingested" / "val"
    labelled = source / "labels.csv"
    ingest(source / "dicom", hospital, key=bytes(32), labels=labelled, options=Options(workers=1))

    config = compose(["experiment=xray", "task.image_size=28"])
    network = build(config.task, config.model, config.adapter)
    arrays = network.initialise(config.seed)
    # As it starts, the head is zero and all scores are equal.
    arrays["head.weight"] = draws.normal(size=arrays["head.weight"].shape).astype(np.float32)
    run = tmp_path / "run"
    run.mkdir()
    RunFolder(run).save(Progress(round=1, arrays=arrays))
    write_json(run / "config.json", to_dict(config))

    set_adapter(network, arrays)
    with torch.no_grad():
        cut = network.preprocessor.cut(torch.from_numpy(images[:, None] / np.float32(255)))
        scores = network(images=cut).numpy()
    pairs = scores[labels == 1][:, None] - scores[labels == 0]
    auc, accuracy = load("score").score(run, hospital)
    # 49 pairs: another order of one of them would move it by 0.02.
    assert auc == pytest.approx((pairs > 0).mean(), abs=1e-3)
    assert accuracy == pytest.approx(((scores > 0) == labels).mean())
