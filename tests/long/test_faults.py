"""A coordinator and its sites as real processes, which are killed, stopped and started again while runs are under way.

Part of `make test-full`. In network namespaces, where cables are cut: tests/system/test_network_namespaces.py.
"""

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from mlflow import MlflowClient

from experiments.shared.consortium import COORDINATOR, Consortium, free_port
from strategies.coordinator.snapshot import answers
from tests.consortium.runs import NAMES, RUN, agree, began, children, ended, in_a_fork, rounds_sent

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def consortium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Consortium]:
    made = Consortium(tmp_path_factory.mktemp("faults") / "c", NAMES, command=in_a_fork)
    made.make()
    made.start()
    yield made
    made.end()


def test_a_killed_site_costs_the_others_a_time_out_and_is_back_for_the_next_round(
    consortium: Consortium,
) -> None:
    began(consortium, name="site-killed", rounds=12, until=3)
    consortium.kill("Hungary")
    sent = rounds_sent(consortium, "site-killed")
    consortium.start("Hungary")
    history = agree(consortium, "site-killed")
    assert len(history) == 12
    assert all("Cleveland" in entry["sites"] for entry in history)
    assert any("Hungary" in entry["sites"] for entry in history[: sent - 1])
    assert "Hungary" in history[-1]["sites"]
    assert max(entry["seconds"] for entry in history) < 60


@pytest.mark.parametrize("module", ["strategies.coordinator.worker", "fedmed.flower.superlink"])
def test_a_killed_server_is_started_again_and_no_finished_round_repeated(
    module: str, consortium: Consortium
) -> None:
    name = module.rpartition(".")[2]
    began(consortium, name=name, rounds=12, until=4)
    (process,) = children(consortium, module)
    process.kill()
    assert len(agree(consortium, name)) == 12


def test_everything_of_the_coordinator_killed_at_once_goes_on_from_disk(consortium: Consortium) -> None:
    began(consortium, name="all-killed", rounds=12, until=4)
    coordinator = psutil.Process(consortium.processes[COORDINATOR].pid)
    every = [coordinator, *coordinator.children(recursive=True)]
    assert len(every) >= 3
    consortium.kill(COORDINATOR)
    for process in every:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    _, alive = psutil.wait_procs(every, timeout=20)
    assert not alive
    consortium.start(COORDINATOR)
    history = agree(consortium, "all-killed")
    assert len(history) == 12


def test_a_stopped_site_holds_the_others_no_longer_than_the_time_out(consortium: Consortium) -> None:
    """It neither answers nor hangs up: a machine that stands still."""
    began(consortium, name="site-stopped", rounds=8, until=3)
    site = consortium.processes["Hungary"].pid
    os.kill(site, signal.SIGSTOP)
    try:
        sent = rounds_sent(consortium, "site-stopped")
        consortium.wait(lambda: rounds_sent(consortium, "site-stopped") > sent + 1, timeout=120)
    finally:
        os.kill(site, signal.SIGCONT)
    history = agree(consortium, "site-stopped")
    assert len(history) == 8
    assert any("Hungary" not in entry["sites"] for entry in history)


def test_a_closed_terminal_ends_no_run(consortium: Consortium) -> None:
    began(consortium, name="terminal", rounds=6, until=2)
    launcher = consortium.processes["terminal"]
    os.killpg(launcher.pid, signal.SIGHUP)
    launcher.wait(20)
    assert len(agree(consortium, "terminal")) == 6


def test_a_stopped_run_stays_stopped_and_can_be_resumed(consortium: Consortium) -> None:
    began(consortium, name="resumed", rounds=12, until=3)
    folder = consortium.run_folder("resumed")
    assert folder is not None
    consortium.do("runs", "stop", folder.name, "--coordinator", COORDINATOR)
    time.sleep(3)
    sent = rounds_sent(consortium, "resumed")
    time.sleep(3)
    assert rounds_sent(consortium, "resumed") == sent
    assert not ended(consortium, "resumed")
    consortium.do("runs", "resume", folder.name, "--coordinator", COORDINATOR)
    assert len(agree(consortium, "resumed")) == 12


def test_an_mlflow_that_is_killed_again_and_again_gets_every_figure(tmp_path: Path) -> None:
    made = Consortium(tmp_path / "c", NAMES, command=in_a_fork, mlflow_port=free_port())
    made.make()
    uri = f"http://127.0.0.1:{made.mlflow_port}"
    try:
        made.start()
        made.wait(lambda: answers(uri), timeout=120)
        settings = [word for word in RUN if not word.startswith("tracking")]
        made.launch(*settings, "rounds=12", name="tracked")
        for sent in (1, 4, 8):
            made.wait(lambda sent=sent: rounds_sent(made, "tracked") >= sent, timeout=180)
            for process in children(made, "mlflow"):
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
        assert len(agree(made, "tracked")) == 12
        # Started again by the coordinator, which then sends what was kept.
        made.wait(lambda: answers(uri) and steps(uri, "seconds") == list(range(1, 13)), timeout=180)
    finally:
        made.end()


def steps(uri: str, metric: str) -> list[int]:
    """Of a metric in the one run that MLflow has."""
    client = MlflowClient(uri)
    experiments = [one.experiment_id for one in client.search_experiments()]
    return [
        value.step
        for run in client.search_runs(experiments)
        for value in client.get_metric_history(run.info.run_id, metric)
    ]
