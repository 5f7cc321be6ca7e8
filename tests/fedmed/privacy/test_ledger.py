"""The ledger never shows less than what left: over refusals, repeats, races, kills, and tampering."""

import contextlib
import hashlib
import multiprocessing
import os
import random
import shutil
import signal
import sqlite3
import time
from collections.abc import Callable
from pathlib import Path

import dp_accounting
import pytest
from dp_accounting.rdp import RdpAccountant

from fedmed.errors import PrivacyError
from fedmed.privacy.account import BudgetError
from fedmed.privacy.budget import Budget, best_order, divergence, pld_epsilon, renyi_budget
from fedmed.privacy.chain import VERSION, LedgerError, canonical, hash_of
from fedmed.privacy.events import from_json, to_json
from fedmed.privacy.ledger import Ledger, Stored, new_ledger
from fedmed.privacy.verify import verify
from tests.conftest import count
from tests.evidence import figure
from tests.timing import best

COHORT, DELTA = "chest clinic", 1e-5


class Key:
    """Stands for the site's key: a keyed hash is as good a signature here."""

    public_key = b"public"

    def sign(self, data: bytes) -> bytes:
        return hashlib.sha256(b"secret" + data).digest()

    def verifies(self, data: bytes, signature: bytes) -> bool:
        return signature == self.sign(data)


def event(noise: float = 4.0, sample_rate: float = 0.2, steps: int = 3) -> str:
    step = dp_accounting.PoissonSampledDpEvent(sample_rate, dp_accounting.GaussianDpEvent(noise))
    return to_json(dp_accounting.SelfComposedDpEvent(step, steps))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "ledger.db").write_bytes(new_ledger(Key(), site="a"))
    ledger = opened(tmp_path / "ledger.db")
    ledger.add_cohort(COHORT, declared_size=500, by="officer")
    ledger.set_budget(COHORT, epsilon=2.0, delta=DELTA, by="officer", why="protocol 7")
    ledger.close()
    return tmp_path / "ledger.db"


def opened(path: Path, **options: Callable[[], float]) -> Ledger:
    return Ledger(path, Key(), **options)


def spent(path: Path) -> float:
    cohort = opened(path).account.cohorts[COHORT]
    assert cohort.budget is not None
    return cohort.budget.spent(cohort.charges)


def drawn(path: Path) -> int:
    """Rounds that count as spent or promised, by a fresh reader."""
    return opened(path).account.cohorts[COHORT].charges.total()


def held(ledger: Ledger, run: str = "r", rounds: int = 4, **changes: str) -> None:
    ledger.hold(run, **{"cohort": COHORT, "purpose": "train", "event": event(), **changes}, rounds=rounds)


def answer(ledger: Ledger, run: str = "r", round: int = 1, content: bytes = b"update") -> bytes:
    """One round as a site does it; what it sends."""
    attempt = ledger.reserve(run, purpose="train", round=round, request="digest")
    if isinstance(attempt, Stored):
        return attempt.content
    ledger.open_data(attempt)
    ledger.commit(attempt, content)
    return content


# Events and the filter.


@pytest.mark.parametrize(
    "one",
    [
        dp_accounting.GaussianDpEvent(1.1),
        dp_accounting.PoissonSampledDpEvent(0.1, dp_accounting.GaussianDpEvent(0.7)),
        dp_accounting.ComposedDpEvent(
            [
                dp_accounting.GaussianDpEvent(1 / 3),
                dp_accounting.SelfComposedDpEvent(dp_accounting.GaussianDpEvent(2.0), 7),
            ]
        ),
        dp_accounting.NoOpDpEvent(),
        dp_accounting.NonPrivateDpEvent(),
    ],
)  # fmt: skip
def test_an_event_comes_back_exactly(one: dp_accounting.DpEvent) -> None:
    assert to_json(from_json(to_json(one))) == to_json(one)
    assert repr(from_json(to_json(one))) == repr(one)


