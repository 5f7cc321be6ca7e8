"""A whole consortium on loopback: a coordinator's processes, and a process that plays its sites."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from strategies.coordinator.folder import CoordinatorFolder
from strategies.coordinator.records import RunPlace, RunPlaces
from tests.commands import ROOT, Ended, heavy, wait_for
from tests.fedmed.flower.network import free_port
from tests.strategies.coordinator.play_sites import new_site

SITES = ("Cleveland", "Hungary")
FEDMED = (sys.executable, "-P", "-c", "from fedmed.cli.main import main; main()")
SETTINGS = ("federation=consortium", "task=heart10", "task.declared_sizes={Cleveland: 304, Hungary: 260}",
            "model=logistic", "privacy=off", "tracking=none", "federation.timeout=15")  # fmt: skip


@dataclass
class Hub:
    """A coordinator in a folder, its sites beside it."""

    beside: Path
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)

    @property
    def path(self) -> Path:
        return self.beside / "hub"

    @property
    def folder(self) -> CoordinatorFolder:
        return CoordinatorFolder.open(self.path)

    def init(self, *, mlflow: bool = False) -> None:
        made = heavy()(
            "coordinator", "init", str(self.path), "--name", "hub", "--host", "127.0.0.1", "--listen", "127.0.0.1",
            "--port", str(free_port()),
        )  # fmt: skip
        assert made.code == 0, made.err
        options = self.path / "coordinator.yaml"
        text = options.read_text().replace("mlflow_port: 5000", f"mlflow_port: {free_port()}")
        options.write_text(text if mlflow else text.replace("mlflow: true", "mlflow: false"))
        (self.beside / "given.pem").write_bytes(self.folder.trusted)
        for name in SITES:
            new_site(self.beside, name)

    def command(self, *arguments: str, **options: Any) -> Ended:
        """A command about this coordinator."""
        return heavy()(*arguments, env={"FEDMED_COORDINATOR": str(self.path)}, **options)

    def admit(self) -> None:
        for name in SITES:
            done = self.command("coordinator", "admit", str(self.beside / f"{name}.pub"))
            assert done.code == 0, done.err

    def spawn(self, *command: str, output: str) -> subprocess.Popen[bytes]:
        with (self.beside / output).open("ab") as file:
            process = subprocess.Popen(
                command, cwd=self.beside, stdout=file, stderr=file, stdin=subprocess.DEVNULL,
                env={**os.environ, "PYTHONPATH": str(ROOT)},
            )  # fmt: skip
        self.processes.append(process)
        return process

    def start(self, *options: str) -> subprocess.Popen[bytes]:
        """Start the coordinator in the foreground, and wait until it answers."""
        process = self.spawn(*FEDMED, "coordinator", "start", str(self.path), *options, output="start.log")
        slowly(lambda: self.status()["superlink"] == "up" or process.poll() is not None)
        assert process.poll() is None, self.said
        return process

    @property
    def said(self) -> str:
        return (self.beside / "start.log").read_text()

    def sites(self) -> subprocess.Popen[bytes]:
        """Start the sites' process."""
        module = "tests.strategies.coordinator.play_sites"
        return self.spawn(sys.executable, "-m", module, str(self.path), *SITES, output="sites.log")

    def status(self) -> dict[str, Any]:
        from strategies.coordinator.link import nodes
        from strategies.coordinator.snapshot import snapshot

        return snapshot(self.folder, nodes(self.folder))

    def online(self) -> list[str]:
        """The sites that are online, by what the coordinator said last of each."""
        last = dict(re.findall(r"site '(.*)': (.*)", self.said))
        return sorted(name for name, status in last.items() if status == "online")

    def launch(self, *overrides: str, name: str = "run") -> RunPlace:
        """Launch a run and do not watch it."""
        before = {place.name for place in self.places()}
        settings = [*SETTINGS, f"federation.coordinator={self.path}", f"name={name}", *overrides]
        self.spawn(*FEDMED, "run", *settings, output=f"{name}.log")
        return wait_for(lambda: next((place for place in self.places() if place.name not in before), None))

    def places(self) -> list[RunPlace]:
        return RunPlaces(self.folder.runs).all()

    def wait_for_end(self, place: RunPlace, *, seconds: float = 120) -> str:
        slowly(lambda: place.read().state not in ("pending", "running"), seconds=seconds)
        return place.read().state

    def end(self) -> None:
        for process in self.processes:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
        for process in self.processes:
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def descendants(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """All processes below one."""
    return psutil.Process(process.pid).children(recursive=True)


def slowly(what: Callable[[], Any], *, seconds: float = 120) -> Any:
    """What `what` returns, as soon as that is true; it may be dear to ask."""

    def asked() -> Any:
        time.sleep(0.5)
        return what()

    return wait_for(asked, seconds=seconds)
