"""The process of `fedmed coordinator start`: keeps the servers running, executes runs, shows what happens."""

import contextlib
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

from fedmed.flower.control import Control
from fedmed.flower.line import LinkError
from fedmed.flower.tasks import Tasks
from strategies.coordinator import logs, processes
from strategies.coordinator.admissions import Admissions, reconcile
from strategies.coordinator.config import CoordinatorConfig
from strategies.coordinator.executor import Executor
from strategies.coordinator.figures import Sender
from strategies.coordinator.folder import CoordinatorError, CoordinatorFolder, command, hosts_missing
from strategies.coordinator.link import control as control_of
from strategies.coordinator.logs import log
from strategies.coordinator.snapshot import snapshot

LOOPBACK = ("127.0.0.1", "::1", "localhost")
TICK, LOOK = 0.1, 1.0
# How long the SuperLink may take until it answers for the first time.
FIRST = 90.0


class Supervisor:
    """Runs a coordinator until a signal ends it.

    Args:
        insecure: no encryption; on loopback alone.
        show: called about once a second with what `snapshot` gives.
    """

    def __init__(
        self, folder: CoordinatorFolder, *, insecure: bool, show: Callable[[dict[str, Any]], None]
    ) -> None:
        self._folder, self._insecure, self._show = folder, insecure, show
        self._superlink = processes.superlink(folder, insecure=insecure)
        self._mlflow = processes.mlflow(folder)
        self._executor = Executor(
            folder, tasks=self._tasks, control=lambda: control_of(folder), insecure=insecure
        )
        uri = processes.mlflow_uri(folder)
        self._sender = Sender(folder.runs, uri) if uri else None
        self._ending = threading.Event()
        self._seen: dict[str, Any] | None = None

    def run(self) -> None:
        """Serve until SIGTERM or Ctrl-C; runs under way can then go on with the next start.

        Raises:
            CoordinatorError: it runs already, or cannot run as it is.
        """
        check(self._folder.config, insecure=self._insecure)
        # Databases, logs and what runs print are for the owner's eyes.
        os.umask(0o077)
        with self._folder.alone(), self._signals():
            handler = logs.write_to(self._folder.logs)
            try:
                check_port(self._folder.config)
                self._folder.say_running(
                    pid=os.getpid(), started_at=round(time.time(), 3), insecure=self._insecure,
                    mlflow=processes.mlflow_uri(self._folder),
                )  # fmt: skip
                log.info("the coordinator starts, process %s", os.getpid())
                self._warn()
                self._serve()
            finally:
                self._executor.close()
                if self._sender is not None:
                    self._sender.stop()
                for server in self._servers():
                    server.stop()
                log.info("the coordinator ends")
                logs.log.removeHandler(handler)
                handler.close()

    def _serve(self) -> None:
        looking = threading.Thread(target=self._look, name="look", daemon=True)
        taken_up, told = False, 0
        end = time.monotonic() + FIRST
        while not self._ending.is_set():
            for server in self._servers():
                server.tick()
            # Whenever it was started: its database may be another one.
            if self._superlink.starts > told and self._know():
                told = self._superlink.starts
            if told and not taken_up:
                taken_up = self._take_up()
                if taken_up:
                    self._executor.start()
                    looking.start()
            if not told and time.monotonic() > end:
                raise CoordinatorError(
                    f"the SuperLink does not answer at {self._folder.address}; see {self._folder.logs / logs.NAME}"
                )
            self._executor.tick()
            if self._sender is not None and taken_up:
                self._sender.tick()
            if self._seen is not None:
                seen, self._seen = self._seen, None
                self._show(seen)
            self._ending.wait(TICK)

    def _servers(self) -> list[processes.Server]:
        return [server for server in (self._superlink, self._mlflow) if server is not None]

    def _know(self) -> bool:
        """Tell the SuperLink who is admitted, once it answers."""
        try:
            for line in reconcile(Admissions(self._folder.path).read(), self._control()):
                log.info("%s", line)
            return True
        except LinkError:
            return False

    def _take_up(self) -> bool:
        try:
            for name in self._executor.recover():
                log.info("run '%s' goes on", name)
            return True
        except LinkError:
            return False

    def _look(self) -> None:
        """Ask who is online, apart from the main thread: a SuperLink that hangs must not hold it up."""
        control: Control | None = None
        while not self._ending.wait(LOOK):
            nodes = None
            try:
                control = control or self._control()
                nodes = control.nodes()
            except LinkError:
                # Made anew, with the certificates of that time.
                if control is not None:
                    control.close()
                control = None
            with contextlib.suppress(CoordinatorError):
                self._seen = snapshot(self._folder, nodes)

    def _control(self) -> Control:
        return control_of(self._folder)

    def _tasks(self) -> Tasks:
        folder = self._folder
        return Tasks(
            folder.address,
            ca=None if self._insecure else folder.trusted,
            secret=folder.control_secret,
            executor_secret=folder.executor_secret,
        )

    def _warn(self) -> None:
        """Say once what a person may not expect."""
        until, named = self._folder.certificate()
        lines = [
            f"coordinator.yaml: {host}: not in the server's certificate; run: {command('rotate', self._folder.path)}"
            for host in hosts_missing(self._folder.config, named)
        ]
        if time.time() > until.timestamp():
            lines.append(f"the server's certificate has expired; run: {command('rotate', self._folder.path)}")
        if self._folder.config.mlflow and self._mlflow is None:
            lines.append("MLflow is not installed, so that figures stay in the runs' folders; to have it: "
                         "pip install 'fedmed[coordinator]'")  # fmt: skip
        for line in lines:
            print(f"warning: {line}", file=sys.stderr, flush=True)
            log.warning("%s", line)

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        def end(number: int, frame: FrameType | None) -> None:
            del frame
            log.info("%s: ends", signal.Signals(number).name)
            self._ending.set()

        before = {
            number: signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
        }
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def check(config: CoordinatorConfig, *, insecure: bool) -> None:
    """Refuse to leave this machine without encryption.

    Raises:
        CoordinatorError: it would.
    """
    if insecure and config.listen not in LOOPBACK:
        raise CoordinatorError(
            f'--insecure-for-testing with listen={config.listen}: expected listen: "127.0.0.1" in coordinator.yaml; '
            "without encryption nothing may leave this machine"
        )


def check_port(config: CoordinatorConfig) -> None:
    """Refuse to start where another program has the port.

    Raises:
        CoordinatorError: it has.
    """
    family = socket.AF_INET6 if ":" in config.listen else socket.AF_INET
    with socket.socket(family) as probe:
        # What the last coordinator left behind in the kernel does not count.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((config.listen, config.port))
        except OSError as error:
            raise CoordinatorError(
                f"listen={config.listen} port={config.port}: cannot be used ({error.strerror}); choose another in "
                "coordinator.yaml"
            ) from None
