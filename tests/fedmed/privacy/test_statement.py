"""What the officer reads is what the ledger holds: never less than was spent, and nothing left out."""

import json
import math
import time
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import dp_accounting
import pytest
from dp_accounting.rdp import RdpAccountant

from fedmed.privacy.account import Attempt
from fedmed.privacy.accounting import composed_epsilon
from fedmed.privacy.chain import Entry
from fedmed.privacy.events import from_json
from fedmed.privacy.ledger import Ledger, new_ledger
from fedmed.privacy.statement import statement
from tests.fedmed.privacy.test_ledger import Key, event

DELTA = 1e-5
WHAT = {"digest": "ab"}


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return empty(tmp_path / "ledger.db")


def empty(path: Path) -> Ledger:
    """A new ledger whose clock goes on by an hour with each look at it."""
    path.write_bytes(new_ledger(Key(), site="mercy"))
    now = [time.time()]

    def clock() -> float:
        now[0] += 3600
        return now[0]

    return Ledger(path, Key(), clock=clock)


def filled(ledger: Ledger) -> Ledger:
    """Two cohorts; runs that finished, stopped early, died, were refunded; releases under no guarantee."""
    for cohort, epsilon in (("chest", 6.0), ("heart", 3.0)):
        ledger.add_cohort(cohort, declared_size=500, by="ada")
        ledger.set_budget(cohort, epsilon=epsilon, delta=DELTA, by="ada", why="board of 3 May")
    ledger.request("early", what=WHAT)
    ledger.decide("early", approved=True, by="ada", why="vote 12", what=WHAT)
    rounds(ledger, "early", "chest", promised=10, answered=4)
    rounds(ledger, "early", "chest", promised=1, answered=1, purpose="metrics", noise=9.0)
    ledger.outside("early", what="exact metrics", released=b"1", approval="ada: vote 12")
    ledger.outside("early", what="exact metrics", released=b"2", approval="ada: vote 12")
    ledger.end("early")
    rounds(ledger, "refunds", "chest", promised=5, answered=3, noise=6.0)
    ledger.refund(reserved(ledger, "refunds", 4).nonce, by="ada", why="power cut")
    rounds(ledger, "dies", "heart", promised=3, answered=1, noise=7.0)
    reserved(ledger, "dies", 2)
    ledger.open_data(reserved(ledger, "dies", 3))
    ledger.set_budget("chest", epsilon=8.0, delta=None, by="bob", why="second study")
    ledger.request("waits", what=WHAT)
    ledger.request("refused", what=WHAT)
    ledger.decide("refused", approved=False, by="bob", why="no vote", what=WHAT)
    return ledger


def rounds(
    ledger: Ledger, run: str, cohort: str, *, promised: int, answered: int, purpose: str = "train",
    noise: float = 4.0,
) -> None:  # fmt: skip
    ledger.hold(run, cohort=cohort, purpose=purpose, event=event(noise=noise), rounds=promised)
    for number in range(1, answered + 1):
        attempt = reserved(ledger, run, number, purpose)
        ledger.open_data(attempt)
        ledger.commit(attempt, f"{run} {number}".encode())


def reserved(ledger: Ledger, run: str, number: int, purpose: str = "train") -> Attempt:
    attempt = ledger.reserve(run, purpose=purpose, round=number, request="digest")
    assert isinstance(attempt, Attempt)
    return attempt


def said(ledger: Ledger) -> dict[str, Any]:
    return statement(ledger.entries())


def recount(entries: list[Entry], cohort: str, *, states: tuple[str, ...]) -> Counter[str]:
    """Events of a cohort, one by one: its attempts whose last state is among these. No account, no tally."""
    bodies = [json.loads(entry.body) for entry in entries]
    charged: Counter[str] = Counter()
    for body in bodies:
        if body.get("state") != "reserved" or body["cohort"] != cohort:
            continue
        later = [other["state"] for other in bodies if other.get("of") == body["nonce"]]
        charged[body["event"]] += (["reserved", *later])[-1] in states
    return charged


