"""A site's ledger: every mechanism that was ever run on its cohorts, and what may still be.

One SQLite file. An entry is never changed: a new state is a new entry, which names the hash of the one before
it and is signed by the site. What an entry does to the account is in `fedmed.privacy.account`.

The life of a round: `hold` at launch, for the whole run; `reserve` before data is opened; `open_data` as the
last thing before; `commit` before the reply leaves. A process that dies in between leaves a reservation, which
counts as spent. A request that was answered before gets the stored bytes.
"""

import contextlib
import hashlib
import json
import os
import secrets
import sqlite3
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

from fedmed.errors import require
from fedmed.privacy.account import Account, Attempt, BudgetError, Hold
from fedmed.privacy.budget import Budget
from fedmed.privacy.chain import (
    APPLICATION,
    START,
    VERSION,
    Entry,
    LedgerError,
    advice,
    canonical,
    chained,
    check_version,
    connect,
    hash_of,
    stored_entries,
)

# How far the clock may be behind the last entry: a correction by NTP, no more.
CLOCK_SLACK = 60.0
TABLES = """
CREATE TABLE entries (
    number INTEGER PRIMARY KEY, body TEXT NOT NULL, hash TEXT NOT NULL UNIQUE, signature BLOB NOT NULL
);
CREATE TABLE replies (attempt TEXT PRIMARY KEY, content BLOB NOT NULL);
CREATE TABLE patients (pseudonym BLOB PRIMARY KEY, cohort TEXT NOT NULL) WITHOUT ROWID;
"""


class Signer(Protocol):
    """The site's key."""

    @property
    def public_key(self) -> bytes:
        """What others verify with."""
        ...

    def sign(self, data: bytes) -> bytes:
        """A signature of the data."""
        ...


@dataclass(frozen=True)
class Stored:
    """The answer that an earlier, equal request got."""

    content: bytes