@pytest.mark.parametrize(
    "text",
    ['{"gaussian":-1.0}', '{"gaussian":true}', '{"gaussian":NaN}', '{"poisson":1.5,"of":{"gaussian":1.0}}', "[]",
     '{"times":0,"of":{"gaussian":1.0}}', '{"times":2.5,"of":{"gaussian":1.0}}', '{"laplace":1.0}', "{", '"x"'],
)  # fmt: skip
def test_an_event_that_is_none_is_refused(text: str) -> None:
    """privacy.md, rule 11: never treated as free."""
    with pytest.raises(PrivacyError):
        from_json(text)
    with pytest.raises(PrivacyError, match="cannot be accounted"):
        to_json(dp_accounting.LaplaceDpEvent(1.0))


@pytest.mark.parametrize(("epsilon", "delta"), [(1.0, 1e-5), (3.0, 1e-4), (8.0, 1e-6)])
def test_a_full_filter_is_the_budget_by_dp_accounting_itself(epsilon: float, delta: float) -> None:
    """Heterogeneous runs up to the brim, composed independently at the same order, cost at most epsilon."""
    budget = Budget.of(epsilon=epsilon, delta=delta)
    charges = {event(noise=20.0): 3, event(noise=40.0, sample_rate=1.0, steps=1): 2}
    charges[event(noise=5.0)] = budget.rounds_that_fit(charges, event(noise=5.0))
    assert charges[event(noise=5.0)] > 0
    assert budget.allows(charges)
    assert not budget.allows({**charges, event(noise=5.0): charges[event(noise=5.0)] + 1})
    alone = RdpAccountant(
        orders=[budget.order], neighboring_relation=dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE
    )
    for text, times in charges.items():
        alone.compose(from_json(text), times)
    # A hundredth of delta is kept for the sampler.
    assert 0.9 * epsilon < alone.get_epsilon(0.99 * delta) <= epsilon
    assert budget.spent(charges) == pytest.approx(alone.get_epsilon(0.99 * delta), rel=1e-9)
    # PLD, which would bind for a fixed plan, says less.
    assert pld_epsilon(charges, delta=delta) < budget.spent(charges)


def test_the_order_is_the_one_that_holds_most() -> None:
    """Against a search that fills the budget at every order."""
    for epsilon, delta in ((1.0, 1e-5), (4.0, 1e-4)):
        best = best_order(epsilon=epsilon, delta=delta)
        gaussian = to_json(dp_accounting.GaussianDpEvent(20.0))

        def fits(
            order: int, epsilon: float = epsilon, delta: float = delta, gaussian: str = gaussian
        ) -> float:
            return renyi_budget(epsilon=epsilon, delta=delta, order=order) / divergence({gaussian: 1}, order)

        assert fits(best) == pytest.approx(max(fits(order) for order in range(2, 200)))


# The life of a round.


def test_a_round_is_held_reserved_opened_and_committed(path: Path) -> None:
    ledger = opened(path)
    held(ledger)
    assert drawn(path) == 4
    assert answer(ledger) == b"update"
    states = [entry.values["state"] for entry in ledger.entries() if entry.values["kind"] == "charge"]
    assert states == ["hold", "reserved", "opened", "committed"]
    assert drawn(path) == 4
    assert ledger.end("r") == 3
    assert drawn(path) == 1
    first = next(iter(ledger.entries())).values
    assert (first["kind"], first["site"]) == ("site", "a")
    assert len({entry.values["nonce"] for entry in ledger.entries()}) == len(list(ledger.entries()))


def test_two_runs_are_never_promised_the_same_budget(path: Path) -> None:
    """privacy.md, rule 12: the hold stands for the whole run, before any of it is spent."""
    ledger = opened(path)
    cohort = ledger.account.cohorts[COHORT]
    assert cohort.budget is not None
    most = cohort.budget.rounds_that_fit({}, event())
    held(ledger, rounds=most)
    with pytest.raises(BudgetError, match=r"epsilon 2\.\d\d after this run.*allowed 2"):
        held(opened(path), run="other", rounds=1)
    ledger.end("r")
    held(opened(path), run="other", rounds=most)