def renyi(charged: Counter[str], order: int) -> float:
    """By dp-accounting alone, at the filter's order."""
    accountant = RdpAccountant(
        orders=[order], neighboring_relation=dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE
    )
    for text, times in charged.items():
        for _ in range(times):
            accountant.compose(from_json(text))
    return float(accountant.get_epsilon(0.99 * DELTA))


@pytest.mark.parametrize("cohort", ["chest", "heart"])
def test_sums_are_those_of_a_slow_recount(ledger: Ledger, cohort: str) -> None:
    found = said(filled(ledger))["cohorts"][cohort]
    entries = list(ledger.entries())
    spent = recount(entries, cohort, states=("reserved", "opened", "committed"))
    assert found["rounds_spent"] == spent.total() == {"chest": 8, "heart": 3}[cohort]
    order = found["budget"]["order"]
    alone = renyi(spent, order)
    assert alone <= found["spent"]["epsilon"] + 1e-9 < alone + 0.0101
    committed = recount(entries, cohort, states=("committed",))
    assert committed.total() == {"chest": 8, "heart": 1}[cohort]
    assert found["spent"]["epsilon"] >= renyi(committed, order)
    # The run 'refunds' may still draw two rounds.
    promised = {"chest": 2, "heart": 0}[cohort]
    assert found["rounds_promised"] == promised
    both = renyi(spent + Counter({event(noise=6.0): promised}), order)
    assert both <= found["spent_and_promised"]["epsilon"] + 1e-9 < both + 0.0101
    events = [
        dp_accounting.SelfComposedDpEvent(from_json(text), times) for text, times in sorted(spent.items())
    ]
    pld = composed_epsilon(events, delta=DELTA)
    assert pld <= found["spent"]["epsilon_pld"] + 1e-9 < pld + 0.0101
    assert found["spent"]["epsilon_pld"] < found["spent"]["epsilon"]
    assert 0 < found["left"] <= found["budget"]["epsilon"] - both


def test_runs_and_releases_are_counted_one_by_one(ledger: Ledger) -> None:
    found = said(filled(ledger))
    bodies = [json.loads(entry.body) for entry in ledger.entries()]
    keys = ("promised", "drawn", "committed", "returned", "refunded", "not_drawn", "plan_rounds")
    counts = {(use["run"], use["purpose"]): tuple(use[key] for key in keys) for use in found["runs"]}
    assert counts == {
        ("early", "train"): (10, 4, 4, 6, 0, 0, 10),
        ("early", "metrics"): (1, 1, 1, 0, 0, 0, 1),
        ("refunds", "train"): (5, 4, 3, 0, 1, 2, 5),
        ("dies", "train"): (3, 3, 1, 0, 0, 0, 3),
    }
    hashes = [release["sha256"] for group in found["released"] for release in group["releases"]]
    assert sorted(hashes) == sorted(b["released"] for b in bodies if b.get("state") == "committed")
    assert sum(group["count"] for group in found["released"]) == len(hashes) == 9
    (outside,) = found["outside"]
    assert outside["count"] == 2
    assert outside["approval"] == "ada: vote 12"
    assert [r["sha256"] for r in outside["releases"]] == [
        b["released"] for b in bodies if b["kind"] == "outside"
    ]
    assert {attempt["state"] for attempt in found["unfinished"]} == {"reserved", "opened"}
    assert found["entries"] == len(bodies)
    assert found["head"] == ledger.head()["hash"]


def test_people_and_their_reasons_are_named(ledger: Ledger) -> None:
    found = said(filled(ledger))
    assert [(c["epsilon"], c["by"], c["why"]) for c in found["cohorts"]["chest"]["changes"]] == [
        (6.0, "ada", "board of 3 May"), (8.0, "bob", "second study"),
    ]  # fmt: skip
    (refund,) = found["refunds"]
    assert (refund["run"], refund["round"], refund["by"], refund["why"]) == ("refunds", 4, "ada", "power cut")
    assert [(d["run"], d["approved"], d["by"]) for d in found["decisions"]] == [
        ("early", True, "ada"), ("refused", False, "bob"),
    ]  # fmt: skip
    states = {use["run"]: use["approval"]["state"] for use in found["runs"]}
    assert states == {"early": "approved", "refunds": "not needed", "dies": "not needed"}
    assert found["waiting"] == ["waits"]
    (step,) = found["next"]
    assert "site approve DIR waits" in step["command"]


