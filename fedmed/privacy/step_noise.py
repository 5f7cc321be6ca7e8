"""The noise of one step after the other, where the step needs it."""

import os
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from fedmed.devices import sent
from fedmed.privacy.grid import Grid
from fedmed.privacy.randomness import RandomSource

# Values that a thread draws before it takes the next ones.
TASK = 2**18
MOST_THREADS = 16


class StepNoise:
    """Whole cells, drawn on the host (privacy.md, rule 8): on a processor when they are asked for.

    For an accelerator, threads draw a step's noise while it computes the step's gradients, so that it need not wait.
    Neither depends on the other, and each draw is given out once. Two steps' may be held, in 4 pinned bytes a value. A
    seeded source's bytes are sampling's too, and are read in turn everywhere.
    """

    def __init__(
        self, count: int, *, grid: Grid, source: RandomSource, device: torch.device, steps: int
    ) -> None:
        """
        Args:
            count: values of a step.
            steps: how many there will be: no more are drawn ahead.
        """
        self._count, self._grid, self._source, self._device = count, grid, source, device
        self._left = steps
        self._begun: tuple[Tensor, list[Future[None]]] | None = None
        self._threads: ThreadPoolExecutor | None = None
        if device.type != "cpu" and source.private:
            # One core is left to who keeps the accelerator busy.
            threads = max(1, min(MOST_THREADS, len(os.sched_getaffinity(0)) - 1))
            self._threads = ThreadPoolExecutor(threads, thread_name_prefix="noise")
            self._begun = self._begin(self._threads)

    def take(self) -> Tensor:
        """(count,) int64 or int32 on the device: the next step's."""
        if self._threads is None:
            drawn = torch.from_numpy(self._grid.noise(self._count, self._source))
            return sent(drawn, self._device)
        values, tasks = self._begun or self._begin(self._threads)
        self._begun = None
        for task in tasks:
            task.result()
        noise = values.to(self._device, non_blocking=True)
        if self._left > 0:
            self._begun = self._begin(self._threads)
        return noise

    def _begin(self, threads: ThreadPoolExecutor) -> tuple[Tensor, list[Future[None]]]:
        self._left -= 1
        # No value is larger than 2^25 (`fedmed.privacy.gaussian.LARGEST_CELLS`).
        values = torch.empty(self._count, dtype=torch.int32, pin_memory=True)
        cells = values.numpy()

        def draw(start: int) -> None:
            part = cells[start : start + TASK]
            np.copyto(part, self._grid.noise(len(part), self._source), casting="same_kind")

        return values, [threads.submit(draw, start) for start in range(0, self._count, TASK)]

    def close(self) -> None:
        """End the threads. What was drawn and not taken is forgotten."""
        if self._threads is not None:
            self._threads.shutdown(cancel_futures=True)
