"""What a person types and reads: no process of a coordinator runs here."""

import json
import shlex
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from fedmed.atomic import write_json
from fedmed.compose import compose
from fedmed.errors import ConfigError, FedmedError, Interrupted, RunError
from fedmed.tracking import KEPT
from strategies.coordinator import figures, launch, snapshot
from strategies.coordinator.admissions import Admissions
from strategies.coordinator.config import CoordinatorConfig
from strategies.coordinator.folder import CoordinatorError, CoordinatorFolder
from strategies.coordinator.records import RunPlace, RunPlaces, place_of, setting
from strategies.coordinator.service import unit
from strategies.coordinator.supervisor import check, check_port
from tests.commands import light
from tests.strategies.coordinator.play_sites import new_site

CONSORTIUM = ["federation=consortium", "model=logistic", "privacy=off"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> CoordinatorFolder:
    folder = tmp_path_factory.mktemp("a b") / "the hub"
    return CoordinatorFolder.init(folder, CoordinatorConfig(name="hub", hosts=["127.0.0.1"]))


@pytest.fixture
def folder(made: CoordinatorFolder) -> Iterator[CoordinatorFolder]:
    import shutil

    yield made
    shutil.rmtree(made.runs, ignore_errors=True)


@pytest.fixture
def place(folder: CoordinatorFolder) -> RunPlace:
    return RunPlaces(folder.runs).new("my run", ["rounds=3"], folder.path)


def test_a_run_s_folder_survives_the_way_through_its_settings(
    folder: CoordinatorFolder, place: RunPlace
) -> None:
    """Spaces, quotes and backslashes: Hydra reads the same path that was meant."""
    odd = RunPlace(folder.runs / "a 'b' \"c\\\" \\d, {e}=f[0] ü\\")
    odd.path.mkdir()
    odd.write(place.read())
    for each in (place, odd):
        found = place_of(shlex.join(each.settings()), folder.runs)
        assert found is not None
        assert found.path == each.path
        assert compose([*CONSORTIUM, setting("run_dir", str(each.path))]).run_dir == str(each.path)


@pytest.mark.parametrize(
    "text", ["", "rounds=1", "run_dir=", 'run_dir="/etc"', "resume='{}'", "'", "run_dir=1"]
)
def test_settings_from_elsewhere_name_no_run_of_ours(text: str, folder: CoordinatorFolder) -> None:
    assert place_of(text, folder.runs) is None


def test_runs_are_found_by_how_they_begin(folder: CoordinatorFolder, place: RunPlace) -> None:
    places = RunPlaces(folder.runs)
    other = places.new("my run", [], folder.path)
    assert other.name != place.name
    assert places.named(place.name).name == place.name
    with pytest.raises(ConfigError, match="2 runs begin so"):
        places.named(place.name[:4])
    with pytest.raises(ConfigError, match="no such run"):
        places.named("x")


def test_watching_shows_everything_once_and_ends_with_the_run(
    folder: CoordinatorFolder, place: RunPlace, capsys: pytest.CaptureFixture[str]
) -> None:
    place.output.write_text("earlier\n")
    since = place.output.stat().st_size

    def work() -> None:
        with place.output.open("a", encoding="utf-8") as file:
            for text in ("round 1\nrou", "nd 2, \u00fc", "ber\n"):
                file.write(text)
                file.flush()
                time.sleep(0.3)
        place.change(state="finished")

    thread = threading.Thread(target=work)
    thread.start()
    launch.watch(folder, place, since=since)
    thread.join()
    assert capsys.readouterr().out == "round 1\nround 2, über\n"


@pytest.mark.parametrize(
    ("state", "error", "next_step"),
    [("failed", RunError, "go on with: fedmed runs resume"), ("refused", ConfigError, ""),
     ("stopped", RunError, "go on with: fedmed runs resume")],
)  # fmt: skip
def test_a_run_that_did_not_finish_says_why_and_what_next(
    state: str, error: type[FedmedError], next_step: str, folder: CoordinatorFolder, place: RunPlace
) -> None:
    place.change(state=state, detail="the quorum is lost")
    with pytest.raises(error, match="the quorum is lost") as raised:
        launch.watch(folder, place)
    assert next_step in str(raised.value)


def test_ctrl_c_ends_the_showing_alone(
    folder: CoordinatorFolder, place: RunPlace, monkeypatch: pytest.MonkeyPatch
) -> None:
    def pressed(_: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(launch.time, "sleep", pressed)
    with pytest.raises(
        Interrupted, match="the run goes on without this terminal; look again: fedmed runs show"
    ):
        launch.watch(folder, place)
    assert place.read().state == "pending"
    assert not place.stop_wanted


def test_a_run_is_checked_before_anything_is_handed_over(folder: CoordinatorFolder) -> None:
    where = f"federation.coordinator={json.dumps(str(folder.path))}"
    for arguments, expected in (
        ([*CONSORTIUM, where], "this coordinator does not run; start it with: fedmed coordinator start"),
        ([*CONSORTIUM, "federation.coordinator=/absent"], "no coordinator there; make one with"),
        ([*CONSORTIUM, where, "rounds=0"], "rounds=0: expected >= 1"),
        ([*CONSORTIUM, where, "task.declared_sizes={}"], "task.declared_sizes"),
        (["-m", *CONSORTIUM, where, "seed=1,2"], "expected one run at a time"),
    ):
        ended = light()("run", *arguments)
        assert ended.code == 2
        assert expected in ended.err
        assert ended.err.count("\n") == 1
        assert not ended.torch
    assert not folder.runs.exists()


def test_no_record_is_read_for_a_run_of_a_consortium(folder: CoordinatorFolder, tmp_path: Path) -> None:
    """The coordinator has none: the task names folders that are at the sites."""
    settings = [
        "task=dicom", "task.path=/nowhere", "task.positive=[a]", "task.negative=[b]", "task.declared_sizes={x: 500}",
        "federation=consortium", "model=cnn", "adapter=full", f"federation.coordinator={json.dumps(str(folder.path))}",
    ]  # fmt: skip
    ended = light()("run", *settings, cwd=tmp_path)
    assert "this coordinator does not run" in ended.err, ended.err


def test_figures_go_to_the_coordinator_s_mlflow_unless_something_else_is_asked_for(
    folder: CoordinatorFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    with folder.alone():
        folder.say_running(pid=1, mlflow="http://127.0.0.1:5000")
        assert launch.tracked(folder, ["rounds=1"]) == ['tracking.uri="http://127.0.0.1:5000"']
        assert launch.tracked(folder, ["tracking=none"]) == []
        assert launch.tracked(folder, ["tracking.uri=http://elsewhere"]) == []
        folder.say_running(pid=1, mlflow=None)
        assert launch.tracked(folder, []) == ["tracking=none"]
    assert "no MLflow: figures stay in the run's folder" in capsys.readouterr().err


def test_only_a_run_that_is_over_and_unfinished_is_resumed(
    folder: CoordinatorFolder, place: RunPlace
) -> None:
    with pytest.raises(ConfigError, match="pending already; look at it with: fedmed runs show"):
        launch.resumable(folder, place.path)
    place.stop()
    place.change(state="stopped")
    assert launch.resumable(folder, place.path).path == place.path
    assert place.read().state == "pending"
    assert not place.stop_wanted
    place.change(state="finished")
    with pytest.raises(ConfigError, match="finished; nothing is left to do"):
        launch.resumable(folder, place.path)
    with pytest.raises(ConfigError, match="no run of the coordinator"):
        launch.resumable(folder, folder.path / "elsewhere" / place.name)


def test_a_stop_is_written_down_even_when_no_coordinator_runs(
    folder: CoordinatorFolder, place: RunPlace
) -> None:
    ended = light()("runs", "stop", place.name, "--coordinator", str(folder.path))
    assert ended.out == f"run '{place.name}': stopped\n"
    assert (place.read().state, place.stop_wanted) == ("stopped", True)
    again = light()("runs", "stop", place.name, "--coordinator", str(folder.path))
    assert "stopped; expected one that is under way" in again.err


def node(name: str, status: str, last_seen: float = 0.0) -> SimpleNamespace:
    return SimpleNamespace(name=name, status=status, last_seen=last_seen)


def test_a_view_tells_who_is_there_and_what_to_do(
    folder: CoordinatorFolder, place: RunPlace, tmp_path: Path
) -> None:
    admissions = Admissions(folder.path)
    for name in ("a", "b", "c"):
        admissions.admit(new_site(tmp_path, name))
    before = snapshot.snapshot(folder, None)
    assert {site["status"] for site in before["sites"]} == {"unknown"}
    assert (before["running"], before["superlink"]) == (False, "down")
    assert snapshot.remarks(before) == [f"not running; start it with: fedmed coordinator start {folder.path}"]
    nodes = [node("a", "online", time.time() - 90), node("b", "registered"), node("c", "unregistered"),
             node("stranger", "online")]  # fmt: skip
    place.change(state="running")
    now = snapshot.snapshot(folder, nodes)  # type: ignore[arg-type]
    assert [(site["name"], site["status"]) for site in now["sites"]] == [
        ("a", "online"), ("b", "never seen"), ("c", "never seen"),
    ]  # fmt: skip
    assert snapshot.ago(now["sites"][0]["last_seen"]) == "1 min ago"
    assert snapshot.changes(before, now) == [
        "SuperLink up", "site 'a': online", "site 'b': never seen", "site 'c': never seen",
        f"run '{place.name}': running, round 0/?",
    ]  # fmt: skip
    assert snapshot.changes(now, now) == []
    place.stop()
    (row,) = snapshot.snapshot(folder, nodes)["runs"]  # type: ignore[arg-type]
    assert row["state"] == "stopping"
    json.dumps(now, allow_nan=False)
    old = now | {
        "certificate_days": 3,
        "running": True,
        "insecure": True,
        "mlflow": {"uri": "x", "up": False},
    }
    remarks = " ".join(snapshot.remarks(old))
    for expected in ("ends in 3 days; run: fedmed coordinator rotate", "NOT ENCRYPTED", "sent later"):
        assert expected in remarks


def test_without_encryption_nothing_leaves_this_machine() -> None:
    for listen in ("0.0.0.0", "::", "10.1.2.3", "hub.example"):
        with pytest.raises(CoordinatorError, match="without encryption nothing may leave this machine"):
            check(CoordinatorConfig(name="a", hosts=["a"], listen=listen), insecure=True)
    for listen in ("127.0.0.1", "::1", "localhost"):
        check(CoordinatorConfig(name="a", hosts=["a"], listen=listen), insecure=True)


def test_a_port_that_is_taken_is_said_at_once() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(
            CoordinatorError, match=f"port={port}: cannot be used \\(Address already in use\\)"
        ):
            check_port(CoordinatorConfig(name="a", hosts=["a"], listen="127.0.0.1", port=port))
    check_port(CoordinatorConfig(name="a", hosts=["a"], listen="127.0.0.1", port=port))


def test_a_systemd_unit_starts_this_folder(folder: CoordinatorFolder) -> None:
    text = unit(folder.path, "100% hub")
    assert "Description=fedmed coordinator 100%% hub" in text
    assert f"coordinator start '{folder.path}'" in text
    assert "KillMode=mixed" in text
    assert "NoNewPrivileges=true" in text
    values = [
        line.partition("=")[0] for line in text.splitlines() if "=" in line and not line.startswith("#")
    ]
    assert len(values) > 12


def test_kept_figures_are_sent_once_the_run_is_over_and_mlflow_is_back(
    folder: CoordinatorFolder, place: RunPlace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not before: the run itself would send them too."""
    sent: list[str] = []

    class Sent:
        stdout = None

        def poll(self) -> int:
            return 0

    def spawned(command: list[str], **_: object) -> Sent:
        sent.append(command[-1])
        (place.path / KEPT).unlink()
        return Sent()

    monkeypatch.setattr(figures, "spawn", spawned)
    monkeypatch.setattr(figures, "follow", lambda *_: None)
    listening = socket.create_server(("127.0.0.1", 0))
    sender = figures.Sender(folder.runs, f"http://127.0.0.1:{listening.getsockname()[1]}", pause=0.0)
    down = figures.Sender(folder.runs, "http://127.0.0.1:9", pause=0.0)
    write_json(place.path / KEPT, {"metrics": [], "ended": "FINISHED"})
    place.change(state="running")
    sender.tick()
    assert sent == []
    place.change(state="finished")
    down.tick()
    assert sent == []
    sender.tick()
    assert sent == [str(place.path)]
    sender.tick()
    assert len(sent) == 1
    listening.close()