def test_an_approval_of_something_else_is_none(ledger: Ledger) -> None:
    ledger.request("r", what=WHAT)
    ledger.decide("r", approved=True, by="ada", why="vote", what={"digest": "of another request"})
    assert said(ledger)["waiting"] == ["r"]


def test_the_curve_rises_to_what_is_spent(ledger: Ledger) -> None:
    found = said(filled(ledger))
    for cohort in found["cohorts"].values():
        series = cohort["series"]
        assert len(series) > 3
        assert series[0]["epsilon"] == 0
        assert series[-1]["epsilon"] == cohort["spent"]["epsilon"]
        assert series[-1]["budget"] == cohort["budget"]["epsilon"]
        assert [point["time"] for point in series] == sorted(point["time"] for point in series)
    # The refund is the one step down.
    falls = {
        name: sum(b["epsilon"] < a["epsilon"] for a, b in pairwise(cohort["series"]))
        for name, cohort in found["cohorts"].items()
    }
    assert falls == {"chest": 1, "heart": 0}


def test_every_epsilon_is_rounded_up_and_what_is_left_down(ledger: Ledger) -> None:
    ledger.add_cohort("chest", declared_size=500, by="ada")
    budget = ledger.set_budget("chest", epsilon=5.0, delta=DELTA, by="ada", why="w")
    for number in range(1, 4):
        rounds(ledger, f"run {number}", "chest", promised=1, answered=1, noise=3.0 + number / 7)
        found = said(ledger)["cohorts"]["chest"]
        exact = budget.spent(ledger.account.cohorts["chest"].charges)
        assert exact <= found["spent"]["epsilon"] == found["spent_and_promised"]["epsilon"] < exact + 0.01
        assert math.isclose(found["left"] + found["spent"]["epsilon"], 5.0)


def test_a_budget_lowered_below_what_was_spent_leaves_nothing(ledger: Ledger) -> None:
    before = said(filled(ledger))["cohorts"]["chest"]["spent"]["epsilon"]
    ledger.set_budget("chest", epsilon=before - 0.02, delta=None, by="ada", why="stop")
    found = said(ledger)["cohorts"]["chest"]
    assert found["left"] == 0
    assert found["spent"]["epsilon"] == before > found["budget"]["epsilon"]


def test_a_run_that_goes_on_is_charged_as_one_plan(ledger: Ledger) -> None:
    """Given back, then asked for again: promised twice, planned once."""
    filled(ledger)
    ledger.hold("early", cohort="chest", purpose="train", event=event(), rounds=10)
    use = said(ledger)["runs"][0]
    assert (use["promised"], use["plan_rounds"], use["not_drawn"]) == (16, 10, 6)


Step = Callable[[Ledger], object]
STEPS: list[tuple[Step, str]] = [
    (lambda _: None, "fedmed privacy cohort add default --declared-size N"),
    (
        lambda ledger: ledger.add_cohort("a b", declared_size=9, by="ada"),
        "fedmed privacy budget set 'a b' --epsilon NUMBER",
    ),
    (
        lambda ledger: ledger.set_budget("a b", epsilon=4, delta=None, by="ada", why="w"),
        "fedmed site policy DIR",
    ),
]


def test_a_ledger_in_which_little_stands_says_what_to_do_next(ledger: Ledger) -> None:
    for step, command in STEPS:
        step(ledger)
        (found,) = said(ledger)["next"]
        assert command in found["command"]


def test_the_same_entries_make_the_same_statement_as_json(ledger: Ledger) -> None:
    filled(ledger)
    entries = list(ledger.entries())
    found = statement(entries)
    assert statement(iter(entries)) == found
    assert json.loads(json.dumps(found, allow_nan=False)) == found
