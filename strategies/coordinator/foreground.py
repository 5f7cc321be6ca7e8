"""`fedmed coordinator start` and `stop`, as a person meets them: a view in a terminal, or a process behind it."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from typing import Any

from rich.live import Live

from strategies.console import plain_console
from strategies.coordinator.folder import CoordinatorError, CoordinatorFolder, command
from strategies.coordinator.link import nodes
from strategies.coordinator.snapshot import changes, view
from strategies.coordinator.supervisor import FIRST, Supervisor, check, check_port

# How long a coordinator may take to put its runs away.
GRACE = 60.0


def in_foreground(folder: CoordinatorFolder, *, insecure: bool) -> None:
    """Run the coordinator: a live view on a terminal, a line for each change elsewhere."""
    console = plain_console()
    if not sys.stdout.isatty():
        before: dict[str, Any] | None = None

        def tell(values: dict[str, Any]) -> None:
            nonlocal before
            if before is None:
                print(f"coordinator '{folder.config.name}' at {folder.address}", flush=True)
            for line in changes(before, values):
                print(f"{time.strftime('%H:%M:%S')} {line}", flush=True)
            before = values

        Supervisor(folder, insecure=insecure, show=tell).run()
        return
    with Live("starting …", console=console, auto_refresh=False) as live:
        Supervisor(
            folder, insecure=insecure, show=lambda values: live.update(view(values), refresh=True)
        ).run()


def detached(folder: CoordinatorFolder, *, insecure: bool) -> str:
    """Start the coordinator in the background; what to say once it answers.

    Raises:
        CoordinatorError: it runs already, or does not start.
    """
    # What can be refused at once is refused here.
    check(folder.config, insecure=insecure)
    with folder.alone():
        check_port(folder.config)
    folder.logs.mkdir(mode=0o700, exist_ok=True)
    output = folder.logs / "start.log"
    line = [sys.executable, "-P", "-c", "from fedmed.cli.main import main; main()", "coordinator", "start"]
    option = ["--insecure-for-testing"] if insecure else []
    with output.open("wb") as file:
        process = subprocess.Popen(
            [*line, str(folder.path), *option],
            stdin=subprocess.DEVNULL, stdout=file, stderr=file, start_new_session=True,
        )  # fmt: skip
    end = time.monotonic() + FIRST
    while nodes(folder) is None:
        if process.poll() is not None or time.monotonic() > end:
            with contextlib.suppress(ProcessLookupError):
                process.terminate()
            said = output.read_text("utf-8", "replace").strip().splitlines() or [""]
            raise CoordinatorError(said[-1].removeprefix("error: ") or f"it did not start; see {folder.logs}")
        time.sleep(0.2)
    return (
        f"coordinator '{folder.config.name}' runs at {folder.address}, process {process.pid}; "
        f"look at it: {command('status', folder.path)}; end it: {command('stop', folder.path)}"
    )


def end(folder: CoordinatorFolder) -> None:
    """End the coordinator that runs in a folder.

    Raises:
        CoordinatorError: none does, or it does not end.
    """
    running = folder.running()
    if not running:
        raise CoordinatorError(f"{folder.path}: this coordinator does not run")
    with contextlib.suppress(ProcessLookupError):
        os.kill(int(running["pid"]), signal.SIGTERM)
    end = time.monotonic() + GRACE
    while folder.running() is not None:
        if time.monotonic() > end:
            raise CoordinatorError(f"{folder.path}: process {running['pid']} does not end; see {folder.logs}")
        time.sleep(0.1)
