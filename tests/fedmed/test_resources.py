"""The memory that a run needed at its worst, over all of its processes."""

import multiprocessing
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection

import numpy as np
import psutil
import pytest

from fedmed.resources import PeakMemory, peak_resident

MEGABYTES = 64


def megabytes(size: int = MEGABYTES) -> np.ndarray:
    """An array of that size with all pages present."""
    return np.ones(size * 2**20, np.uint8)


def until(ready: Callable[[], bool]) -> None:
    """Wait for the sampling thread, which nobody can wait on."""
    end = time.monotonic() + 120
    while not ready():
        assert time.monotonic() < end
        threading.Event().wait(0.005)


def hold(connection: Connection, shared: np.ndarray | None) -> None:
    mine = megabytes() if shared is None else shared
    # Read, not written: forked pages stay shared.
    connection.send(int(mine[:: 2**12].sum()))
    connection.recv()


def in_a_child(shared: np.ndarray | None) -> float:
    """The peak while a forked process holds memory, of its own or shared with this one; less what was before."""
    fork = multiprocessing.get_context("fork")
    ours, theirs = fork.Pipe()
    with PeakMemory(interval=0.005) as memory:
        before = memory.megabytes
        child = fork.Process(target=hold, args=(theirs, shared))
        child.start()
        ours.recv()
        samples = Samples(memory)
        until(lambda: samples.taken >= 3)
        ours.send(None)
        child.join()
    return memory.megabytes - before


class Samples:
    """Counts samples by listening to the list of processes that each begins with."""

    def __init__(self, memory: PeakMemory) -> None:
        self.taken = 0
        sample = memory._sample

        def counted() -> None:
            sample()
            self.taken += 1

        memory._sample = counted  # type: ignore[method-assign]


def peak_stays() -> None:
    with PeakMemory(interval=0.005) as memory:
        before = memory.megabytes
        held = megabytes()
        until(lambda: memory.megabytes > before + 0.9 * MEGABYTES)
        del held
        peak = memory.megabytes
    with PeakMemory() as later:
        pass
    assert memory.megabytes >= peak > later.megabytes + 0.5 * MEGABYTES


def test_the_peak_stays_when_the_memory_is_gone() -> None:
    """In a process without children: what other tests left running here comes and goes."""
    process = multiprocessing.get_context("spawn").Process(target=peak_stays)
    process.start()
    process.join(timeout=120)
    assert process.exitcode == 0


def test_a_child_s_memory_counts() -> None:
    assert in_a_child(None) > 0.9 * MEGABYTES


def test_memory_that_processes_share_counts_once() -> None:
    """A model that was loaded before the workers were forked is there once."""
    held = megabytes(4 * MEGABYTES)
    assert in_a_child(held) < 2 * MEGABYTES


def test_a_block_that_is_shorter_than_the_interval_is_measured_all_the_same() -> None:
    with PeakMemory(interval=3_600) as memory:
        pass
    assert memory.megabytes > 10


def test_an_error_inside_ends_the_sampling_and_is_passed_on() -> None:
    threads = threading.active_count()
    with pytest.raises(LookupError), PeakMemory(interval=0.005):
        raise LookupError
    assert threading.active_count() == threads


def test_a_process_that_ends_while_it_is_read_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    read = psutil.Process.memory_full_info

    def gone(process: psutil.Process) -> object:
        if process.pid != psutil.Process().pid:
            raise psutil.NoSuchProcess(process.pid)
        return read(process)

    monkeypatch.setattr(psutil.Process, "memory_full_info", gone)
    assert in_a_child(None) < 0.9 * MEGABYTES


def test_a_process_s_peak_is_not_that_of_the_one_that_started_it() -> None:
    """What `getrusage` says of a program begins with the memory of the process that was forked to start it."""
    filled = bytearray(300 * 2**20)
    filled[:: 2**12] = b"x" * len(filled[:: 2**12])
    assert peak_resident() >= len(filled)
    line = [sys.executable, "-c", "from fedmed.resources import peak_resident; print(peak_resident())"]
    assert int(subprocess.run(line, capture_output=True, text=True, check=True).stdout) < 200 * 2**20
