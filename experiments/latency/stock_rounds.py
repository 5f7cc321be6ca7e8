"""Rounds of stock Flower on this machine: SuperLink, SuperNodes and its executors, as its documentation starts them."""

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from fedmed.errors import RunError
from fedmed.flower.control import Control
from fedmed.flower.line import LinkDown

APP = Path(__file__).parent / "stock"
BIN = Path(sys.executable).parent


@contextlib.contextmanager
def started(*line: str, log: Path, environment: dict[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    """A process, with those that it starts, until the block ends."""
    with log.open("ab") as output:
        process = subprocess.Popen(
            line, stdout=output, stderr=output, env=environment, start_new_session=True, cwd=log.parent
        )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, 15)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)
            process.wait()


def rounds(folder: Path, *, sites: int, rounds: int, work: float, ports: list[int]) -> list[dict[str, float]]:
    """Each round's `seconds`, and the `work` of its slowest site within them.

    Args:
        ports: for the SuperLink and for each SuperNode.

    Raises:
        RunError: Flower did not finish the run.
    """
    home, address = folder / "flwr", f"127.0.0.1:{ports[0]}"
    home.mkdir(parents=True)
    (home / "config.toml").write_text(
        f'[superlink]\ndefault = "stock"\n\n[superlink.stock]\naddress = "{address}"\ninsecure = true\n'
    )
    environment = os.environ | {
        "FLWR_HOME": str(home),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
    }
    output = folder / "rounds.json"
    with contextlib.ExitStack() as stack:

        def start(name: str, *options: str) -> None:
            line = (str(BIN / name), "--insecure", *options)
            stack.enter_context(started(*line, log=folder / "stock.log", environment=environment))

        start("flower-superlink", "--port", str(ports[0]), "--database", str(folder / "stock.db"))
        _up(address)
        for index in range(sites):
            start("flower-supernode", "--superlink", address, "--port", str(ports[1 + index]))
        values = f'rounds={rounds} nodes={sites} work={work} output="{output}"'
        line = (str(BIN / "flwr"), "run", str(APP), "stock", "--run-config", values)
        with (folder / "stock.log").open("ab") as log:
            subprocess.run(line, env=environment, stdout=log, stderr=log, check=True)
        control = Control(address, ca=None, secret=b"")
        while not output.exists():
            ended = [run for run in control.runs() if run.status == "finished"]
            if ended and not output.exists():
                raise RunError(
                    f"stock Flower did not finish ({ended[0].details}); see {folder / 'stock.log'}"
                )
            time.sleep(0.5)
        # Its last process ends by itself, and is not killed while it says how it went.
        time.sleep(2)
    return list(json.loads(output.read_text()))


def _up(address: str) -> None:
    control, end = Control(address, ca=None, secret=b""), time.monotonic() + 120
    while True:
        try:
            control.nodes()
            return
        except LinkDown:
            if time.monotonic() > end:
                raise
            time.sleep(0.2)