def test_a_run_draws_only_what_it_was_promised(path: Path) -> None:
    ledger = opened(path)
    with pytest.raises(BudgetError, match="ask for a quote first"):
        ledger.reserve("r", purpose="train", round=1, request="d")
    held(ledger, rounds=2)
    answer(ledger, round=1)
    answer(ledger, round=2)
    with pytest.raises(BudgetError, match="all 2 rounds that it was promised are spent"):
        answer(ledger, round=3)
    # A longer run is promised the difference.
    held(ledger, rounds=3)
    answer(ledger, round=3)
    assert drawn(path) == 3
    with pytest.raises(BudgetError, match="another mechanism"):
        held(ledger, rounds=9, event=event(noise=9.0))


def test_a_run_that_ended_goes_on_with_a_new_promise(path: Path) -> None:
    ledger = opened(path)
    held(ledger, rounds=3)
    answer(ledger)
    ledger.end("r")
    with pytest.raises(BudgetError, match="ask for a quote"):
        answer(ledger, round=2)
    held(ledger, rounds=4)
    assert drawn(path) == 4
    for round in (2, 3, 4):
        answer(ledger, round=round)
    with pytest.raises(BudgetError, match="all 4 rounds"):
        answer(ledger, round=5)
    # Its earlier answers were let go of when it ended.
    with pytest.raises(BudgetError, match="are gone"):
        answer(ledger, round=1)


def test_a_repeated_request_gets_the_stored_bytes_and_another_one_a_new_charge(path: Path) -> None:
    """privacy.md, rule 13."""
    ledger = opened(path)
    held(ledger)
    sent = answer(ledger, content=b"first")
    entries = len(list(ledger.entries()))
    assert answer(opened(path), content=b"second") == sent
    assert len(list(ledger.entries())) == entries
    other = ledger.reserve("r", purpose="train", round=1, request="other digest")
    assert not isinstance(other, Stored)
    # An attempt that never came to its end is not repeated for free either.
    again = ledger.reserve("r", purpose="train", round=2, request="digest")
    assert not isinstance(again, Stored)
    once_more = ledger.reserve("r", purpose="train", round=2, request="digest")
    assert not isinstance(once_more, Stored)
    assert once_more.nonce != again.nonce
    assert ledger.account.holds["r", "train"].left == 0


def test_only_what_never_opened_data_is_refunded(path: Path) -> None:
    """privacy.md, rule 13: a failure after that is an output."""
    ledger = opened(path)
    held(ledger)
    attempt = ledger.reserve("r", purpose="train", round=1, request="d")
    assert not isinstance(attempt, Stored)
    ledger.refund(attempt.nonce, by="officer", why="the machine was switched off")
    with pytest.raises(BudgetError, match="is refunded"):
        ledger.refund(attempt.nonce, by="officer", why="once more")
    assert ledger.account.holds["r", "train"].left == 4
    spent_one = ledger.reserve("r", purpose="train", round=1, request="d")
    assert not isinstance(spent_one, Stored)
    ledger.open_data(spent_one)
    with pytest.raises(BudgetError, match="what opened data stays spent"):
        ledger.refund(spent_one.nonce, by="officer", why="it failed")
    with pytest.raises(BudgetError, match="no reservation has this id"):
        ledger.refund("0" * 32, by="officer", why="?")
    kept = ledger.reserve("r", purpose="train", round=2, request="d")
    assert not isinstance(kept, Stored)
    ledger.end("r")
    assert drawn(path) == 2
    ledger.refund(kept.nonce, by="officer", why="found later")
    assert drawn(path) == 1
    with pytest.raises(BudgetError, match="cannot become committed"):
        ledger.commit(kept, b"late")


def test_a_budget_keeps_its_delta_and_its_order(path: Path) -> None:
    """privacy.md, rules 11 and 15."""
    ledger = opened(path)
    before = ledger.account.cohorts[COHORT].budget
    assert before is not None
    raised = ledger.set_budget(COHORT, epsilon=5.0, delta=None, by="officer", why="board of 3 May")
    assert (raised.epsilon, raised.delta, raised.order) == (5.0, before.delta, before.order)
    with pytest.raises(BudgetError, match="has delta 1e-05 for its lifetime"):
        ledger.set_budget(COHORT, epsilon=5.0, delta=1e-4, by="officer", why="?")
    last = list(ledger.entries())[-1].values
    assert (last["kind"], last["by"], last["why"]) == ("budget", "officer", "board of 3 May")
    with pytest.raises(BudgetError, match="exists already"):
        ledger.add_cohort(COHORT, declared_size=3, by="officer")
    with pytest.raises(BudgetError, match="did you mean 'chest clinic'"):
        ledger.set_budget("chest clinc", epsilon=1.0, delta=None, by="officer", why="?")
    ledger.add_cohort("small", declared_size=200_000, by="officer")
    assert ledger.set_budget("small", epsilon=1.0, delta=None, by="o", why="w").delta == 1 / 2_000_000


