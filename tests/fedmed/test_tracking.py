"""MLflow gets what a run reports, round by round; without it nothing of it is loaded."""

import dataclasses
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import strategies.run
from clients.client_app import app as client_app
from fedmed.atomic import write_json
from fedmed.config import TrackingConfig
from fedmed.errors import ConfigError, RunError
from fedmed.flower.in_process import run_in_process
from fedmed.schema import to_dict
from fedmed.tracking import MlflowTracker, NoTracker, check, kept, make_tracker, send_kept
from strategies.folder import RunFolder
from strategies.rounds import Loop
from strategies.server_app import app as server_app
from tests.strategies.apps import run_config

SITES = ["Cleveland", "Hungary"]
SETTINGS = [
    "task=heart10",
    "task.declared_sizes={Cleveland: 304, Hungary: 260}",
    "model=logistic",
    "rounds=2",
]


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """One database for all tests here, since MLflow takes seconds to make one; each has its own experiment."""
    folder = tmp_path_factory.mktemp("mlflow")
    with pytest.MonkeyPatch.context() as patch:
        # Artifacts lie beside the process's folder.
        patch.chdir(folder)
        yield f"sqlite:///{folder}/mlruns.db"


def run(folder: Path, *overrides: str) -> None:
    texts = (
        [*overrides] if overrides[0].startswith("resume=") else [*SETTINGS, *overrides, f"run_dir={folder}"]
    )
    run_in_process(server_app, client_app, nodes=2, workers=1, run_config={"overrides": shlex.join(texts)})


def tracked(database: str, experiment: str) -> tuple[Any, Any]:
    """MLflow's client and the only run of an experiment."""
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=database)
    found = client.get_experiment_by_name(experiment)
    assert found is not None
    runs = client.search_runs([found.experiment_id])
    assert len(runs) == 1
    return client, runs[0]


def artifacts(client: Any, run_id: str, path: str | None = None) -> set[str]:
    names: set[str] = set()
    for entry in client.list_artifacts(run_id, path):
        names |= artifacts(client, run_id, entry.path) if entry.is_dir else {entry.path}
    return names


def history(client: Any, run_id: str, name: str) -> list[tuple[int, float]]:
    return sorted((metric.step, metric.value) for metric in client.get_metric_history(run_id, name))


def test_everything_that_a_run_reports_can_be_looked_up(database: str, tmp_path: Path) -> None:
    """Parameters, global metrics and those of every site for every round, epsilon, bytes, seconds, artifacts."""
    folder = tmp_path / "run"
    run(folder, f"tracking.uri={database}", "tracking.experiment=all", "name=whole")
    client, logged = tracked(database, "all")
    assert logged.info.status == "FINISHED"
    assert logged.info.run_name == "whole"
    assert logged.data.tags["privacy"] == "private"

    params = logged.data.params
    expected = {"rounds": "2", "seed": "0", "strategy.kind": "fedavg", "privacy.epsilon": "3.0", "model.hidden": "0",
                "training.learning_rate": "2.0", "task.declared_sizes.Cleveland": "304"}  # fmt: skip
    assert expected.items() <= params.items()
    assert not [name for name in params if name.startswith("task.columns")]

    rounds = json.loads((folder / "history.json").read_text())
    plans = RunFolder(folder).plans()
    keys = {"exact.auc": "auc", "exact.accuracy": "accuracy"} | {
        k: k for k in ("bytes_up", "bytes_down", "seconds")
    }
    wanted = {name: [entry[key] for entry in rounds] for name, key in keys.items()}
    for site in SITES:
        wanted[f"exact.auc/{site}"] = [entry["site_metrics"][site]["auc"] for entry in rounds]
        wanted[f"exact.accuracy/{site}"] = [entry["site_metrics"][site]["accuracy"] for entry in rounds]
        wanted[f"epsilon.pld/{site}"] = [plans[site].epsilon(rounds=number) for number in (1, 2)]
    for name, values in wanted.items():
        assert history(client, logged.info.run_id, name) == [(1, values[0]), (2, values[1])], name

    names = artifacts(client, logged.info.run_id)
    assert {"summary.json", "report.html", "MODEL_CARD.md", "config.json", "plans.json", "history.json",
            "adapter/adapter.safetensors", "adapter/adapter.json"} <= names  # fmt: skip
    assert not {"checkpoint.safetensors", "mlflow_run_id"} & names
    assert json.loads((folder / "summary.json").read_text())["mlflow"] == {
        "uri": database,
        "run_id": logged.info.run_id,
    }


