"""A run of a consortium of real processes, each of which is killed once. By themselves: tests/long/test_faults.py."""

from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from experiments.shared.consortium import COORDINATOR, Consortium
from tests.consortium.runs import NAMES, agree, began, children, in_a_fork, rounds_sent


@pytest.fixture
def consortium(tmp_path: Path) -> Iterator[Consortium]:
    made = Consortium(tmp_path / "c", NAMES, command=in_a_fork)
    made.make()
    made.start()
    yield made
    made.end()


@pytest.mark.timeout(600)
def test_a_run_survives_the_death_of_each_of_its_processes(consortium: Consortium) -> None:
    def goes_on() -> None:
        sent = rounds_sent(consortium, "one")
        consortium.wait(lambda: rounds_sent(consortium, "one") > sent + 1, timeout=180)

    began(consortium, name="one", rounds=16, until=2)
    consortium.kill("Hungary")
    consortium.start("Hungary")
    goes_on()
    (worker,) = children(consortium, "strategies.coordinator.worker")
    worker.kill()
    goes_on()
    (superlink,) = children(consortium, "fedmed.flower.superlink")
    superlink.kill()
    goes_on()
    every = psutil.Process(consortium.processes[COORDINATOR].pid).children(recursive=True)
    consortium.kill(COORDINATOR)
    _, alive = psutil.wait_procs(every, timeout=30)
    assert not alive
    consortium.start(COORDINATOR)
    history = agree(consortium, "one")
    assert len(history) == 16
    assert set(history[-1]["sites"]) == set(NAMES)
