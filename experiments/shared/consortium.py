"""A consortium of real processes on this machine, driven by the commands that people use."""

import contextlib
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from experiments.shared.commands import fedmed

COORDINATOR, SITES = "coordinator", "sites"
POLICY = {
    "data": '"*"',
    "patient_column": "id",
    "tasks": '["heart disease in four hospitals"]',
    "needs_approval": "false",
    "reply_grid_seconds": "0",
    "epsilon_per_run": "8.0",
    "delta_per_run": "1.0e-4",
    "delta_total": "1.0e-4",
    "epsilon_total": "40.0",
    "min_noise_multiplier": "0.1",
    "max_steps": "1000000",
}


def free_port() -> int:
    """One that nobody listens on at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


Command = Callable[[Sequence[str], Path], tuple[int, str, str]]


@dataclass
class Consortium:
    """A coordinator and its sites, each a process with a log beside its folder.

    Attributes:
        names: of the sites, which the task declares.
        hosts: addresses of the coordinator; the first is the one that sites are told.
        inside: words before every command's line, e.g. of a network namespace.
        command: does what a command line does, and gives its code and what it said; None: in a process of its own.
        prefix: words before a process's command line, by site's name or "coordinator", e.g. to run it elsewhere.
        mlflow_port: of the coordinator's MLflow; None: it has none.
    """

    folder: Path
    names: tuple[str, ...]
    host: str = "127.0.0.1"
    policy: dict[str, str] = field(default_factory=dict)
    budget: float = 40.0
    port: int = field(default_factory=free_port)
    prefix: dict[str, list[str]] = field(default_factory=dict)
    inside: list[str] = field(default_factory=list)
    command: Command | None = None
    mlflow_port: int | None = None
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    @property
    def environment(self) -> dict[str, str]:
        return os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "FLWR_TELEMETRY_ENABLED": "0"}

    @property
    def home(self) -> Path:
        """The coordinator's folder."""
        return self.folder / COORDINATOR

    def site(self, name: str) -> Path:
        """A site's folder."""
        return self.folder / SITES / name

    def make(self) -> None:
        """Make all folders, set budgets, admit the sites."""
        (self.folder / SITES).mkdir(parents=True)
        self.do(
            "coordinator",
            "init",
            COORDINATOR,
            "--name",
            "test",
            "--host",
            self.host,
            "--port",
            str(self.port),
        )
        mlflow = {"mlflow": "false"} if self.mlflow_port is None else {"mlflow_port": str(self.mlflow_port)}
        self._set(self.home / "coordinator.yaml", mlflow | {"listen": f'"{self.host}"'})
        for name in self.names:
            where = f"{SITES}/{name}"
            address = f"{self.host}:{self.port}"
            self.do(
                "site",
                "init",
                where,
                "--name",
                name,
                "--coordinator",
                address,
                "--ca",
                f"{COORDINATOR}/ca.pem",
            )
            self._set(self.site(name) / "site.yaml", POLICY | self.policy)
            self.do("privacy", "cohort", "add", "default", "--declared-size", "300", "--site", where)
            self.do(
                "privacy", "budget", "set", "default", "--epsilon", f"{self.budget:g}", "--delta", "1e-4",
                "--why", "test", "--site", where,
            )  # fmt: skip
            (public,) = self.site(name).glob("*.pub")
            self.do("coordinator", "admit", str(public), "--coordinator", COORDINATOR)

    def do(self, *words: str, check: bool = True) -> "subprocess.CompletedProcess[str]":
        """A command of fedmed, to its end.

        Raises:
            RuntimeError: it failed, with what it said.
        """
        if self.command is not None:
            done = subprocess.CompletedProcess(words, *self.command(words, self.folder))
        else:
            done = subprocess.run(
                [*self.inside, fedmed(), *words], cwd=self.folder, env=self.environment, capture_output=True, text=True,
                check=False,
            )  # fmt: skip
        if check and done.returncode:
            raise RuntimeError(f"fedmed {shlex.join(words)}: {done.stdout}{done.stderr}")
        return done

    def start(self, *names: str, wait: bool = True, timeout: float = 120.0) -> None:
        """Start processes ("coordinator", sites by their names; none named: all), and wait until they answer."""
        wanted = names or (COORDINATOR, *self.names)
        for name in wanted:
            words = (
                ["coordinator", "start", COORDINATOR]
                if name == COORDINATOR
                else ["site", "start", f"{SITES}/{name}"]
            )
            with self.log_file(name).open("ab") as log:
                self.processes[name] = subprocess.Popen(
                    [*self.prefix.get(name, []), fedmed(), *words],
                    cwd=self.folder, env=self.environment, stdout=log, stderr=log, stdin=subprocess.DEVNULL,
                    start_new_session=True,
                )  # fmt: skip
        if wait:
            self.wait(lambda: set(wanted) - {COORDINATOR} <= self.online(), timeout=timeout)

    def wait(self, condition: Any, *, timeout: float = 120.0) -> None:
        """Return once the condition holds.

        Raises:
            TimeoutError: it does not, with the ends of all logs.
        """
        end = time.monotonic() + timeout
        while not condition():
            if time.monotonic() > end:
                tails = [f"--- {name}\n{self.log(name)[-1500:]}" for name in self.processes]
                raise TimeoutError("\n".join(tails))
            time.sleep(0.1)

    def online(self) -> set[str]:
        """The sites that the coordinator believes to be online."""
        return {site["name"] for site in self.status().get("sites", []) if site["status"] == "online"}

    def status(self) -> dict[str, Any]:
        """What `fedmed coordinator status --json` says; nothing while nobody answers."""
        done = self.do("coordinator", "status", COORDINATOR, "--json", check=False)
        return json.loads(done.stdout) if done.stdout.startswith("{") else {}

    def log_file(self, name: str) -> Path:
        return self.folder / f"{name}.log"

    def log(self, name: str) -> str:
        """What a process has said so far."""
        return self.log_file(name).read_text() if self.log_file(name).exists() else ""

    def kill(self, name: str) -> None:
        """End a process as a power cut does, and all that it started in its session."""
        process = self.processes.pop(name)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()

    def end(self) -> None:
        """End everything."""
        for process in self.processes.values():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
        for process in self.processes.values():
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        self.processes.clear()

    def run(self, *overrides: str, name: str, check: bool = True) -> "subprocess.CompletedProcess[str]":
        """`fedmed run federation=consortium …`, to its end."""
        words = ["federation=consortium", f"federation.coordinator={COORDINATOR}", f"name={name}"]
        return self.do("run", *words, *overrides, check=check)

    def launch(self, *overrides: str, name: str) -> "subprocess.Popen[bytes]":
        """The same in the background."""
        words = [
            "run",
            "federation=consortium",
            f"federation.coordinator={COORDINATOR}",
            f"name={name}",
            *overrides,
        ]
        with self.log_file(name).open("ab") as log:
            process = subprocess.Popen(
                [*self.inside, fedmed(), *words], cwd=self.folder, env=self.environment, stdout=log, stderr=log,
                start_new_session=True,
            )  # fmt: skip
        self.processes[name] = process
        return process

    def run_folder(self, name: str) -> Path | None:
        """The folder of a run, once there is one."""
        found = sorted((self.home / "runs").glob(f"*-{name}"))
        return found[0] if found else None

    def history(self, name: str) -> list[dict[str, Any]]:
        """The rounds of a finished run."""
        folder = self.run_folder(name)
        path = folder / "history.json" if folder else None
        return list(json.loads(path.read_text())) if path and path.exists() else []

    def work(self, site: str) -> dict[int, float]:
        """Seconds from when a site began a round's training until it had its answer, by round."""
        began: dict[int, float] = {}
        found: dict[int, float] = {}
        for line in self.log(site).splitlines():
            matched = re.search(
                r'"time": "([^"]+)".*"message": "(begun|answered)[^:]*: train, .* round (\d+)"', line
            )
            if matched:
                at, number = datetime.fromisoformat(matched[1]).timestamp(), int(matched[3])
                if matched[2] == "begun":
                    began[number] = at
                elif number in began:
                    found[number] = at - began[number]
        return found

    @staticmethod
    def _set(path: Path, values: dict[str, str]) -> None:
        text = path.read_text()
        for key, value in values.items():
            text, found = re.subn(rf"^{key}: .*$", f"{key}: {value}", text, flags=re.MULTILINE)
            if not found:
                raise KeyError(f"{path}: no {key}")
        path.write_text(text)
