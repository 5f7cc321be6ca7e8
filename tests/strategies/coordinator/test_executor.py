"""Runs go on whatever is killed, and end when they end: with real processes and a SuperLink that is a few lists."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import strategies.coordinator.job as job_module
from strategies.coordinator.config import CoordinatorConfig
from strategies.coordinator.executor import Executor
from strategies.coordinator.folder import CoordinatorFolder
from strategies.coordinator.job import ATTEMPTS
from strategies.coordinator.records import RunPlace, RunPlaces
from tests.commands import ROOT, wait_for
from tests.strategies.coordinator.fake_worker import finish_round
from tests.strategies.coordinator.fakes import FakeSuperLink, alive, executor_of, until


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> CoordinatorFolder:
    return CoordinatorFolder.init(
        tmp_path_factory.mktemp("hub") / "hub", CoordinatorConfig(name="hub", hosts=["127.0.0.1"])
    )


@pytest.fixture
def folder(made: CoordinatorFolder, monkeypatch: pytest.MonkeyPatch) -> Iterator[CoordinatorFolder]:
    """With no runs, and no pauses between attempts."""
    import shutil

    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setattr(job_module, "LONGEST", 0.0)
    yield made
    shutil.rmtree(made.runs, ignore_errors=True)


@pytest.fixture
def link() -> FakeSuperLink:
    return FakeSuperLink()


@pytest.fixture
def executor(folder: CoordinatorFolder, link: FakeSuperLink) -> Iterator[Executor]:
    started = executor_of(folder, link)
    started.start()
    yield started
    started.close()


def launched(folder: CoordinatorFolder, link: FakeSuperLink, script: str, name: str = "run") -> RunPlace:
    """A run as `fedmed run` hands it over."""
    place = RunPlaces(folder.runs).new(name, ["rounds=9", "name='a b'"], folder.path)
    (place.path / "script").write_text(script)
    link.start_run(place.settings())
    return place


def starts(place: RunPlace) -> list[dict[str, Any]]:
    path = place.path / "starts"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def ended(place: RunPlace) -> bool:
    return place.read().state not in ("pending", "running")


def test_a_run_that_finishes_is_finished_everywhere(
    folder: CoordinatorFolder, link: FakeSuperLink, executor: Executor
) -> None:
    place = launched(folder, link, "finish")
    until(executor, lambda: ended(place))
    wait_for(lambda: link.known[1].status == "finished")
    assert (place.read().state, link.known[1].sub_status) == ("finished", "completed")
    assert place.read().flower_run == 1
    (start,) = starts(place)
    assert start["overrides"] == ["rounds=9", "name='a b'", f'run_dir="{place.path}"']
    assert (start["coordinator"], start["run"], start["cwd"]) == (str(folder.path), 1, str(folder.path))
    assert place.output.read_text() == "doing finish\n"
    assert place.output.stat().st_mode & 0o077 == 0
    # Everybody on the machine can read a command line.
    assert start["token"] == "TOKEN-1"
    assert "TOKEN" not in str(start["argv"])


@pytest.mark.parametrize(("word", "state"), [("fail", "failed"), ("refuse", "refused")])
def test_a_run_that_cannot_go_on_says_why(
    word: str, state: str, folder: CoordinatorFolder, link: FakeSuperLink, executor: Executor
) -> None:
    place = launched(folder, link, word)
    until(executor, lambda: ended(place))
    wait_for(lambda: link.known[1].status == "finished")
    assert (place.read().state, place.read().detail) == (state, f"it did {word}")
    assert (link.known[1].sub_status, link.known[1].details) == ("failed", f"it did {word}")
    assert len(starts(place)) == 1


def test_a_killed_run_goes_on_from_its_folder(
    folder: CoordinatorFolder, link: FakeSuperLink, executor: Executor
) -> None:
    """Before anything was written: from its settings. A run that gets on may be killed any number of times."""
    place = launched(folder, link, " ".join(["crash", *["round"] * (ATTEMPTS + 3), "finish"]))
    until(executor, lambda: ended(place))
    assert place.read().state == "finished"
    overrides = [start["overrides"] for start in starts(place)]
    run_dir, resume = f'run_dir="{place.path}"', [f'resume="{place.path}"']
    assert overrides[:2] == [["rounds=9", "name='a b'", run_dir]] * 2
    assert overrides[2:] == [resume] * (ATTEMPTS + 3)
    # One run at the SuperLink all along.
    assert list(link.known) == [1]
    assert place.figures().round == ATTEMPTS + 3


def test_a_run_that_dies_in_one_round_again_and_again_is_given_up(
    folder: CoordinatorFolder, link: FakeSuperLink, executor: Executor
) -> None:
    place = launched(folder, link, "round crash")
    until(executor, lambda: ended(place))
    assert place.read().state == "failed"
    assert place.read().detail == f"its process ended {ATTEMPTS} times in one round: signal SIGKILL"
    assert len(starts(place)) == 1 + ATTEMPTS


def test_a_person_s_stop_ends_a_run_for_good(
    folder: CoordinatorFolder, link: FakeSuperLink, executor: Executor
) -> None:
    place = launched(folder, link, "hang")
    until(executor, lambda: starts(place))
    place.stop()
    until(executor, lambda: ended(place))
    assert place.read().state == "stopped"
    wait_for(lambda: link.known[1].sub_status == "stopped")
    assert not alive(starts(place)[0]["pid"])
    # Nor does a restart of the coordinator begin it again.
    assert executor_of(folder, link).recover() == []
    assert place.read().state == "stopped"


def test_the_coordinator_s_end_puts_runs_away_and_the_next_start_goes_on(
    folder: CoordinatorFolder, link: FakeSuperLink
) -> None:
    first = executor_of(folder, link)
    first.start()
    place, stopped = launched(folder, link, "hang finish"), launched(folder, link, "hang", "stopped")
    until(first, lambda: starts(place) and starts(stopped))
    first.close()
    assert not alive(starts(place)[0]["pid"])
    assert place.read().state == "running"
    # While no coordinator ran, a person changed her mind.
    stopped.stop()
    again = executor_of(folder, link)
    assert again.recover() == [place.name]
    again.start()
    until(again, lambda: ended(place))
    again.close()
    assert (place.read().state, stopped.read().state) == ("finished", "stopped")
    assert len(starts(stopped)) == 1
    # What the first one had taken is over there too.
    assert {run.status for run in link.known.values()} == {"finished"}


def test_what_was_launched_and_never_taken_is_not_launched_twice(
    folder: CoordinatorFolder, link: FakeSuperLink
) -> None:
    place = launched(folder, link, "finish")
    executor = executor_of(folder, link)
    assert executor.recover() == [place.name]
    assert list(link.known) == [1]
    # And even if it were, it runs once.
    link.start_run(place.settings())
    executor.start()
    until(executor, lambda: all(run.status == "finished" for run in link.known.values()))
    executor.close()
    assert len(starts(place)) == 1
    assert link.known[2].sub_status == "failed"


def test_a_superlink_that_is_away_for_a_while_changes_nothing(
    folder: CoordinatorFolder, link: FakeSuperLink, executor: Executor
) -> None:
    place = launched(folder, link, "hang")
    until(executor, lambda: starts(place))
    link.down = True
    with pytest.raises(AssertionError, match="waited in vain"):
        until(executor, lambda: len(starts(place)) > 1 or ended(place), seconds=1)
    link.down = False
    with pytest.raises(AssertionError, match="waited in vain"):
        until(executor, lambda: len(starts(place)) > 1 or ended(place), seconds=0.5)
    assert link.known[1].status == "running"


def test_a_run_that_the_superlink_gave_up_goes_on_as_a_new_one_there(
    folder: CoordinatorFolder, link: FakeSuperLink, executor: Executor
) -> None:
    """It was away for longer than Flower waits for a sign of life."""
    place = launched(folder, link, "hang finish")
    until(executor, lambda: starts(place))
    link.known[1].__dict__.update(status="finished", sub_status="failed")
    until(executor, lambda: ended(place))
    assert place.read().state == "finished"
    assert place.read().flower_run == 2
    assert not alive(starts(place)[0]["pid"])
    assert [start["run"] for start in starts(place)] == [1, 2]


def test_a_process_that_lost_the_superlink_goes_on_but_not_for_ever(
    folder: CoordinatorFolder, link: FakeSuperLink, executor: Executor
) -> None:
    place = launched(folder, link, "lost")
    until(executor, lambda: ended(place))
    assert len(starts(place)) == ATTEMPTS
    assert "it did lost" in place.read().detail


def test_what_was_not_launched_by_us_is_refused(
    folder: CoordinatorFolder, link: FakeSuperLink, executor: Executor, tmp_path: Path
) -> None:
    elsewhere = RunPlaces(tmp_path).new("run", [], tmp_path)
    done = launched(folder, link, "finish")
    done.change(state="finished")
    for overrides in ([], ["rounds=1"], ["resume=/etc"], elsewhere.settings(), ['run_dir="']):
        link.start_run(overrides)
    until(executor, lambda: all(run.status == "finished" for run in link.known.values()))
    assert {run.sub_status for run in link.known.values()} == {"failed"}
    assert starts(done) == []
    assert "fedmed run federation=consortium" in link.known[2].details


def test_no_more_runs_at_once_than_the_options_say(
    folder: CoordinatorFolder, link: FakeSuperLink, executor: Executor
) -> None:
    places = [launched(folder, link, "hang", f"run{n}") for n in range(4)]
    until(executor, lambda: sum(len(starts(place)) for place in places) == folder.config.runs_at_once)
    with pytest.raises(AssertionError, match="waited in vain"):
        until(executor, lambda: sum(len(starts(place)) for place in places) > 2, seconds=1.5)
    places[0].stop()
    until(executor, lambda: starts(places[2]))


def test_a_run_does_not_outlive_its_coordinator_s_process(folder: CoordinatorFolder, tmp_path: Path) -> None:
    """Killed with -9, so that nobody could tell it."""
    place = RunPlaces(folder.runs).new("run", [], folder.path)
    (place.path / "script").write_text("hang")
    program = f"""
