"""A SuperLink that is a few lists, for what watches over runs."""

import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from fedmed.flower.line import LinkDown, LinkError
from strategies.coordinator.executor import Executor
from strategies.coordinator.folder import CoordinatorFolder
from tests.commands import wait_for

WORKER = (sys.executable, "-P", "-m", "tests.strategies.coordinator.fake_worker")


@dataclass
class FakeSuperLink:
    """Its runs: number -> overrides, status, sub_status, details. Plays Control, Tasks and each Task."""

    known: dict[int, SimpleNamespace] = field(default_factory=dict)
    down: bool = False

    def start_run(self, overrides: Sequence[str]) -> int:
        self.answer()
        number = len(self.known) + 1
        self.known[number] = SimpleNamespace(
            run=number, overrides=shlex.join(overrides), status="pending", sub_status="", details=""
        )
        return number

    def stop_run(self, run: int) -> None:
        self.answer()
        self._end(run, "stopped", "")

    def runs(self) -> list[Any]:
        self.answer()
        return list(self.known.values())

    def acquire(self) -> "FakeTask | None":
        self.answer()
        pending = [run for run in list(self.known.values()) if run.status == "pending"]
        if not pending:
            time.sleep(0.02)
            return None
        pending[0].status = "starting"
        return FakeTask(self, pending[0].run)

    def close(self) -> None:
        pass

    def answer(self) -> None:
        if self.down:
            raise LinkDown("away")

    def _end(self, run: int, how: str, details: str) -> None:
        if self.known[run].status == "finished":
            raise LinkError("it is over")
        self.known[run].__dict__.update(status="finished", sub_status=how, details=details)


@dataclass
class FakeTask:
    """A run that was taken."""

    link: FakeSuperLink
    run: int

    @property
    def token(self) -> str:
        return f"TOKEN-{self.run}"

    def begin(self) -> str:
        self.link.answer()
        self.link.known[self.run].status = "running"
        return str(self.link.known[self.run].overrides)

    def heartbeat(self) -> bool:
        self.link.answer()
        return bool(self.link.known[self.run].status == "running")

    def finish(self, *, ok: bool, details: str) -> None:
        self.link.answer()
        self.link._end(self.run, "completed" if ok else "failed", details)


def executor_of(folder: CoordinatorFolder, link: FakeSuperLink) -> Executor:
    """One that works on a fake SuperLink, with fake processes, and starts at once."""
    return Executor(
        folder, tasks=lambda: link, control=lambda: link, insecure=False, command=WORKER, beat=0.1
    )  # type: ignore[arg-type, unused-ignore]


def until(executor: Executor, what: Any, *, seconds: float = 30) -> Any:
    """Tick until `what()` is true."""

    def ticked() -> Any:
        executor.tick()
        return what()

    return wait_for(ticked, seconds=seconds)


def alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and was not yet waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False
