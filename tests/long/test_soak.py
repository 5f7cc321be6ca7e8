"""Hundreds of rounds while sites are killed at random: no lost run, flat memory, ledgers that agree with receipts."""

import csv
import math
import random
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from experiments.shared.consortium import COORDINATOR, Consortium
from tests.conftest import count
from tests.consortium.runs import agree, children, in_a_fork, rounds_sent
from tests.evidence import figure

HEART = Path(__file__).parents[2] / "fedmed" / "data" / "heart_disease.csv"
SITES, ROUNDS = count(3, 8), count(25, 300)
KILL_EVERY = 10
# From here on memory is flat.
WARM = count(15, 50)


@pytest.fixture
def consortium(tmp_path: Path) -> Iterator[Consortium]:
    """Sites that share one hospital's table, each with every n-th patient."""
    names = tuple(f"site {number}" for number in range(SITES))
    with HEART.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["dataset"] in ("Cleveland", "Hungary")]
    for number, row in enumerate(rows):
        row["dataset"] = names[number % SITES]
    with (tmp_path / "table.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    made = Consortium(tmp_path / "c", names, budget=60, policy={"epsilon_total": "60.0"}, command=in_a_fork)
    made.make()
    made.start(timeout=300)
    yield made
    made.end()


def memory(consortium: Consortium) -> dict[str, float]:
    """Megabytes of the processes that live as long as the run."""
    module = {"superlink": "fedmed.flower.superlink", "run": "strategies.coordinator.worker"}
    found = {COORDINATOR: psutil.Process(consortium.processes[COORDINATOR].pid).memory_info().rss / 1e6}
    for name, what in module.items():
        for process in children(consortium, what):
            found[name] = process.memory_info().rss / 1e6
    return found


@pytest.mark.timeout(3600)
def test_rounds_while_sites_die(consortium: Consortium) -> None:
    rng = random.Random(0)
    each = math.ceil(303 / SITES) * 2
    sizes = ", ".join(f"{name}: {each}" for name in consortium.names)
    consortium.launch(
        "model=logistic", "task=heart", f"task.declared_sizes={{{sizes}}}", "task.split=hash", "privacy.epsilon=null",
        f"task.path={consortium.folder.parent / 'table.csv'}", "privacy.noise_multiplier=60", "privacy.delta=1e-5",
        "privacy.metrics=none", "privacy.min_declared_size=20", "tracking=none", "federation.timeout=20",
        "federation.quorum=0.5", f"rounds={ROUNDS}", name="soak",
    )  # fmt: skip
    began, killed, seen = time.monotonic(), 0, {}
    warm: dict[str, float] = {}
    for number in range(1, ROUNDS + 1):
        consortium.wait(lambda number=number: rounds_sent(consortium, "soak") >= number, timeout=300)
        if number == WARM:
            warm = memory(consortium)
        if number >= WARM and number % 5 == 0:
            seen = memory(consortium) or seen
        if number % KILL_EVERY == 0 and number < ROUNDS:
            name = rng.choice(consortium.names)
            consortium.kill(name)
            consortium.start(name, wait=False)
            killed += 1
    history = agree(consortium, "soak")
    assert len(history) == ROUNDS
    figure(
        f"seconds for {ROUNDS} rounds of {SITES} sites, {killed} killed", f"{time.monotonic() - began:.0f}"
    )
    for name, megabytes in warm.items():
        grown = seen[name] / megabytes - 1
        figure(
            f"memory of the {name} after round {WARM}, MB, and its growth", f"{megabytes:.0f}, {grown:+.1%}"
        )
        assert grown <= 0.05, (name, warm, seen)
