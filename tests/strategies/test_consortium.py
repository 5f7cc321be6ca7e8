"""Sites that come and go: each round takes who is there and has agreed, and waits for nobody else."""

import multiprocessing
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from flwr.app import Message, RecordDict
from flwr.clientapp import ClientApp

import strategies.consortium
from fedmed.config import RunConfig
from fedmed.errors import ConfigError, RunError
from fedmed.flower.in_process import InProcessGrid
from fedmed.privacy.plan import make_plan
from fedmed.records import Arrays, Instruction, Quote, Receipt, head_record, update_record
from strategies.consortium import Consortium
from strategies.folder import Progress
from strategies.members import Spent
from strategies.rounds import Loop, quorum_of
from strategies.sites import Sites
from tests.strategies.apps import NAMES, client_app, mean_of, run_config, start

# What an honest site of these tests sends is large; such learning rates allow it.
PRIVATE = ("privacy=dp", "privacy.metrics=none", "task.patient_column=p", "training.learning_rate=100")


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(strategies.consortium, "LOOK_EVERY", 0.01)
    monkeypatch.setattr(strategies.consortium, "ASK_EVERY", 0.0)


class Town(InProcessGrid):
    """Nodes by the names that they were admitted with; those in `offline` hear nothing."""

    offline: set[str]
    names: tuple[str, ...] = NAMES

    def __init__(self, app: ClientApp, *, workers: int = 1, offline: Iterable[str] = ()) -> None:
        super().__init__(app, nodes=len(self.names), workers=workers)
        self.offline = set(offline)
        self.nodes = dict(zip(self.names, self._contexts, strict=True))

    def sites(self) -> dict[str, int]:
        return {name: node for name, node in self.nodes.items() if name not in self.offline}

    def back(self, name: str) -> None:
        """It is online again, as another node than before."""
        node = max(self._contexts) + 1
        self._contexts[node] = self._contexts.pop(self.nodes[name])
        self.nodes[name] = node
        self.offline.discard(name)

    def gather(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterator[Message]:
        there = set(self.sites().values())
        return super().gather([m for m in messages if m.metadata.dst_node_id in there], timeout=timeout)


class Run:
    """A loop over a `Town`, with what it said."""

    def __init__(self, grid: Town, *overrides: str, objection: Callable[..., Any] = lambda *_: None) -> None:
        settings = ["federation=consortium", "federation.timeout=0.2", "federation.approval_timeout=0.2"]
        self.config: RunConfig = run_config(*settings, *overrides)
        self.grid, self.said, self.warned = grid, [], []  # type: ignore[var-annotated]
        plans = {site: make_plan(self.config, site) for site in self.config.task.declared_sizes}
        launch = Instruction.of(self.config, plans, run_id="test", round=0)
        self.sites = Sites(grid, self.config.federation.timeout)
        self.consortium = Consortium(
            self.sites, launch, quorum_of(self.config, plans), self.config.federation.timeout,
            self.config.federation.approval_timeout, objection=objection, say=self.said.append,
        )  # fmt: skip
        self.loop = Loop(
            self.config, self.sites, plans, "test", members=self.consortium, warn=self.warned.append
        )
        self.loop.score_rounds = self.config.privacy.kind == "dp"

    def begin(self) -> float:
        """Wait for the sites; how long that took."""
        began = time.monotonic()
        self.consortium.start()
        return time.monotonic() - began

    def rounds(self, before: dict[int, Callable[[], None]] | None = None) -> Progress:
        """Do the rounds; something may happen as one is sent."""
        self.loop.sent = lambda number, _sites: (before or {}).get(number, lambda: None)()
        progress = self.loop.run(Progress(round=0, arrays=start()), until=self.config.rounds)
        self.grid.close()
        return progress

    def answered(self, progress: Progress) -> list[str]:
        """Who took part in each round, as one word each."""
        return ["".join(entry["sites"]) for entry in progress.history]


def test_with_everyone_ready_it_starts_at_once_and_is_as_on_one_machine() -> None:
    run = Run(Town(client_app()))
    assert run.begin() < 0.15
    assert run.said == [f"site '{name}' joins" for name in NAMES]
    progress = run.rounds()
    assert run.answered(progress) == ["ABCD"] * 3
    assert not run.warned
    np.testing.assert_array_equal(
        progress.arrays["w"], sum(mean_of(n, 10 + n, 20 + n, 30 + n)["w"] for n in (1, 2, 3))
    )


def test_an_offline_site_holds_up_the_others_for_the_time_out_and_joins_later() -> None:
    grid = Town(client_app(), offline="C")
    run = Run(grid)
    assert 0.2 <= run.begin() < 1
    assert run.said[-1] == "site 'C' is offline; it can join later"
    progress = run.rounds({1: lambda: grid.back("C")})
    # Asked beside round 2, there in round 3.
    assert run.answered(progress) == ["ABD", "ABD", "ABCD"]
    assert [entry["dropped"] for entry in progress.history] == [
        {"C": "offline"},
        {"C": "has not agreed yet"},
        {},
    ]
    assert run.said[-1] == "site 'C' joins the next round"
    assert len(run.said) == 5
    assert not run.warned


def test_a_site_that_waits_for_a_person_is_said_once_and_joins_once_one_approved() -> None:
    approved = False

    def quote(honest: Quote) -> Quote:
        return honest if approved else replace(honest, waiting="a person has to approve run test")

    def approve() -> None:
        nonlocal approved
        approved = True

    run = Run(Town(client_app(quotes={"B": quote})), "rounds=4")
    assert 0.2 <= run.begin() < 1
    progress = run.rounds({2: approve})
    assert run.answered(progress) == ["ACD", "ACD", "ABCD", "ABCD"]
    lines = [line for line in run.said if "'B'" in line]
    assert lines == [
        "site 'B': a person has to approve run test: fedmed site approve DIR test",
        "site 'B' joins the next round",
    ]
    assert progress.history[0]["dropped"] == {"B": "waits: a person has to approve run test"}


def test_a_refusing_site_is_left_out_with_its_reason_and_nobody_waits_for_it() -> None:
    run = Run(
        Town(client_app(quotes={"D": lambda q: replace(q, refusal="budget: asked 3, allowed at most 1")})),
        "federation.timeout=30",
    )
    assert run.begin() < 5
    assert "site 'D' refuses the run: budget: asked 3, allowed at most 1; it is left out" in run.said
    assert run.answered(run.rounds()) == ["ABC"] * 3
    assert sum("refuses" in line for line in run.said) == 1


def test_a_site_that_was_paused_joins_once_it_is_not() -> None:
    paused = True

    def go_on() -> None:
        nonlocal paused
        paused = False

    run = Run(Town(client_app(quotes={"A": lambda q: replace(q, refusal="paused" if paused else None)})))
    run.begin()
    assert run.answered(run.rounds({1: go_on})) == ["BCD", "ABCD", "ABCD"]
    assert run.said[-1] == "site 'A' joins the next round"


def test_so_many_refusals_that_there_is_no_quorum_end_the_run_at_once() -> None:
    refuse = {name: lambda q: replace(q, refusal="model: not allowed here") for name in "ABC"}
    run = Run(Town(client_app(quotes=refuse)), "federation.timeout=30")
    with pytest.raises(ConfigError, match="'A': refuses: model: not allowed here; 'B': ") as ended:
        run.begin()
    assert str(ended.value).startswith("1 of 4 sites are ready, the quorum is 2")


def test_too_few_in_time_are_an_error_that_names_the_others() -> None:
    run = Run(Town(client_app(), offline="BCD"))
    with pytest.raises(RunError, match=r"1 of 4 sites are ready, the quorum is 2 after 0.2 s: 'B': offline"):
        run.begin()


def test_people_are_waited_for_as_long_as_was_said() -> None:
    """Below the quorum: the time-out of approvals, not the one of sites."""
    quotes = {name: lambda q: replace(q, waiting="a person has to approve") for name in "BCD"}
    run = Run(Town(client_app(quotes=quotes)), "federation.approval_timeout=0.6")
    began = time.monotonic()
    with pytest.raises(RunError, match=r"after 0\.6 s: 'B': waits: a person has to approve; 'C': waits"):
        run.begin()
    assert time.monotonic() - began >= 0.6


def test_a_site_under_another_name_than_it_was_admitted_with_is_left_out() -> None:
    """Nor does it take the place of the one whose name it gives."""
    run = Run(Town(client_app(names={"D": "A"})))
    run.begin()
    assert (
        "site 'D' refuses the run: it answers under another name than it was admitted with; it is left out"
        in (run.said)
    )
    assert run.answered(run.rounds()) == ["ABC"] * 3


def test_a_quote_that_the_run_objects_to_leaves_its_site_out() -> None:
    def objection(site: str, _quote: Quote) -> str | None:
        return "declares 7 patients, the run another number" if site == "B" else None

    run = Run(Town(client_app()), objection=objection)
    run.begin()
    assert "site 'B' refuses the run: declares 7 patients, the run another number; it is left out" in run.said
    assert run.answered(run.rounds()) == ["ACD"] * 3


def test_a_site_that_goes_and_comes_back_as_another_node_is_said_once_each() -> None:
    grid = Town(client_app())
    run = Run(grid, "rounds=6")
    run.begin()
    del run.said[:]
    progress = run.rounds({1: lambda: grid.offline.add("B"), 4: lambda: grid.back("B")})
    # It goes as round 1 is sent, and comes as round 4 is: the next one has it, without another quote.
    assert run.answered(progress) == ["ACD", "ACD", "ACD", "ACD", "ABCD", "ABCD"]
    assert run.said == ["site 'B' is offline", "site 'B' is back"]
    assert run.warned == ["round 1: 'B' is left out: no answer"]


def test_fewer_than_the_quorum_are_waited_for() -> None:
    """Three of four are away after round 1; two come back while it is waited for them."""
    grid = Town(client_app())
    run = Run(grid, "federation.timeout=10")
    run.begin()
    sites, looks = grid.sites, 0

    def finished(progress: Progress) -> None:
        if progress.round == 1:
            grid.offline |= {"A", "B", "C"}
            grid.sites = looked  # type: ignore[method-assign]

    def looked() -> dict[str, int]:
        nonlocal looks
        looks += 1
        if looks == 20:
            grid.back("A")
            grid.back("B")
        return sites()

    run.loop.finished = finished
    assert run.answered(run.rounds()) == ["ABCD", "ABD", "ABD"]
    assert looks > 20
    assert not run.warned


def test_a_round_that_falls_short_is_asked_again_of_those_who_did_not_answer() -> None:
    """Three of four vanish as it is sent, and two come back within the time-out; the reply that came is kept."""
    asked: list[str] = []

    def note(_: Instruction, good: Receipt, delta: Arrays) -> RecordDict:
        asked.append(good.site)
        return update_record(good, delta)

    grid = Town(client_app(dict.fromkeys(NAMES, note)))
    run = Run(grid, "rounds=1", "federation.timeout=5")
    run.begin()
    sent: list[list[str]] = []

    def go_and_come(_number: int, sites: Sequence[str]) -> None:
        sent.append(list(sites))
        if len(sent) == 1:
            grid.offline |= {"A", "B", "C"}
            threading.Timer(0.3, lambda: [grid.back(name) for name in "AB"]).start()

    run.rounds()
    run.loop.sent = go_and_come
    progress = run.loop.run(Progress(round=0, arrays=start()), until=1)
    assert sent == [["A", "B", "C", "D"], ["A", "B"]]
    assert asked[4:] == ["D", "A", "B"]
    assert run.answered(progress) == ["ABD"]
    assert progress.history[0]["dropped"] == {"C": "no answer"}


def test_a_run_without_its_quorum_for_too_long_ends_and_says_who_is_missing() -> None:
    grid = Town(client_app())
    run = Run(grid)
    run.begin()
    finished: list[int] = []
    run.loop.finished = lambda progress: (
        finished.append(progress.round),
        grid.offline.update("BCD") if progress.round == 2 else None,
    )  # type: ignore[assignment,func-returns-value]
    with pytest.raises(RunError) as ended:
        run.rounds()
    assert finished == [1, 2]
    assert str(ended.value) == (
        "round 3: 1 of 4 sites are ready, the quorum is 2 after 0.2 s: 'B': offline; 'C': offline; 'D': offline; "
        "resume the run once they are back"
    )


def test_a_slow_quote_does_not_hold_up_a_round() -> None:
    """A site that thinks about the run for ever; the others' rounds are as quick as without it."""
    hang = multiprocessing.Event()

    def slow(honest: Quote) -> Quote:
        hang.wait()
        return honest

    run = Run(Town(client_app(quotes={"D": slow}), workers=4), "federation.timeout=2")
    assert 2 <= run.begin() < 6
    progress = run.rounds()
    assert run.answered(progress) == ["ABC"] * 3
    assert progress.seconds < 1.5
    assert progress.history[0]["dropped"] == {"D": "has not agreed yet"}


def test_who_joins_late_has_spent_less_and_no_figure_says_less_than_was_spent() -> None:
    grid = Town(client_app(), offline="C")
    run = Run(grid, *PRIVATE, "rounds=4")
    run.begin()
    progress = run.rounds({1: lambda: grid.back("C"), 4: lambda: grid.offline.add("D")})
    assert run.answered(progress) == ["ABD", "ABD", "ABCD", "ABC"]
    plan = run.loop.plans["A"]
    last = progress.history[-1]
    # What was sent to D and not answered may have been spent.
    assert last["spent"] == {"A": 4, "B": 4, "C": 2, "D": 4}
    assert last["epsilon"] == {site: plan.epsilon(rounds=n) for site, n in last["spent"].items()}


def test_a_site_s_word_for_what_it_spent_counts_as_far_as_it_can_be_true(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Whose updates were used has spent them; and nobody spends more than was promised."""

    def says(rounds: int) -> Callable[[Instruction, Receipt, Arrays], RecordDict]:
        def reply(_: Instruction, good: Receipt, delta: Arrays) -> RecordDict:
            record = update_record(good, delta)
            record["ledger"] = head_record("00" * 32, "", rounds)
            return record

        return reply

    run = Run(Town(client_app({"A": says(0), "B": says(10**9), "C": says(3)})), "rounds=3", *PRIVATE)
    plans = run.loop.plans
    run.loop.spent = Spent.by_ledgers({}, [], plans, {})
    run.begin()
    spent = [entry["spent"] for entry in run.rounds().history]
    assert [entry["A"] for entry in spent] == [1, 2, 3]
    assert [entry["B"] for entry in spent] == [plans["B"].rounds] * 3
    assert [entry["C"] for entry in spent] == [3, 3, 3]
    assert [entry["D"] for entry in spent] == [1, 2, 3]
    assert "'A' says that its ledger was charged for 0 rounds of this run; it has answered 2" in caplog.text


HUGE = 1e9


def far(_: Instruction, good: Receipt, delta: Arrays) -> RecordDict:
    return update_record(good, {name: np.full_like(values, HUGE) for name, values in delta.items()})


def test_an_absurd_norm_is_dropped_without_a_setting_where_the_plan_says_what_is_absurd() -> None:
    for settings, kept in ((PRIVATE, False), ((*PRIVATE, "strategy.norm_bound=1e12"), True), ((), True)):
        run = Run(Town(client_app({"D": far})), "rounds=1", *settings)
        run.begin()
        progress = run.rounds()
        assert ("D" in progress.history[0]["sites"]) is kept, settings
        assert np.abs(progress.arrays["w"]).max() < 100 or kept
        if not kept:
            assert "norm 2.83e+09 above " in run.warned[0]
