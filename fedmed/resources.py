"""The memory of this process and its children."""

import resource
import sys
import threading
import time
from pathlib import Path
from types import TracebackType

import psutil


def peak_resident() -> int:
    """The most bytes that were resident at once in the life of this process."""
    status = Path("/proc/self/status")
    if status.exists():
        # Of this program: the other figure is at least that of the process which started it.
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return 1024 * int(line.split()[1])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


class PeakMemory:
    """Samples the memory of the process tree while it is entered; `megabytes` is the largest seen.

    Proportional set size where the system gives it: pages that forked workers share count once.
    """

    def __init__(self, interval: float = 0.25) -> None:
        self.megabytes = 0.0
        self._interval = interval
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "PeakMemory":
        self._sample()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        self._sample()

    def _watch(self) -> None:
        wait = self._interval
        while not self._stop.wait(wait):
            began = time.thread_time()
            self._sample()
            # The system walks every page: of large processes, no more than a fiftieth of a core goes into it.
            wait = max(self._interval, 50 * (time.thread_time() - began))

    def _sample(self) -> None:
        root = psutil.Process()
        total = 0
        for process in [root, *root.children(recursive=True)]:
            try:
                memory = process.memory_full_info()
                total += getattr(memory, "pss", memory.rss)
            except psutil.Error:
                # It ended between the listing and the reading.
                continue
        self.megabytes = max(self.megabytes, total / 2**20)
