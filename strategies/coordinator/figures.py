"""Sends MLflow what runs kept for it while it was down: `python -m strategies.coordinator.figures RUN_FOLDER`."""

import signal
import subprocess
import sys
import time
from pathlib import Path

from fedmed.tracking import KEPT, send_kept
from strategies.coordinator.child import spawn
from strategies.coordinator.logs import follow, log
from strategies.coordinator.records import ENDED, RunPlaces
from strategies.coordinator.snapshot import answers

PAUSE = 30.0


class Sender:
    """Looks, from time to time, whether runs that are over still keep figures; in the main thread.

    Args:
        uri: of the coordinator's MLflow; runs that name another one are tried too, once this one answers.
    """

    def __init__(self, runs: Path, uri: str, *, pause: float = PAUSE) -> None:
        self._runs, self._uri, self._pause = runs, uri, pause
        self._process: subprocess.Popen[bytes] | None = None
        self._next = 0.0

    def tick(self) -> None:
        """Send one run's figures, if it is time. In a process of its own: MLflow is large, and may hang."""
        if self._process is not None:
            if self._process.poll() is None:
                return
            self._process = None
        if time.monotonic() < self._next:
            return
        self._next = time.monotonic() + self._pause
        waiting = [place for place in RunPlaces(self._runs).all()
                   if (place.path / KEPT).exists() and place.read().state in ENDED]  # fmt: skip
        if not waiting or not answers(self._uri):
            return
        # The one that was tried longest ago: one that never goes through must not hold up the others.
        place = min(waiting, key=lambda place: (place.path / KEPT).stat().st_mtime)
        log.info("run '%s': its figures are sent to MLflow", place.name)
        self._process = spawn(
            [sys.executable, "-P", "-m", __name__, str(place.path)], dies_by=signal.SIGKILL,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        follow(self._process, "figures")

    def stop(self) -> None:
        """End what is under way; it is sent again another time."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()


def main() -> None:
    """Send one run's figures."""
    folder = Path(sys.argv[1])
    sent = send_kept(folder, lambda line: print(line, flush=True))
    print(f"{folder.name}: {'all figures are sent' if sent else 'figures are still kept'}", flush=True)


if __name__ == "__main__":
    main()
