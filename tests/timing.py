"""Time in tests: none may fail because the machine is busy."""

import resource
import time
from collections.abc import Callable

# Time-outs within which somebody has to answer. Where that is not enough, the machine is busy: the next one is tried.
PATIENCE = (0.3, 3.0, 30.0)


def best(do: Callable[[], object], *, enough: float, tries: int = 5) -> float:
    """The fewest CPU seconds of several tries; the first that takes at most `enough` is the last.

    Of this process and of the processes that it started and that have ended. CPU seconds, since waiting for others is
    not the code's doing; the fewest, since others also empty the caches.
    """
    seconds: list[float] = []
    while len(seconds) < tries and min(seconds, default=enough + 1) > enough:
        began = _spent()
        do()
        seconds.append(_spent() - began)
    return min(seconds)


def _spent() -> float:
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime
