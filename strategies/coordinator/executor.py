"""Executes runs: takes them from the SuperLink, one process for each, and goes on with those that a crash cut off."""

import contextlib
import queue
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from fedmed.errors import FedmedError, internal
from fedmed.flower.line import LinkDown, LinkError
from strategies.coordinator.folder import CoordinatorFolder
from strategies.coordinator.job import WORKER, Attempts, Job, Outcome, TaskLike
from strategies.coordinator.logs import log
from strategies.coordinator.records import ENDED, OPEN, RunPlace, RunPlaces, place_of

# Flower takes a run for failed after a minute without a sign of life.
BEAT = 10.0
AGAIN = 1.0
# How long the SuperLink may take to hear how runs ended, when the coordinator ends.
LAST_WORDS = 5.0


class Source(Protocol):
    """The part of `fedmed.flower.tasks.Tasks` that is needed here."""

    def acquire(self) -> TaskLike | None:
        """The next run, waited for a little."""
        ...

    def close(self) -> None:
        """Hang up."""
        ...


class Runs(Protocol):
    """The part of `fedmed.flower.control.Control` that is needed here."""

    def start_run(self, overrides: Sequence[str]) -> int:
        """Start a run."""
        ...

    def stop_run(self, run: int) -> None:
        """Stop one for good."""
        ...

    def runs(self) -> list[Any]:
        """All of them."""
        ...


class Executor:
    """Turns tasks into processes, and their ends into records.

    Args:
        tasks: makes a connection to the SuperLink for tasks; called again after that one failed.
        control: the same for the operator's side.
    """

    def __init__(
        self,
        folder: CoordinatorFolder,
        *,
        tasks: Callable[[], Source],
        control: Callable[[], Runs],
        insecure: bool,
        command: Sequence[str] = WORKER,
        beat: float = BEAT,
    ) -> None:
        self._folder, self._places = folder, RunPlaces(folder.runs)
        self._tasks, self._control = tasks, control
        self._insecure, self._command, self._beat = insecure, command, beat
        self._taken: queue.SimpleQueue[tuple[TaskLike, str]] = queue.SimpleQueue()
        self.jobs: dict[str, Job] = {}
        self._ending = threading.Event()
        self._attempts: dict[str, Attempts] = defaultdict(Attempts)
        # Calls to the SuperLink under way: one that is away must not hold up the main thread.
        self._calls: list[threading.Thread] = []

    def start(self) -> None:
        """Begin to take runs."""
        for work in (self._acquire, self._heartbeats):
            threading.Thread(target=work, name=work.__name__, daemon=True).start()

    def recover(self) -> list[str]:
        """Go on with the runs that were under way when the coordinator ended; their names.

        Those that a person stopped stay where they are.

        Raises:
            LinkError: the SuperLink does not answer.
        """
        control = self._control()
        waiting: set[str] = set()
        for run in control.runs():
            place = place_of(run.overrides, self._folder.runs)
            if place is not None and run.status == "pending" and not place.stop_wanted:
                waiting.add(place.name)
            elif run.status != "finished":
                # Its process is gone, or nobody wants it: what it held at the SuperLink goes.
                with contextlib.suppress(LinkError):
                    control.stop_run(run.run)
        going = []
        for place in self._places.all():
            state = place.read().state
            if state in OPEN and place.stop_wanted:
                place.change(state="stopped", detail="stopped by a person")
            elif state in OPEN:
                going.append(place.name)
                place.change(state="pending")
                if place.name not in waiting:
                    control.start_run(place.settings())
        return going

    def tick(self) -> None:
        """Do what is due. In the main thread."""
        with contextlib.suppress(queue.Empty):
            while True:
                self._begin(*self._taken.get_nowait())
        for name, job in list(self.jobs.items()):
            outcome = job.tick()
            if job.lost or (outcome is not None and outcome.state == "lost"):
                del self.jobs[name]
                self._lost(job)
            elif outcome is not None:
                del self.jobs[name]
                self._end(job, outcome)

    def close(self) -> None:
        """End the runs' processes; the runs go on with the next start."""
        self._ending.set()
        while any(not job.over for job in self.jobs.values()):
            for job in self.jobs.values():
                job.interrupt()
            time.sleep(0.05)
        for job in self.jobs.values():
            outcome = job.tick()
            # One of them may have come to its end just now.
            if outcome is not None and outcome.state in ("finished", "stopped"):
                self._end(job, outcome)
        end = time.monotonic() + LAST_WORDS
        for thread in self._calls:
            thread.join(max(0.0, end - time.monotonic()))

    def _begin(self, task: TaskLike, overrides: str) -> None:
        place = place_of(overrides, self._folder.runs)
        if place is None:
            self._finish(task, ok=False, details="not launched by: fedmed run federation=consortium")
            return
        state = place.read().state
        if place.name in self.jobs or state in ENDED:
            self._finish(
                task, ok=False, details=f"the run is {'under way' if place.name in self.jobs else state}"
            )
            return
        place.change(state="running", detail="", flower_run=task.run)
        self.jobs[place.name] = Job(
            place, task, self._folder.path, insecure=self._insecure, command=self._command,
            attempts=self._attempts[place.name],
        )  # fmt: skip

    def _end(self, job: Job, outcome: Outcome) -> None:
        job.place.change(state=outcome.state, detail=outcome.detail)
        log.info("run '%s' %s %s", job.place.name, outcome.state, outcome.detail)
        if outcome.state == "stopped":
            self._later(lambda: self._control().stop_run(job.task.run))
        else:
            self._finish(job.task, ok=outcome.state == "finished", details=outcome.detail or outcome.state)

    def _lost(self, job: Job) -> None:
        """The SuperLink took a run for ended that was not: it was away too long. It is started there again."""
        job.kill()
        place = job.place
        log.error("run '%s': the SuperLink took it for ended; it goes on as a new one there", place.name)
        place.change(state="pending", flower_run=None)
        self._later(lambda: self._again(place))

    def _again(self, place: RunPlace) -> None:
        while not self._ending.is_set():
            try:
                self._control().start_run(place.settings())
                return
            except LinkError:
                self._ending.wait(AGAIN)

    def _finish(self, task: TaskLike, *, ok: bool, details: str) -> None:
        self._later(lambda: task.finish(ok=ok, details=details[:500]))

    def _later(self, call: Callable[[], Any]) -> None:
        def quietly() -> None:
            try:
                call()
            except LinkError as error:
                log.warning("the SuperLink was not told: %s", error)

        thread = threading.Thread(target=quietly, daemon=True)
        thread.start()
        self._calls = [*(other for other in self._calls if other.is_alive()), thread]

    def _acquire(self) -> None:
        source: Source | None = None
        while not self._ending.is_set():
            if len(self.jobs) + self._taken.qsize() >= self._folder.config.runs_at_once:
                self._ending.wait(AGAIN)
                continue
            try:
                source = source or self._tasks()
                task = source.acquire()
                if task is not None:
                    self._taken.put((task, task.begin()))
            # Whatever it is: without this thread no run would ever begin again.
            except Exception as error:
                if not isinstance(error, LinkDown):
                    log.error("runs cannot be taken: %s", _words(error))
                # Made anew, with the certificates of that time.
                if source is not None:
                    source.close()
                source = None
                self._ending.wait(AGAIN)

    def _heartbeats(self) -> None:
        while not self._ending.wait(self._beat):
            for job in list(self.jobs.values()):
                try:
                    alive = job.task.heartbeat()
                except LinkDown:
                    # Whether the run is lost is known once the SuperLink is back.
                    continue
                except LinkError:
                    alive = False
                # Nor would any other run get a sign of life.
                except Exception as error:
                    log.error("run '%s': no sign of life could be given: %s", job.place.name, _words(error))
                    continue
                job.lost = job.lost or not alive


def _words(error: Exception) -> str:
    return str(error) if isinstance(error, FedmedError) else internal(error)