class Ledger:
    """An open ledger. Safe to use from several processes at once; each has an object of its own.

    Raises:
        LedgerError: from every method, where the file cannot be read or written, or does not fit together.
        BudgetError: where a charge would exceed the cohort's budget, or a run's hold.
    """

    def __init__(self, path: Path, signer: Signer, *, clock: Callable[[], float] = time.time) -> None:
        if not path.exists():
            raise LedgerError(f"{path}: no ledger; make the site with: fedmed site init")
        self.path = path
        self._signer = signer
        self._clock = clock
        self._process = os.getpid()
        self.account = Account()
        self._last = START
        self._last_time = 0.0
        # Hash of the pseudonyms that were last enrolled, by cohort: a round need not do it again.
        self._enrolled: dict[str, int] = {}
        with self._errors():
            self._connection = connect(path)
            check_version(self._connection, path=path)
        self.refresh()
        if self.account.public_key not in (None, signer.public_key.hex()):
            raise LedgerError(
                f"{path}: belongs to a site with another key; restore the site's folder from a backup"
            )

    def close(self) -> None:
        """Close the file; the last process to do so leaves everything in it."""
        self._connection.close()

    # What the officer decides.

    def add_cohort(self, name: str, *, declared_size: int, by: str) -> None:
        """Name a group of patients who share one budget, over all versions of their data (rule 3)."""
        self._append_all([{"kind": "cohort", "cohort": name, "declared_size": declared_size, "by": by}])

    def set_budget(self, cohort: str, *, epsilon: float, delta: float | None, by: str, why: str) -> Budget:
        """Set a cohort's budget, or change its epsilon; delta and the filter's order stay for its lifetime."""
        with self._transaction():
            earlier = self.account.cohort(cohort).budget
            if earlier is None:
                budget = Budget.of(
                    epsilon=epsilon, delta=self.account.default_delta(cohort) if delta is None else delta
                )
            elif delta not in (None, earlier.delta):
                raise BudgetError(
                    f"delta={delta:g}: cohort '{cohort}' has delta {earlier.delta:g} for its lifetime"
                )
            else:
                budget = earlier.raised(epsilon)
            self._append(
                {"kind": "budget", "cohort": cohort, "epsilon": budget.epsilon, "delta": budget.delta,
                 "filter": {"renyi_order": budget.order}, "by": by, "why": why}
            )  # fmt: skip
        return budget

    def decide(self, run: str, *, approved: bool, by: str, why: str, what: dict[str, Any]) -> None:
        """Record that a person approved or refused a run."""
        self._append_all(
            [{"kind": "decision", "run": run, "approved": approved, "by": by, "why": why, "what": what}]
        )

    def refund(self, attempt: str, *, by: str, why: str) -> None:
        """Take back a reservation whose process never opened data (rule 13)."""
        self._append_all([{"kind": "charge", "state": "refunded", "of": attempt, "by": by, "why": why}])

    # The life of a run.

    def request(self, run: str, *, what: dict[str, Any]) -> None:
        """Record that a run was asked for which waits for a person: once, and anew when its settings changed.

        A request that nobody has decided on is not exchanged for another: a person decides on what was shown.
        """
        with self._transaction():
            earlier, decision = self.account.requests.get(run), self.account.decisions.get(run)
            decided = decision is not None and decision["what"] == earlier
            if earlier is None or (decided and earlier != what):
                self._append({"kind": "request", "run": run, "what": what})

    def hold(self, run: str, *, cohort: str, purpose: str, event: str, rounds: int) -> Hold:
        """Promise a whole run its budget; a second call for more rounds adds the difference.

        Raises:
            BudgetError: it does not fit beside what was spent and promised; or the run's event is another one.
        """
        require(rounds >= 1, "rounds", rounds, ">= 1")
        with self._transaction():
            held = self.account.holds.get((run, purpose))
            more = rounds - (held.rounds if held else 0)
            if held and (held.event != event or held.cohort != cohort):
                raise BudgetError(f"run '{run}' was promised another mechanism; start a new run")
            if more > 0:
                self.account.check_fits(cohort, event, more)
                self._append(
                    {"kind": "charge", "state": "hold", "cohort": cohort, "run": run, "purpose": purpose,
                     "event": event, "rounds": more}
                )  # fmt: skip
            return self.account.holds[run, purpose]

    def reserve(self, run: str, *, purpose: str, round: int, request: str) -> Attempt | Stored:
        """Draw one round from the run's hold, before data is opened; or the stored answer to the same request.

        Args:
            request: digest of everything that was asked. The same (run, round, request) after an attempt that
                never committed is a new charge: its noise will be fresh.

        Raises:
            BudgetError: no hold, or nothing left in it.
        """
        with self._transaction():
            answered = self.account.answered.get((run, purpose, round, request))
            if answered is not None:
                row = self._connection.execute(
                    "SELECT content FROM replies WHERE attempt = ?", (answered,)
                ).fetchone()
                if row is not None:
                    return Stored(bytes(row[0]))
                raise BudgetError(f"run '{run}' has ended: its stored answers are gone")
            held = self.account.holds.get((run, purpose))
            if held is None or held.closed:
                raise BudgetError(f"run '{run}': no budget was promised to it here; ask for a quote first")
            if held.left < 1:
                raise BudgetError(f"run '{run}': all {held.rounds} rounds that it was promised are spent")
            nonce = self._append(
                {"kind": "charge", "state": "reserved", "cohort": held.cohort, "run": run, "round": round,
                 "purpose": purpose, "event": held.event, "request": request}
            )  # fmt: skip
            return self.account.attempts[nonce]

    def open_data(self, attempt: Attempt) -> None:
        """From here on the attempt is spent, whatever becomes of it."""
        self._append_all([{"kind": "charge", "state": "opened", "of": attempt.nonce}])

    def enrol(self, cohort: str, pseudonyms: Sequence[bytes]) -> None:
        """Remember whose data a cohort holds: two cohorts that share a patient must share one budget (rule 3).

        The pseudonyms stay in this file; they are no entries.

        Raises:
            BudgetError: a patient is in another cohort.
        """
        known = self._enrolled.get(cohort)
        if known == (fresh := hash(tuple(pseudonyms))):
            return
        with self._transaction():
            rows = self._connection.executemany
            rows("INSERT OR IGNORE INTO patients VALUES (?, ?)", [(p, cohort) for p in pseudonyms])
            others: set[str] = set()
            for start in range(0, len(pseudonyms), 500):
                some = pseudonyms[start : start + 500]
                marks = ",".join("?" * len(some))
                found = self._connection.execute(
                    f"SELECT DISTINCT cohort FROM patients WHERE cohort != ? AND pseudonym IN ({marks})",
                    (cohort, *some),
                )
                others |= {name for (name,) in found}
            if others:
                raise BudgetError(
                    f"cohort '{cohort}' shares patients with '{min(others)}': they must share one budget; name that "
                    "cohort in site.yaml"
                )
        self._enrolled[cohort] = fresh

    def commit(self, attempt: Attempt, content: bytes) -> None:
        """Record what is about to leave, and keep it for a repeated request."""
        released = hashlib.sha256(content).hexdigest()
        with self._transaction():
            self._connection.execute(
                "INSERT INTO replies (attempt, content) VALUES (?, ?)", (attempt.nonce, content)
            )
            self._append({"kind": "charge", "state": "committed", "of": attempt.nonce, "released": released})

    def end(self, run: str, *, by: str = "coordinator", why: str = "the run is over") -> int:
        """Give back the rounds that a run never touched; how many.

        Its stored answers go as well: nobody repeats a request of a run that has ended.
        """
        with self._transaction():
            left = 0
            for hold in self.account.open_holds(run):
                left += hold.left
                self._append(
                    {"kind": "charge", "state": "returned", "cohort": hold.cohort, "run": run,
                     "purpose": hold.purpose, "rounds": hold.left, "by": by, "why": why}
                )  # fmt: skip
            committed = [a.nonce for a in self.account.attempts.values() if a.run == run]
            self._connection.executemany("DELETE FROM replies WHERE attempt = ?", [(n,) for n in committed])
        return left

    def outside(self, run: str, *, what: str, released: bytes, approval: str) -> None:
        """Record a release that no epsilon covers, and under whose approval (rules 17 and 20)."""
        digest = hashlib.sha256(released).hexdigest()
        self._append_all(
            [{"kind": "outside", "run": run, "what": what, "released": digest, "approval": approval}]
        )

    # The chain.

    def head(self) -> dict[str, str]:
        """A receipt of everything so far: it goes out with every reply, and shows a later truncation."""
        self.refresh()
        return {"hash": self._last.hash, "signature": self._last.signature.hex()}

    def entries(self, after: int = 0) -> Iterator[Entry]:
        """The stored entries, oldest first."""
        return stored_entries(self._connection, after)

    def replies(self) -> dict[str, bytes]:
        """The stored answers, by attempt."""
        rows = self._connection.execute("SELECT attempt, content FROM replies")
        return {attempt: bytes(content) for attempt, content in rows}

    def refresh(self) -> None:
        """Read what other processes have written."""
        self._check_process()
        with self._errors():
            self._catch_up()

    def _catch_up(self) -> None:
        for entry in chained(self._connection, self._last, path=self.path):
            values = entry.values
            self.account.apply(values)
            self._last, self._last_time = entry, max(self._last_time, values["time"])

    def _append_all(self, bodies: list[dict[str, Any]]) -> None:
        with self._transaction():
            for body in bodies:
                self._append(body)

    def _append(self, body: dict[str, Any]) -> str:
        """Write one entry inside a transaction; its nonce. What the account refuses is not written."""
        now = self._clock()
        if now < self._last_time - CLOCK_SLACK:
            last = datetime.fromtimestamp(self._last_time, UTC)
            raise LedgerError(
                f"the clock is {self._last_time - now:.0f} s behind the ledger's last entry ({last:%Y-%m-%d %H:%M:%S} "
                "UTC); set the clock (timedatectl set-ntp true), then try again"
            )
        nonce = secrets.token_hex(16)
        values = {**body, "nonce": nonce, "time": round(now, 3), "previous": self._last.hash}
        self.account.check(values)
        text = canonical(values)
        digest = hash_of(self._last.number + 1, text)
        entry = Entry(self._last.number + 1, text, digest, self._signer.sign(digest.encode()))
        self._connection.execute(
            "INSERT INTO entries (number, body, hash, signature) VALUES (?, ?, ?, ?)",
            (entry.number, entry.body, entry.hash, entry.signature),
        )
        self.account.apply(values)
        self._last, self._last_time = entry, max(self._last_time, values["time"])
        return nonce

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        """One step that happens whole or not at all, alone among all processes, and lasts once it is over."""
        self._check_process()
        with self._errors():
            self._connection.execute("BEGIN IMMEDIATE")
        before = self._last.number
        try:
            with self._errors():
                self._catch_up()
                before = self._last.number
                yield
                self._connection.execute("COMMIT")
        except BaseException:
            with contextlib.suppress(sqlite3.Error):
                self._connection.execute("ROLLBACK")
            if self._last.number != before:
                # What was applied and not written is forgotten: the file alone is true.
                self.account, self._last, self._last_time = Account(), START, 0.0
                with contextlib.suppress(LedgerError):
                    self.refresh()
            raise

    def _check_process(self) -> None:
        # SQLite's locks belong to a process; a forked one would write without them.
        if os.getpid() != self._process:
            raise LedgerError(f"{self.path}: was opened before this process was forked; open it again")

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
            raise LedgerError(
                f"{self.path}: {advice(error, self.path)}; nothing was trained or released"
            ) from None


def new_ledger(signer: Signer, *, site: str) -> bytes:
    """The file of a new ledger, whose first entry names the site and its public key.

    Raises:
        OSError: there is no room for temporary files.
    """
    with tempfile.TemporaryDirectory(prefix="fedmed-") as folder:
        path = Path(folder) / "ledger.db"
        connection = connect(path)
        connection.execute("PRAGMA journal_mode=WAL")
        connection.executescript(TABLES)
        connection.execute(f"PRAGMA application_id={APPLICATION}")
        connection.execute(f"PRAGMA user_version={VERSION}")
        connection.close()
        ledger = Ledger(path, signer)
        ledger._append_all([{"kind": "site", "site": site, "public_key": signer.public_key.hex()}])
        # Closing moves everything from the write-ahead log into the file.
        ledger.close()
        return path.read_bytes()
