"""A server is started again whenever it ends, and ends with the process that started it."""

import json
import logging
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from strategies.coordinator import logs, processes
from strategies.coordinator.processes import Server
from tests.commands import ROOT, wait_for
from tests.strategies.coordinator.fakes import alive

# Says who it is, has a child that would hold its port, and stays.
PROGRAM = """
import os, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
print("started", os.getpid(), child.pid, "\\x1b[91mred\\x1b[0m", flush=True)
time.sleep(60)
"""


@pytest.fixture
def log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    handler = logs.write_to(tmp_path / "logs")
    yield tmp_path / "logs" / logs.NAME
    logs.log.removeHandler(handler)
    handler.close()


def lines(log: Path, process: str) -> list[str]:
    every = [json.loads(line) for line in log.read_text().splitlines()]
    return [line["text"] for line in every if line["process"] == process]


def started(log: Path) -> list[list[int]]:
    return [
        [int(word) for word in text.split()[1:3]] for text in lines(log, "toy") if text.startswith("started")
    ]


@pytest.fixture
def server(log: Path) -> Iterator[Server]:
    del log
    made = Server("toy", [sys.executable, "-c", PROGRAM], signal.SIGKILL)
    yield made
    made.stop()


def test_a_server_that_dies_starts_again_after_a_pause_that_grows(
    server: Server, log: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = time.monotonic()
    monkeypatch.setattr(processes.time, "monotonic", lambda: clock)
    pauses = []
    for number in range(1, 5):
        server.tick()
        own, child = wait_for_start(log, number)
        assert server.pid is not None
        os.kill(own, signal.SIGKILL)
        wait_for_death(server)
        # What it left behind would hold its port.
        assert_gone(child)
        before = clock
        while server.pid is None:
            clock += 0.5
            server.tick()
        pauses.append(clock - before)
    assert pauses == [2, 4, 8, 16]
    assert "toy ended with code -9; it starts again in 2 s" in lines(log, "coordinator")
    # One that ran for long enough starts again soon.
    clock += processes.STEADY + 1
    os.kill(wait_for_start(log, 5)[0], signal.SIGKILL)
    wait_for_death(server)
    clock += 1
    server.tick()
    assert server.pid is not None


def wait_for_start(log: Path, number: int) -> list[int]:
    # Not `wait_for`, whose clock stands still here.
    for _ in range(1000):
        if len(started(log)) >= number:
            return started(log)[number - 1]
        time.sleep(0.02)
    raise AssertionError("it did not start")


def wait_for_death(server: Server) -> None:
    for _ in range(1000):
        server.tick()
        if server.pid is None:
            return
        time.sleep(0.02)
    raise AssertionError("its end was not noticed")


def assert_gone(pid: int) -> None:
    for _ in range(500):
        if not alive(pid):
            return
        time.sleep(0.02)
    raise AssertionError(f"process {pid} stays")


def test_a_stopped_server_leaves_nothing_behind(server: Server, log: Path) -> None:
    server.tick()
    wait_for(lambda: started(log))
    own, child = started(log)[0]
    assert own == server.pid
    server.stop()
    assert not alive(own)
    assert_gone(child)


def test_the_log_is_one_object_a_line_whatever_is_in_it(log: Path) -> None:
    logs.log.warning('two\nlines, "quotes", \x00 and ü')
    assert lines(log, "coordinator") == ['two\nlines, "quotes", \x00 and ü']
    assert log.read_text().count("\n") == 1
    assert log.parent.stat().st_mode & 0o077 == 0
    # Nor does it end in the terminal.
    assert not logs.log.propagate
    assert logging.getLogger("fedmed.supervisor") is logs.log
