"""A coordinator and its sites as real processes, which are killed, stopped and started again while runs are under way.

The same in network namespaces, where cables are cut: tests/system/test_network_namespaces.py.
"""

import contextlib
import json
import os
import signal
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest

from experiments.shared.consortium import COORDINATOR, Consortium
from fedmed.privacy.reader import read_account
from strategies.folder import RECEIPTS
from tests.commands import light

NAMES = ("Cleveland", "Hungary")
SIZES = "task.declared_sizes={Cleveland: 304, Hungary: 293}"
RUN = [
    "model=logistic", "task=heart", SIZES, "task.split=hash", "privacy.epsilon=null", "privacy.noise_multiplier=20",
    "privacy.delta=1e-5", "privacy.metrics=none", "tracking=none", "federation.timeout=15", "federation.quorum=0.5",
]  # fmt: skip
pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def consortium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Consortium]:
    made = Consortium(tmp_path_factory.mktemp("faults") / "c", NAMES, command=in_a_fork)
    made.make()
    made.start()
    yield made
    made.end()


def rounds_sent(consortium: Consortium, name: str) -> int:
    folder = consortium.run_folder(name)
    journal = folder / "journal.jsonl" if folder else None
    return journal.read_text().count("round-sent") if journal and journal.exists() else 0


def ended(consortium: Consortium, name: str) -> bool:
    return (consortium.run_folder(name) or Path("none")).joinpath("summary.json").exists()


def began(consortium: Consortium, *overrides: str, name: str, rounds: int, until: int) -> None:
    """A run, launched, that has sent some rounds."""
    consortium.launch(*RUN, *overrides, f"rounds={rounds}", name=name)
    consortium.wait(lambda: rounds_sent(consortium, name) >= until, timeout=180)


def agree(consortium: Consortium, name: str) -> list[dict[str, Any]]:
    """The rounds of a run that has ended, each finished once; no site's ledger was charged for other than it says."""
    consortium.wait(lambda: ended(consortium, name), timeout=240)
    history = consortium.history(name)
    assert [entry["round"] for entry in history] == list(range(1, len(history) + 1))
    folder = consortium.run_folder(name)
    assert folder is not None
    run_id = json.loads((folder / "plans.json").read_text())["run_id"]
    receipts = [json.loads(line) for line in (folder / RECEIPTS).read_text().splitlines()]
    for site in consortium.names:
        account, _ = read_account(consortium.site(site) / "ledger.db")
        charged = account.drawn(run_id)
        assert history[-1]["spent"][site] == charged, (site, history[-1])
        assert charged >= sum(site in entry["sites"] for entry in history)
        heads = [receipt["head"] for receipt in receipts if receipt["site"] == site]
        if heads:
            # What the coordinator holds a receipt for is in the ledger.
            checked = consortium.do(
                "privacy",
                "verify",
                "--receipts",
                str(folder),
                "--site",
                str(consortium.site(site)),
                check=False,
            )
            assert checked.returncode == 0, checked.stdout + checked.stderr
    return history


def children(consortium: Consortium, module: str) -> list[psutil.Process]:
    """The coordinator's processes that run a module."""
    found = []
    for process in psutil.Process(consortium.processes[COORDINATOR].pid).children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if module in process.cmdline():
                found.append(process)
    return found


def in_a_fork(words: Sequence[str], folder: Path) -> tuple[int, str, str]:
    done = light()(*words, cwd=folder)
    return done.code, done.out, done.err


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


def test_a_killed_run_process_goes_on_and_repeats_no_finished_round(consortium: Consortium) -> None:
    began(consortium, name="worker-killed", rounds=12, until=4)
    (worker,) = children(consortium, "strategies.coordinator.worker")
    worker.kill()
    history = agree(consortium, "worker-killed")
    assert len(history) == 12


def test_a_killed_superlink_is_started_again_and_the_run_goes_on(consortium: Consortium) -> None:
    began(consortium, name="superlink-killed", rounds=12, until=4)
    (superlink,) = children(consortium, "fedmed.flower.superlink")
    superlink.kill()
    history = agree(consortium, "superlink-killed")
    assert len(history) == 12


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
    consortium.start()
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