def test_a_run_that_failed_is_marked_and_goes_on_as_the_same_run(
    database: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Finished rounds stay; resumption adds the others to the same MLflow run."""
    monkeypatch.setattr(strategies.run, "write_report", lambda *_: None)
    train = Loop.run

    def fail_after_round_1(self: Loop, progress: Any, **_: Any) -> Any:
        train(self, progress, until=1)
        raise RunError("the quorum is lost")

    settings = ["privacy=off", f"tracking.uri={database}", "tracking.experiment=failed"]
    with monkeypatch.context() as patch:
        patch.setattr(Loop, "run", fail_after_round_1)
        with pytest.raises(RunError, match="the quorum is lost"):
            run(tmp_path / "run", *settings)
    client, logged = tracked(database, "failed")
    assert logged.info.status == "FAILED"
    assert [step for step, _ in history(client, logged.info.run_id, "exact.auc")] == [1]
    assert logged.data.tags["privacy"].startswith("NOT PRIVATE (privacy=off")
    assert "config.json" in artifacts(client, logged.info.run_id)

    # What a killed process may leave behind is nobody's artifact.
    (tmp_path / "run" / ".summary.json.123").write_text("half")
    run(tmp_path / "run", f"resume={tmp_path / 'run'}")
    client, again = tracked(database, "failed")
    assert again.info.run_id == logged.info.run_id
    assert again.info.status == "FINISHED"
    assert [step for step, _ in history(client, again.info.run_id, "exact.auc")] == [1, 2]
    assert [name for name in again.data.metrics if name.startswith("epsilon")] == []
    names = artifacts(client, again.info.run_id)
    assert "summary.json" in names
    assert not [name for name in names if name.startswith(".")]


@pytest.fixture
def tracker(database: str) -> MlflowTracker:
    return MlflowTracker(TrackingConfig(uri=database, experiment="names"), pytest.fail)


def test_a_site_may_be_called_as_it_is(tracker: MlflowTracker, database: str, tmp_path: Path) -> None:
    """MLflow refuses most signs in names; hospitals use them. And nobody else is told of the run."""
    names = ("St. Mary's", "Klinikum München (Süd)", "A&B")
    config = run_config("privacy=dp", "task.patient_column=p", names=("a", "b", "c"))
    sizes = dict.fromkeys(names, 150)
    tracker.start(
        dataclasses.replace(config, task=dataclasses.replace(config.task, declared_sizes=sizes)), tmp_path
    )
    tracker.log({f"exact.auc/{name}": 0.5 for name in names}, 1)
    tracker.finish(tmp_path, ok=True)
    assert os.environ["MLFLOW_DISABLE_TELEMETRY"] == "true"
    _, logged = tracked(database, "names")
    assert set(logged.data.metrics) == {
        "exact.auc/St. Mary_s",
        "exact.auc/Klinikum München _Süd_",
        "exact.auc/A_B",
    }
    assert logged.data.params["task.declared_sizes.St. Mary_s"] == "150"


def test_a_run_that_the_database_has_lost_cannot_be_continued_there(
    tracker: MlflowTracker, tmp_path: Path
) -> None:
    (tmp_path / "mlflow_run_id").write_text("0123456789abcdef0123456789abcdef\n")
    with pytest.raises(
        ConfigError, match="cannot continue run 0123456789abcdef0123456789abcdef there"
    ) as error:
        tracker.start(run_config(), tmp_path)
    assert "\n" not in str(error.value)
    # Nothing was opened: nothing is closed.
    tracker.finish(tmp_path, ok=False)


UNREACHABLE = {
    "nobody listens": "http://127.0.0.1:9",
    "no such host": "http://tracking.invalid:5000",
    "a folder": "sqlite:///{folder}",
    "another file": "sqlite:///{folder}/notes.txt",
    "a file for a folder": "sqlite:///{folder}/notes.txt/mlruns.db",
}
INVALID = {
    "no such scheme": "sqllite:///mlruns.db",
    "a bare folder": "mlruns",
    "no such port": "http://127.0.0.1:99999",
    "no address": "http://[::1",
}


@pytest.mark.parametrize("name", [*UNREACHABLE, *INVALID])
def test_a_place_that_cannot_be_written_to_is_one_line_at_once(name: str, tmp_path: Path) -> None:
    """MLflow itself would try again for minutes, and end in a traceback."""
    (tmp_path / "notes.txt").write_text("nothing that SQLite reads\n" * 100)
    uri = (UNREACHABLE | INVALID)[name].format(folder=tmp_path)
    began = time.monotonic()
    with pytest.raises(ConfigError) as error:
        check(TrackingConfig(uri=uri))
    assert time.monotonic() - began < 60
    assert str(error.value).startswith(f"tracking.uri={uri}: ")
    assert "expected e.g. sqlite:///mlruns.db" in str(error.value)
    assert "\n" not in str(error.value)
    assert error.value.exit_code == 2
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize(
    "uri",
    [
        "https://me:hunter2@mlflow.example.org",
        "https://token-hunter2@mlflow.example.org",
        "postgresql+psycopg2://me:hunter2@db/mlflow",
        "https://me:hunter2@mlflow.example.org:99999",
    ],
)
def test_a_password_is_refused_before_it_is_written_down(uri: str) -> None:
    """The setting stands in config.json, summary.json, the report and MLflow's own parameters."""
    with pytest.raises(ConfigError, match="MLFLOW_TRACKING_PASSWORD") as error:
        TrackingConfig(uri=uri)
    assert "hunter2" not in str(error.value)
    TrackingConfig(uri="postgresql://me@db/mlflow")


def test_a_tracker_that_goes_away_does_not_end_the_training(
    database: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Figures are kept and come later; where nothing comes back, the first error stays the one that is seen."""
    said: list[str] = []
    tracker = MlflowTracker(TrackingConfig(uri=database, experiment="away"), said.append)
    tracker.start(run_config("privacy=off"), tmp_path)

    def down(*_: object, **__: object) -> None:
        raise OSError("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(tracker._client, "log_batch", down)
        for step in (1, 2):
            tracker.log({"exact.auc": 0.5}, step)
        assert len(said) == 1
        assert "kept in the run's folder, and tried again" in said[0]
        # In the run this stands in `finally`: what it raised would hide the first error.
        tracker.finish(tmp_path, ok=False)
    assert len(said) == 2
    assert str(tmp_path) in said[1]
    tracker.finish(tmp_path, ok=True)
    client, logged = tracked(database, "away")
    assert logged.info.status == "FINISHED"
    assert [step for step, _ in history(client, logged.info.run_id, "exact.auc")] == [1, 2]


CONFIG = ("privacy=off", "name=kept", "tracking.experiment=kept")


def test_figures_outlive_an_mlflow_that_is_down_from_beginning_to_end(
    database: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Down at the start, at the end and in between, over two attempts; each figure comes once, at its own time."""
    folder, said = tmp_path / "run", []
    folder.mkdir()
    config = run_config(*CONFIG, f"tracking.uri={database}")
    write_json(folder / "config.json", to_dict(config))

    def away(*_: object, **__: object) -> None:
        raise ConfigError("tracking.uri: cannot be reached")

    with monkeypatch.context() as patch:
        patch.setattr("fedmed.tracking.check", away)
        for steps in ((1, 2), (3,)):
            # What the second attempt loads is what the first one kept.
            tracker = MlflowTracker(config.tracking, said.append, insist=False)
            assert tracker.start(config, folder) is None
            for step in steps:
                tracker.log({"exact.auc": step / 10}, step)
        times = [figure[2] for figure in kept(folder)["metrics"]]
        tracker.finish(folder, ok=True)
        assert not send_kept(folder, said.append)
    assert kept(folder)["ended"] == "FINISHED"
    assert all("MLflow" in line and "\n" not in line for line in said)

    said.clear()
    assert send_kept(folder, said.append)
    assert said == []
    assert kept(folder) == {}
    client, logged = tracked(database, "kept")
    assert logged.info.status == "FINISHED"
    assert logged.info.run_name == "kept"
    assert history(client, logged.info.run_id, "exact.auc") == [(1, 0.1), (2, 0.2), (3, 0.3)]
    sent = [metric.timestamp for metric in client.get_metric_history(logged.info.run_id, "exact.auc")]
    assert sorted(sent) == times
    assert artifacts(client, logged.info.run_id) == {"config.json"}


def test_an_mlflow_that_comes_back_gets_the_figures_while_the_run_goes_on(
    database: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is not asked at every round meanwhile: each time could take half a minute."""
    config = run_config("privacy=off", f"tracking.uri={database}", "tracking.experiment=back")
    said: list[str] = []
    tracker = MlflowTracker(config.tracking, said.append, insist=False)
    asked = 0

    def away(*_: object, **__: object) -> None:
        nonlocal asked
        asked += 1
        raise ConfigError("tracking.uri: cannot be reached")

    clock = 1000.0
    monkeypatch.setattr("fedmed.tracking.time.monotonic", lambda: clock)
    with monkeypatch.context() as patch:
        patch.setattr("fedmed.tracking.check", away)
        tracker.start(config, tmp_path)
        for step in range(1, 101):
            clock += 1
            tracker.log({"seconds": 1.0}, step)
    # At the start, after 30 s and after 60 s more.
    assert asked == 3
    assert len(kept(tmp_path)["metrics"]) == 100
    clock += 600
    tracker.log({"seconds": 1.0}, 101)
    assert kept(tmp_path) == {}
    assert len(said) == 2
    assert "it has them all" in said[1]
    client, logged = tracked(database, "back")
    assert [step for step, _ in history(client, logged.info.run_id, "seconds")] == list(range(1, 102))


def test_what_mlflow_has_already_it_does_not_take_twice(
    database: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that is killed between sending and noting it sends again."""
    config = run_config("privacy=off", f"tracking.uri={database}", "tracking.experiment=twice")
    write_json(tmp_path / "config.json", to_dict(config))
    tracker = MlflowTracker(config.tracking, pytest.fail)
    tracker.start(config, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", lambda *_, **__: None)
        tracker._next = time.monotonic() + 1000
        tracker.log({"seconds": 1.0}, 1)
        tracker.finish(tmp_path, ok=True)
    assert len(kept(tmp_path)["metrics"]) == 1
    assert send_kept(tmp_path, pytest.fail)
    client, logged = tracked(database, "twice")
    assert history(client, logged.info.run_id, "seconds") == [(1, 1.0)]


def test_checking_a_place_writes_nothing_there(database: str, tmp_path: Path) -> None:
    check(TrackingConfig(uri=database))
    check(TrackingConfig(uri=f"sqlite:///{tmp_path}/new/mlruns.db"))
    assert list(tmp_path.iterdir()) == []


def test_a_missing_mlflow_is_said_with_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=r"pip install 'fedmed\[coordinator\]', or set tracking=none"):
        make_tracker(TrackingConfig(), print)
    # Nor is it a reason to lose a consortium's figures unsaid.
    with pytest.raises(ConfigError, match="MLflow is not installed"):
        make_tracker(TrackingConfig(), print, insist=False)
    assert isinstance(make_tracker(TrackingConfig(kind="none"), print), NoTracker)


def test_without_tracking_mlflow_is_never_loaded(tmp_path: Path) -> None:
    """By a whole run in a process of its own; nor is anything of it written."""
    program = """
import sys
from fedmed.cli.main import main
try:
    main()
except SystemExit as end:
    assert not end.code, end.code
loaded = sorted(name for name in sys.modules if name.partition(".")[0] in ("mlflow", "sqlalchemy", "alembic"))
assert "strategies.run" in sys.modules
assert not loaded, loaded
"""
    done = subprocess.run(
        [sys.executable, "-c", program, "run", *SETTINGS, "privacy=off", "tracking=none"],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]
    # The last line is the summary's path.
    assert json.loads((tmp_path / done.stdout.splitlines()[-1]).read_text())["mlflow"] is None