import time
from pathlib import Path
from strategies.coordinator.folder import CoordinatorFolder
from tests.strategies.coordinator.fakes import FakeSuperLink, executor_of
link = FakeSuperLink()
executor = executor_of(CoordinatorFolder.open(Path({str(folder.path)!r})), link)
assert executor.recover()
executor.start()
while True:
    executor.tick()
    time.sleep(0.05)
"""
    process = subprocess.Popen([sys.executable, "-c", program], cwd=tmp_path)
    try:
        pid = wait_for(lambda: starts(place))[0]["pid"]
        assert alive(pid)
        process.kill()
        wait_for(lambda: not alive(pid), seconds=10)
    finally:
        process.kill()
        process.wait()
    assert place.read().state == "running"


def test_a_process_that_does_not_put_itself_away_is_killed(
    folder: CoordinatorFolder, link: FakeSuperLink, executor: Executor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job_module, "GRACE", 0.2)
    place = launched(folder, link, "hang")
    pid = until(executor, lambda: starts(place))[0]["pid"]
    os.kill(pid, signal.SIGSTOP)
    place.stop()
    until(executor, lambda: ended(place))
    assert place.read().state == "stopped"
    assert not alive(pid)


def test_figures_are_read_as_they_are_written(folder: CoordinatorFolder) -> None:
    place = RunPlaces(folder.runs).new("run", [], folder.path)
    assert (place.figures().round, place.figures().rounds, place.figures().private) == (0, None, None)
    finish_round(place.path)
    finish_round(place.path)
    figures = place.figures()
    # The site that has spent most.
    assert (figures.round, figures.rounds, figures.epsilon, figures.private) == (2, 9, 2.5, True)
    (place.path / "checkpoint.safetensors").write_bytes(b"half")
    assert place.figures().round == 0
