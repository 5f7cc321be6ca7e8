"""The servers that a coordinator keeps running: Flower's SuperLink, and MLflow."""

import contextlib
import importlib.util
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from strategies.coordinator.child import spawn
from strategies.coordinator.folder import SERVER, TRUSTED, CoordinatorFolder
from strategies.coordinator.logs import follow, log

# A server that has run so long starts again at once, and with the shortest pause after that.
STEADY, LONGEST = 60.0, 30.0
GRACE = 5.0


@dataclass
class Server:
    """A process that is started again whenever it ends, after 1 s, 2 s, 4 s …, at most 30 s."""

    name: str
    command: Sequence[str]
    # What the kernel sends it when this process is killed.
    dies_by: signal.Signals
    env: Mapping[str, str] = field(default_factory=dict)
    starts: int = 0
    _process: subprocess.Popen[bytes] | None = None
    _pause: float = 1.0
    _since: float = 0.0
    _next: float = 0.0

    @property
    def pid(self) -> int | None:
        """Of the running process."""
        return self._process.pid if self._process is not None else None

    def tick(self) -> None:
        """Start it if it is due, notice if it has ended. In the main thread."""
        now = time.monotonic()
        if self._process is None:
            if now >= self._next:
                self._start(now)
            return
        code = self._process.poll()
        if code is None:
            return
        # What it may have left behind holds its port.
        self._end_group(self._process.pid)
        self._process = None
        self._pause = 1.0 if now - self._since > STEADY else min(self._pause * 2, LONGEST)
        self._next = now + self._pause
        log.error("%s ended with code %s; it starts again in %g s", self.name, code, self._pause)

    def _start(self, now: float) -> None:
        self._process = spawn(
            self.command, dies_by=self.dies_by, env=self.env,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        self._since = now
        self.starts += 1
        follow(self._process, self.name)
        log.info("%s starts, process %s", self.name, self._process.pid)

    def stop(self) -> None:
        """End it: asked first, killed after some seconds."""
        if self._process is None:
            return
        self._process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(GRACE)
        self._end_group(self._process.pid)
        self._process.wait()
        self._process = None

    @staticmethod
    def _end_group(group: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(group, signal.SIGKILL)


def superlink(folder: CoordinatorFolder, *, insecure: bool) -> Server:
    """The SuperLink of a coordinator."""
    from fedmed.flower.superlink import command

    # One file holds the chain and the key, so that they are renewed together.
    server = None if insecure else folder.path / SERVER
    line = command(
        host=folder.config.listen,
        port=folder.config.port,
        database=folder.path / "superlink.db",
        control_secret=folder.path / "control.secret",
        executor_secret=folder.path / "executor.secret",
        certificate=server,
        key=server,
        ca=None if insecure else folder.path / TRUSTED,
    )
    # It puts nothing away when it is asked to end, and would wait for those who wait for it.
    return Server("superlink", line, signal.SIGKILL)


def mlflow_uri(folder: CoordinatorFolder) -> str | None:
    """Where this coordinator's MLflow answers; None: it has none."""
    if not folder.config.mlflow or importlib.util.find_spec("mlflow") is None:
        return None
    return f"http://127.0.0.1:{folder.config.mlflow_port}"


def mlflow(folder: CoordinatorFolder) -> Server | None:
    """MLflow's server on loopback, with its database in the folder; None: it is switched off or not installed."""
    if mlflow_uri(folder) is None:
        return None
    artifacts = folder.path / "mlartifacts"
    line = [
        sys.executable, "-P", "-m", "mlflow", "server", "--host", "127.0.0.1",
        "--port", str(folder.config.mlflow_port), "--workers", "1",
        "--backend-store-uri", f"sqlite:///{folder.path / 'mlflow.db'}",
        "--artifacts-destination", artifacts.as_uri(), "--uvicorn-opts", "--log-level warning",
    ]  # fmt: skip
    env = {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    # It hands the signal on to the server that it starts.
    return Server("mlflow", line, signal.SIGTERM, env)
