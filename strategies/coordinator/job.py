"""One run under way: its task at the SuperLink, its process, and what becomes of it."""

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from strategies.coordinator.child import spawn
from strategies.coordinator.logs import log
from strategies.coordinator.records import RunPlace
from strategies.coordinator.worker import Assignment, Exit

WORKER = (sys.executable, "-P", "-m", "strategies.coordinator.worker")
# How often a process that was killed is started again without having finished a round since.
ATTEMPTS = 5
LONGEST = 30.0
# How long a run has to put itself away.
GRACE = 20.0


class TaskLike(Protocol):
    """The part of `fedmed.flower.tasks.Task` that is needed here."""

    token: str
    run: int

    def begin(self) -> str:
        """Mark it as running; its settings."""
        ...

    def heartbeat(self) -> bool:
        """Say that it goes on; False: it is over at the SuperLink."""
        ...

    def finish(self, *, ok: bool, details: str) -> None:
        """Say how it ended."""
        ...


@dataclass(frozen=True)
class Outcome:
    """How a run ended: the state for its record (`lost`: not for good), and why."""

    state: str
    detail: str = ""


@dataclass
class Attempts:
    """How often a run was started without having finished another round. One that gets on may be killed any number
    of times."""

    round: int = -1
    count: int = 0

    def begin(self, done: int) -> None:
        """Count a start after `done` rounds."""
        self.count = 1 if done > self.round else self.count + 1
        self.round = done


class Job:
    """A run whose process is started again when it was killed. Its methods are called in the main thread.

    Attributes:
        lost: set, by any thread, once the SuperLink takes the run for ended.
    """

    def __init__(
        self,
        place: RunPlace,
        task: TaskLike,
        coordinator: Path,
        *,
        insecure: bool,
        attempts: Attempts,
        command: Sequence[str] = WORKER,
    ) -> None:
        self.place, self.task = place, task
        self.lost = False
        self._coordinator, self._insecure, self._command = coordinator, insecure, command
        self._process: subprocess.Popen[bytes] | None = None
        self._attempts = attempts
        self._next = 0.0
        self._asked_at: float | None = None

    @property
    def pid(self) -> int | None:
        """Of the run's process."""
        return self._process.pid if self._process is not None else None

    def tick(self) -> Outcome | None:
        """Start the process when it is due, end it when a person wants that; how the run ended, once it has."""
        stop = self.place.stop_wanted
        if self._process is None:
            if stop:
                return Outcome("stopped", "stopped by a person")
            if time.monotonic() >= self._next:
                self._start()
            return None
        if stop:
            self.interrupt()
        code = self._process.poll()
        if code is None:
            return None
        self._process.wait()
        self._process = None
        return self._ended(code, stop=stop)

    def _ended(self, code: int, *, stop: bool) -> Outcome | None:
        if code == Exit.FINISHED:
            return Outcome("finished")
        if stop:
            return Outcome("stopped", "stopped by a person")
        if code == Exit.REFUSED:
            return Outcome("refused", self._last_error())
        if code >= 0 and code not in (Exit.CRASHED, Exit.LOST):
            return Outcome("failed", self._last_error())
        why = f"signal {signal.Signals(-code).name}" if code < 0 else self._last_error()
        if self._attempts.count >= ATTEMPTS:
            return Outcome("failed", f"its process ended {self._attempts.count} times in one round: {why}")
        if code == Exit.LOST:
            return Outcome("lost", why)
        pause = min(2.0 ** (self._attempts.count - 1), LONGEST)
        self._next = time.monotonic() + pause
        log.error("run '%s': its process ended (%s); it goes on in %g s", self.place.name, why, pause)
        return None

    def _start(self) -> None:
        record = self.place.read()
        self._attempts.begin(self.place.figures().round)
        told = Assignment(
            coordinator=str(self._coordinator),
            insecure=self._insecure,
            token=self.task.token,
            run=self.task.run,
            overrides=self.place.settings(),
        )
        cwd = Path(record.cwd)
        handle = os.open(self.place.output, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        with os.fdopen(handle, "wb") as output:
            self._process = spawn(
                self._command, dies_by=signal.SIGKILL, cwd=cwd if cwd.is_dir() else self.place.path,
                env={"PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"},
                stdin=subprocess.PIPE, stdout=output, stderr=output,
            )  # fmt: skip
        stdin = self._process.stdin
        assert stdin is not None
        # It may be dead already.
        with contextlib.suppress(BrokenPipeError), stdin:
            stdin.write(json.dumps(dataclasses.asdict(told)).encode())
        log.info("run '%s' starts, process %s", self.place.name, self._process.pid)

    def interrupt(self) -> None:
        """Ask the process to put the run away; kill it when it does not."""
        if self._process is None:
            return
        now = time.monotonic()
        if self._asked_at is None:
            self._asked_at = now
            self._process.send_signal(signal.SIGINT)
        elif now - self._asked_at > GRACE:
            self._process.kill()

    def kill(self) -> None:
        """End the process at once; the run can be resumed."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    @property
    def over(self) -> bool:
        """Whether its process has ended."""
        return self._process is None or self._process.poll() is not None

    def _last_error(self) -> str:
        """The last error that the run printed."""
        with contextlib.suppress(OSError):
            with self.place.output.open("rb") as file:
                file.seek(max(0, file.seek(0, os.SEEK_END) - 65536))
                lines = file.read().decode("utf-8", "replace").splitlines()
            for line in reversed(lines):
                if line.startswith("error: "):
                    return line.removeprefix("error: ")
        return f"see {self.place.output}"
