"""Processes that read files for us, each within limits of time and memory, and that may die of a file."""

import contextlib
import json
import os
import selectors
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedmed.dicom.reasons import Reason
from fedmed.errors import DataError

# Files that a worker has in hand beside the one it reads, so that it never waits for us.
AHEAD = 2
# How long a worker may take to import its decoders on a busy machine.
START_SECONDS = 120.0
# The work begins anew with a fresh process after so many files, lest a leak in a decoder adds up.
FILES_PER_PROCESS = 20_000

# Memory that was used for one image serves the next: asking the kernel for it anew costs as much as the arithmetic.
_MEMORY = {
    "MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": str(1 << 30), "MALLOC_TRIM_THRESHOLD_": str(1 << 30),
}  # fmt: skip

Outcome = dict[str, Any]


@dataclass(eq=False)
class _Worker:
    process: "subprocess.Popen[bytes]"
    pending: deque[int] = field(default_factory=deque)
    # When it began what it does now: to start, or to read the first of `pending`.
    since: float = field(default_factory=time.monotonic)
    received: bytearray = field(default_factory=bytearray)
    ready: bool = False
    taken: int = 0


class Workers:
    """A pool of reading processes: `with Workers(…) as workers: workers.read(paths)`.

    Every path ends in exactly one outcome, whatever happens to the process that had it: what the worker answered, or a
    reason where it was killed at its limit of time (`too-slow`) or died (`decoder-crashed`).
    """

    def __init__(self, count: int, *, seconds: float, settings: dict[str, Any]) -> None:
        self._count = count
        self._seconds = seconds
        # By pipe: a command line can be read by everybody on the machine, and this holds the site's key.
        self._settings = json.dumps(settings).encode() + b"\n"
        self._workers: list[_Worker] = []
        self._selector = selectors.DefaultSelector()

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *_: object) -> None:
        for worker in list(self._workers):
            self._end(worker)
        self._selector.close()

    @property
    def processes(self) -> list[int]:
        """The ids of the processes that run now."""
        return [worker.process.pid for worker in self._workers]

    def read(self, paths: Sequence[Path]) -> Iterator[tuple[int, Outcome]]:
        """Each path's position and outcome, in the order in which they come.

        An outcome tells by `seconds` how long it took: at most the limit, and what a kill takes.

        Raises:
            DataError: workers cannot be started.
        """
        todo = deque(range(len(paths)))
        left = len(paths)
        while left:
            while todo and len(self._workers) < min(self._count, left):
                self._start()
            for worker in self._workers:
                self._feed(worker, todo, paths)
            for worker in self._wait():
                for outcome in self._receive(worker, todo):
                    left -= 1
                    yield outcome
            for worker in [worker for worker in self._workers if self._late(worker)]:
                self._end(worker)
                left -= 1
                yield worker.pending.popleft(), _timed(worker, {"reason": Reason.TOO_SLOW.value})
                todo.extendleft(reversed(worker.pending))

    def _start(self) -> None:
        try:
            process = subprocess.Popen(
                [sys.executable, "-m", "fedmed.dicom.worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                # A decoder's own words may quote the file.
                stderr=subprocess.DEVNULL,
                env=os.environ | _MEMORY | {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"},
                # Ctrl-C is ours to handle: a worker that ends by itself would look like a crash.
                start_new_session=True,
            )
        except OSError as error:
            raise DataError(
                f"a reading process cannot start ({error.strerror}); try fewer of them: --workers"
            ) from None
        assert process.stdin is not None
        assert process.stdout is not None
        worker = _Worker(process)
        self._workers.append(worker)
        self._selector.register(process.stdout, selectors.EVENT_READ, worker)
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(self._settings)
            process.stdin.flush()

    def _feed(self, worker: _Worker, todo: deque[int], paths: Sequence[Path]) -> None:
        assert worker.process.stdin is not None
        more = []
        while todo and len(worker.pending) <= AHEAD and worker.taken < FILES_PER_PROCESS:
            if not worker.pending:
                worker.since = time.monotonic() if worker.ready else worker.since
            index = todo.popleft()
            worker.pending.append(index)
            worker.taken += 1
            more.append(json.dumps([index, os.fspath(paths[index])]).encode() + b"\n")
        if more:
            # One that is gone is noticed when its answers end.
            with contextlib.suppress(BrokenPipeError):
                worker.process.stdin.write(b"".join(more))
                worker.process.stdin.flush()

    def _wait(self) -> list[_Worker]:
        deadlines = [
            worker.since + self._limit(worker)
            for worker in self._workers
            if worker.pending or not worker.ready
        ]
        wait = max(0.0, min(deadlines) - time.monotonic())
        return [key.data for key, _ in self._selector.select(wait)]

    def _limit(self, worker: _Worker) -> float:
        return self._seconds if worker.ready else START_SECONDS

    def _late(self, worker: _Worker) -> bool:
        late = time.monotonic() - worker.since > self._limit(worker)
        if late and not worker.ready:
            raise DataError("the reading processes do not start; is fedmed installed with its extra 'dicom'?")
        return late and bool(worker.pending)

    def _receive(self, worker: _Worker, todo: deque[int]) -> Iterator[tuple[int, Outcome]]:
        assert worker.process.stdout is not None
        chunk = os.read(worker.process.stdout.fileno(), 1 << 16)
        if not chunk:
            yield from self._gone(worker, todo)
            return
        worker.received += chunk
        *lines, rest = worker.received.split(b"\n")
        worker.received = bytearray(rest)
        for line in lines:
            if worker.ready:
                index, outcome = json.loads(line)
                assert index == worker.pending.popleft()
                yield index, _timed(worker, outcome)
            worker.ready = True
            worker.since = time.monotonic()
        if worker.taken >= FILES_PER_PROCESS and not worker.pending:
            self._end(worker)

    def _gone(self, worker: _Worker, todo: deque[int]) -> Iterator[tuple[int, Outcome]]:
        self._end(worker)
        if not worker.ready:
            raise DataError("a reading process cannot start; is fedmed installed with its extra 'dicom'?")
        if worker.pending:
            yield worker.pending.popleft(), _timed(worker, {"reason": Reason.DECODER_CRASHED.value})
            todo.extendleft(reversed(worker.pending))

    def _end(self, worker: _Worker) -> None:
        process = worker.process
        assert process.stdin is not None
        assert process.stdout is not None
        self._selector.unregister(process.stdout)
        self._workers.remove(worker)
        process.kill()
        process.wait()
        process.stdout.close()
        # What it was still to read is not flushed to a process that is gone.
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()


def _timed(worker: _Worker, outcome: Outcome) -> Outcome:
    return outcome | {"seconds": round(time.monotonic() - worker.since, 3)}