def test_cohorts_that_share_a_patient_share_one_budget(path: Path) -> None:
    """privacy.md, rule 3; checked at the site, by pseudonyms that are no entries and do not leave it."""
    ledger = opened(path)
    ledger.add_cohort("other", declared_size=100, by="officer")
    people = [bytes([index % 256, index // 256]) * 8 for index in range(700)]
    ledger.enrol(COHORT, people[:600])
    entries = len(list(ledger.entries()))
    # A new version of the data stays in its cohort.
    ledger.enrol(COHORT, people[100:650])
    with pytest.raises(BudgetError, match=f"shares patients with '{COHORT}'"):
        opened(path).enrol("other", people[649:])
    # What was refused is not remembered.
    opened(path).enrol(COHORT, people[650:])
    opened(path).enrol("other", [b"somebody else..."])
    assert len(list(ledger.entries())) == entries


def test_ten_thousand_entries_compose_in_two_seconds(path: Path) -> None:
    """Of a hundred kinds; by a process that opens the ledger."""
    ledger = opened(path)
    ledger.set_budget(COHORT, epsilon=100.0, delta=None, by="o", why="w")
    with ledger._transaction():
        for index in range(count(1_000, 10_000)):
            text = event(noise=100.0 + index % 100, sample_rate=0.01 + 1e-4 * (index % 7), steps=1)
            ledger._append({"kind": "charge", "state": "hold", "cohort": COHORT, "run": f"r{index}",
                            "purpose": "train", "event": text, "rounds": 1})  # fmt: skip

    def compose() -> None:
        cohort = opened(path).account.cohorts[COHORT]
        assert cohort.budget is not None
        assert cohort.budget.spent(cohort.charges) > 0

    seconds = best(compose, enough=2)
    figure("CPU seconds to open and compose", f"{seconds:.2f}")
    assert seconds <= 2


# Several processes, and their deaths.


# Small enough that more than the racers draw fits into the budget.
RACED = event(noise=12.0)


def _race(path: str, index: int, took: "multiprocessing.Queue[int]") -> None:
    ledger, mine = opened(Path(path)), 0
    for number in range(1000):
        try:
            held(ledger, run=f"p{index}-{number}", rounds=1, event=RACED)
        except BudgetError:
            break
        mine += 1
    took.put(mine)


def test_eight_processes_never_overspend_the_last_of_a_budget(path: Path) -> None:
    ledger = opened(path)
    budget = ledger.account.cohorts[COHORT].budget
    assert budget is not None
    most = budget.rounds_that_fit({}, RACED)
    held(ledger, run="earlier", rounds=most - count(9, 41), event=RACED)
    # No connection may be open when a process is forked.
    ledger.close()
    context = multiprocessing.get_context("fork")
    took = context.Queue()
    racers = [context.Process(target=_race, args=(str(path), index, took)) for index in range(8)]
    for racer in racers:
        racer.start()
    total = sum(took.get(timeout=250) for _ in racers)
    for racer in racers:
        racer.join(timeout=60)
        assert racer.exitcode == 0
    assert total == count(9, 41)
    assert drawn(path) == most
    assert spent(path) <= 2.0
    assert verify(path, verifies=Key().verifies).ok


# More than any process lives to do.
ROUNDS = 2000


def _rounds(path: str, run: str, writing: int) -> None:
    """A site that answers round after round; each reply is one byte that left it."""
    ledger = opened(Path(path))
    held(ledger, run=run, rounds=ROUNDS, event=event(noise=200.0))
    for number in range(1, ROUNDS + 1):
        answer(ledger, run=run, round=number, content=bytes([number % 256]))
        os.write(writing, bytes([number % 256]))


def test_killed_at_any_instant_it_shows_no_less_than_what_left(path: Path) -> None:
    ledger = opened(path)
    ledger.set_budget(COHORT, epsilon=90.0, delta=None, by="o", why="w")
    ledger.close()
    context, dice = multiprocessing.get_context("fork"), random.Random(5)
    kills = sent = 0
    for index in range(count(20, 500)):
        if index % 25 == 0:
            # A copy, so that the chain does not grow without end.
            copy = path.with_name(f"{index}.db")
            shutil.copy(path, copy)
        reading, writing = os.pipe()
        site = context.Process(target=_rounds, args=(str(copy), f"run {index}", writing))
        site.start()
        os.close(writing)
        # Most of them after a sign of life, however long a busy machine takes to begin.
        left = os.read(reading, 1) if index % 4 else b""
        time.sleep(dice.uniform(0, 0.1))
        assert site.pid is not None
        os.kill(site.pid, signal.SIGKILL)
        site.join()
        kills += site.exitcode == -signal.SIGKILL
        while piece := os.read(reading, 100):
            left += piece
        os.close(reading)
        sent += len(left)
        account = opened(copy).account
        states = [a.state for a in account.attempts.values() if a.run == f"run {index}"]
        assert states.count("committed") >= len(left)
        if left:
            assert account.holds[f"run {index}", "train"].left == ROUNDS - len(states)
            # What left is what is stored: the same request gets the same bytes.
            assert answer(opened(copy), run=f"run {index}", content=b"?") == left[:1]
    assert kills > 0.8 * count(20, 500)
    assert sent > kills / 2
    figure("kills, replies that had left", f"{kills}, {sent}")
    assert verify(copy, verifies=Key().verifies).ok


# Tampering.


@pytest.fixture
def chain(path: Path) -> Path:
    ledger = opened(path)
    held(ledger)
    for number in (1, 2, 3):
        answer(ledger, round=number)
    ledger.end("r")
    ledger.close()
    return path


def change(path: Path, *statements: tuple[str, tuple[object, ...]]) -> None:
    connection = sqlite3.connect(path)
    for statement, values in statements:
        connection.execute(statement, values)
    connection.commit()
    connection.close()


def test_an_untouched_ledger_verifies(chain: Path) -> None:
    verdict = verify(chain, verifies=Key().verifies, receipts=[opened(chain).head()["hash"]])
    assert verdict.ok
    assert verdict.entries == len(list(opened(chain).entries())) == 14


@pytest.mark.parametrize("at", range(1, 15))
def test_whatever_is_altered_removed_or_moved_is_named(chain: Path, at: int) -> None:
    """Every entry, in five ways, the last of which by someone who makes the hashes anew but has not the key."""
    entries = list(opened(chain).entries())
    one = entries[at - 1]
    altered = canonical({**one.values, "time": 0.0})

    def verdict(*statements: tuple[str, tuple[object, ...]]) -> int | None:
        copy = chain.with_name("copy.db")
        shutil.copy(chain, copy)
        change(copy, *statements)
        return verify(copy, verifies=Key().verifies).bad

    assert verdict(("UPDATE entries SET body = ? WHERE number = ?", (altered, at))) == at
    assert verdict(("UPDATE entries SET signature = x'00' WHERE number = ?", (at,))) == at
    if at < 14:
        assert verdict(("DELETE FROM entries WHERE number = ?", (at,))) == at
        swapped = [
            ("UPDATE entries SET number = 99 WHERE number = ?", (at,)),
            ("UPDATE entries SET number = ? WHERE number = ?", (at, at + 1)),
            ("UPDATE entries SET number = ? WHERE number = 99", (at + 1,)),
        ]
        assert verdict(*swapped) == at  # type: ignore[arg-type]
    digest = hash_of(at, altered)
    statement = "UPDATE entries SET body = ?, hash = ? WHERE number = ?"
    assert verdict((statement, (altered, digest, at))) == at


def test_a_receipt_shows_what_was_cut_off(chain: Path) -> None:
    receipts = [entry.hash for entry in opened(chain).entries()][4:]
    for keep in range(1, 14):
        copy = chain.with_name("copy.db")
        shutil.copy(chain, copy)
        change(
            copy,
            ("DELETE FROM entries WHERE number > ?", (keep,)),
            ("DELETE FROM replies", ()),
        )
        # Without receipts a shorter chain is a whole chain.
        assert verify(copy, verifies=Key().verifies).ok
        verdict = verify(copy, verifies=Key().verifies, receipts=receipts)
        assert verdict.bad == keep + 1
        assert "cut off" in (verdict.reason or "")


def test_a_stored_answer_that_was_exchanged_is_found(chain: Path) -> None:
    ledger = opened(chain)
    held(ledger, run="s")
    answer(ledger, run="s")
    ledger.close()
    change(chain, ("UPDATE replies SET content = ?", (b"another",)))
    assert "is not the one that was released" in (verify(chain, verifies=Key().verifies).reason or "")


# What stops training before data is touched.


def test_a_ledger_of_a_newer_version_is_not_touched(path: Path) -> None:
    change(path, (f"PRAGMA user_version={VERSION + 1}", ()))
    with pytest.raises(LedgerError, match=f"has format {VERSION + 1}.*install the fedmed that wrote it"):
        opened(path)


def test_another_database_is_no_ledger(tmp_path: Path) -> None:
    change(tmp_path / "mlruns.db", ("CREATE TABLE runs (id)", ()))
    with pytest.raises(LedgerError, match="is no ledger of fedmed"):
        opened(tmp_path / "mlruns.db")
    with pytest.raises(LedgerError, match="no ledger; make the site with"):
        opened(tmp_path / "nothing.db")
    assert sorted(p.name for p in tmp_path.iterdir() if p.name != "fedmed-home") == ["mlruns.db"]


def test_another_site_s_ledger_is_not_used(path: Path) -> None:
    class Other(Key):
        public_key = b"another"

    with pytest.raises(LedgerError, match="another key"):
        Ledger(path, Other())


def test_a_clock_that_jumps_back_stops_the_next_entry(path: Path) -> None:
    ledger = opened(path, clock=lambda: time.time() - 3600)
    with pytest.raises(LedgerError, match=r"clock is 3\d\d\d s behind.*timedatectl"):
        held(ledger)
    assert drawn(path) == 0
    held(opened(path, clock=lambda: time.time() - 30))


def test_a_damaged_page_is_said_and_nothing_is_held(chain: Path) -> None:
    connection = sqlite3.connect(chain)
    connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    connection.close()
    offsets = range(4096, chain.stat().st_size, 4096)
    pages, intact = len(offsets), 0
    for offset in offsets:
        copy = chain.with_name("copy.db")
        shutil.copy(chain, copy)
        with copy.open("r+b") as file:
            file.seek(offset)
            file.write(b"\xa5" * 4096)
        # Where the page held nothing that the chain needs, such as stored answers, there is no complaint.
        with contextlib.suppress(LedgerError):
            held(opened(copy), run="later")
            intact += 1
        assert verify(chain, verifies=Key().verifies).ok
    assert intact < pages / 2, "most pages of a small ledger are in use"


def test_a_ledger_that_cannot_be_written_promises_nothing(path: Path) -> None:
    ledger = opened(path)
    ledger._connection.execute("PRAGMA query_only=ON")
    with pytest.raises(LedgerError, match="cannot be written to; mount"):
        held(ledger)
    assert drawn(path) == 0
    assert "r" not in {run for run, _ in ledger.account.holds}
    ledger._connection.execute("PRAGMA query_only=OFF")
    ledger._connection.execute(
        f"PRAGMA max_page_count={ledger._connection.execute('PRAGMA page_count').fetchone()[0]}"
    )

    def fill() -> None:
        for index in range(1000):
            held(ledger, run=f"r{index}", rounds=1, event=event(noise=1000.0))

    with pytest.raises(LedgerError, match="disk is full; free some space"):
        fill()
    assert ledger.account.cohorts[COHORT].charges.total() == drawn(path)
