"""Aggregating as replies arrive: at most three payloads are in memory, however many sites there are."""

import ctypes
import os
import subprocess
import sys
import traceback
import tracemalloc
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, Message, RecordDict

from fedmed.config import RunConfig
from fedmed.flower.in_process import InProcessGrid
from fedmed.flower.tasks import Task
from fedmed.privacy.plan import make_plan
from fedmed.records import Instruction, Receipt, read_instruction, update_record
from fedmed.training import one_thread
from strategies.base import Arrays
from strategies.consortium import Consortium
from strategies.folder import Progress, RunFolder
from strategies.forecast import coordinator_payloads
from strategies.replies import norm
from strategies.rounds import Loop
from strategies.sites import Sites
from tests.conftest import count
from tests.evidence import FULL, figure
from tests.fedmed.flower.network import Network, beating, new_key, pem_of, write_key
from tests.strategies.apps import client_app, run_config

# As many sites, and bytes of each of their updates, as a full run has; a quick one shows the same with less.
SITES = count(5, 8)
PAYLOAD = count(24, 125) * 10**6
# What the system counts besides: blocks of a few MB, code that is loaded late, what the allocator keeps.
ROOM = 10 * 10**6
NAMES = tuple(f"s{index}" for index in range(SITES))
# Half of it is one array, as an embedding table may be.
SHAPES = {"table": (PAYLOAD // 16, 2), **{f"w{index}": (PAYLOAD // 32,) for index in range(4)}}


def draw(seed: int) -> Arrays:
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal(shape, np.float32) for name, shape in SHAPES.items()}


class Waiting(InProcessGrid):
    """Replies that lie on disk and are read when they are taken, as they would come from a network."""

    def __init__(self, folder: Path) -> None:
        super().__init__(client_app(), nodes=SITES)
        self.folder = folder

    def gather(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterator[Message]:
        del timeout
        for index, message in enumerate(messages):
            message.metadata.__dict__["_message_id"] = str(index)
            instruction, _ = read_instruction(message.content)
            size = instruction.task.declared_train(NAMES[index])
            receipt = Receipt(site=NAMES[index], round=instruction.round, declared_size=size, noise_draws=0)
            yield Message(self._content(receipt, index), reply_to=message)

    def _content(self, receipt: Receipt, index: int) -> RecordDict:
        content = update_record(receipt, {})
        content["arrays"] = ArrayRecord(
            OrderedDict(
                (
                    name,
                    Array("float32", shape, "numpy.ndarray", (self.folder / f"{index}-{name}").read_bytes()),
                )
                for name, shape in SHAPES.items()
            )
        )
        return content


@pytest.fixture(scope="module")
def replies(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("replies")
    for index in range(SITES):
        for name, values in draw(index).items():
            (folder / f"{index}-{name}").write_bytes(Array(values).data)
    return folder


def in_child(work: Callable[[], int]) -> int:
    """A number that a process of its own finds out."""
    reading, writing = os.pipe()
    pid = os.fork()
    if not pid:
        code = 1
        try:
            os.write(writing, str(work()).encode())
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    os.close(writing)
    with os.fdopen(reading) as file:
        found = file.read()
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    return int(found)


def one_round(config: RunConfig, replies: Path, folder: Path) -> None:
    """A round from its message to its checkpoint."""
    plans = {site: make_plan(config, site) for site in NAMES}
    sites = Sites(Waiting(replies), 60)
    sites.nodes = {name: index + 2 for index, name in enumerate(NAMES)}
    loop = Loop(config, sites, plans, "test", spool=folder / "replies", score_rounds=False)
    loop.finished = RunFolder(folder).save
    progress = loop.run(Progress(round=0, arrays=draw(99)), until=1)
    assert progress.history[0]["sites"] == list(NAMES)


@pytest.mark.parametrize(
    ("settings", "payloads"),
    [((), 3), (("strategy.norm_bound=1e9",), 3), (("strategy=fedavgm",), 6), (("strategy=fedadam",), 9)],
)
def test_at_most_three_payloads_and_what_the_strategy_keeps(
    settings: tuple[str, ...], payloads: int, replies: Path, tmp_path: Path
) -> None:
    """Counted by tracemalloc, NumPy's arrays included; the momenta of a strategy come on top."""
    config = run_config("rounds=1", *settings, names=NAMES)
    folder = tmp_path

    def work() -> int:
        tracemalloc.start()
        one_round(config, replies, folder)
        return tracemalloc.get_traced_memory()[1]

    peak = in_child(work)
    figure(f"payloads of {PAYLOAD / 1e6:g} MB at most in memory, {SITES} sites, {config.strategy.kind}",
           f"{peak / PAYLOAD:.2f}")  # fmt: skip
    # More than that there is none: the count saw the arrays.
    assert 2 * PAYLOAD < peak <= payloads * PAYLOAD
    # And it is what `fedmed plan` says, or a little less.
    said = coordinator_payloads(config.strategy, draw(0), sites=SITES)
    assert 0.7 * said <= peak / PAYLOAD <= said


def test_so_says_the_system(replies: Path, tmp_path: Path) -> None:
    """The same of the process's resident memory, pages of mapped files among it."""
    config = run_config("rounds=1", names=NAMES)

    def work() -> int:
        # What it has had before it was forked, and what modules cost that are loaded late, is not what is asked.
        small = run_config("rounds=1", names=NAMES[:2])
        del small
        if FULL:
            # What tests before this one have freed would be used again, and not be seen.
            ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        before = status("VmRSS")
        one_round(config, replies, tmp_path)
        return status("VmHWM") - before

    peak = in_child(work)
    figure(f"payloads of {PAYLOAD / 1e6:g} MB at most resident, {SITES} sites", f"{peak / PAYLOAD:.2f}")
    # Small ones fit into what was freed before.
    assert (1.5 * PAYLOAD if FULL else 0) < peak <= 3 * PAYLOAD + ROOM


def status(name: str) -> int:
    """A figure of this process's memory in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(name)).split()[1])


def test_the_norm_of_a_large_update_is_that_of_its_numbers() -> None:
    values = draw(1)
    flat = np.concatenate([array.reshape(-1) for array in values.values()]).astype(np.float64)
    assert norm(values) == pytest.approx(float(np.linalg.norm(flat)), rel=1e-12)


def test_a_strategy_that_needs_all_updates_is_sized_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """None does yet: one that says so would hold every reply."""
    strategy = run_config().strategy
    one = coordinator_payloads(strategy, draw(0), sites=8)
    assert one == 3
    monkeypatch.setattr("strategies.fedavg.FedAvg.weighted_sum", False)
    assert coordinator_payloads(strategy, draw(0), sites=8) == 2 + 8


@pytest.mark.timeout(1200)
def test_so_it_is_over_a_real_network(tmp_path: Path) -> None:
    """Replies that a SuperLink hands over in pieces, as sites in another process send them."""
    network = Network(tmp_path)
    network.start()
    for name in NAMES:
        key = new_key()
        network.control().register(name, pem_of(key))
        write_key(tmp_path / f"{name}.key", key)
    line = [sys.executable, "-m", "tests.strategies.large_sites", network.address, str(tmp_path), *NAMES]
    sites = subprocess.Popen(
        line, cwd=Path(__file__).parents[2], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert sites.stdout is not None
        assert {sites.stdout.readline().strip() for _ in NAMES} == set(NAMES)
        task = network.task()
        task.begin()
        config = run_config("rounds=1", "federation=consortium", "federation.timeout=600", names=NAMES)
        with beating(task):
            peak = in_child(lambda: over_network(config, network, task, tmp_path / "replies"))
    finally:
        sites.kill()
        sites.communicate()
        network.end()
    figure(
        f"payloads of {PAYLOAD / 1e6:g} MB at most resident, {SITES} sites over a SuperLink",
        f"{peak / PAYLOAD:.2f}",
    )
    # Small ones fit into what was freed before.
    assert (1.5 * PAYLOAD if FULL else 0) < peak <= 3 * PAYLOAD + ROOM


def over_network(config: RunConfig, network: Network, task: Task, spool: Path) -> int:
    """The resident memory that a round takes; what connecting and quotes take is not counted."""
    # As `strategies.run` begins.
    one_thread(trains=False)
    plans = {site: make_plan(config, site) for site in NAMES}
    grid = network.grid(task)
    sites = Sites(grid, 600)
    launch = Instruction.of(config, plans, run_id="test", round=0)
    members = Consortium(sites, launch, 1, 600, 0, objection=lambda *_: None, say=lambda _: None)
    members.start()
    loop = Loop(config, sites, plans, "test", members=members, spool=spool, score_rounds=False)
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    progress = loop.run(Progress(round=0, arrays=draw(99)), until=1)
    assert progress.history[0]["sites"] == list(NAMES)
    assert "s0" in members.ready
    return status("VmHWM") - before
