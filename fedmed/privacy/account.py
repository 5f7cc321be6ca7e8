"""What the entries of a ledger add up to: cohorts, budgets, holds, attempts. No file here."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from fedmed.errors import PrivacyError, nearest, require
from fedmed.privacy.budget import Budget
from fedmed.privacy.events import from_json

PURPOSES = ("train", "metrics", "statistics", "audit")


class BudgetError(PrivacyError):
    """A charge does not fit into what a cohort, or a run, was given."""


@dataclass
class Cohort:
    """A group of patients who share one budget.

    `charges` counts the events that were run, or are promised to a run that may still run them.
    """

    name: str
    declared_size: int
    budget: Budget | None = None
    charges: Counter[str] = field(default_factory=Counter)


@dataclass
class Hold:
    """What a run was promised: so many rounds of one event, of which `left` are not drawn yet.

    Closed once they were given back; `rounds` then are those that were drawn. A run that goes on opens it again.
    """

    run: str
    cohort: str
    purpose: str
    event: str
    rounds: int = 0
    left: int = 0
    closed: bool = False


@dataclass
class Attempt:
    """One round, once: reserved, opened, then committed; or refunded if it never opened data."""

    nonce: str
    run: str
    cohort: str
    purpose: str
    event: str
    round: int
    request: str
    state: str = "reserved"
    released: str | None = None


class Account:
    """The state after a sequence of entries."""

    def __init__(self) -> None:
        self.site: str | None = None
        self.public_key: str | None = None
        self.cohorts: dict[str, Cohort] = {}
        self.holds: dict[tuple[str, str], Hold] = {}
        self.attempts: dict[str, Attempt] = {}
        # The attempt that answered (run, purpose, round, request).
        self.answered: dict[tuple[str, str, int, str], str] = {}
        self.requests: dict[str, dict[str, Any]] = {}
        self.decisions: dict[str, dict[str, Any]] = {}

    def cohort(self, name: str) -> Cohort:
        """A cohort by name.

        Raises:
            BudgetError: there is none.
        """
        if name not in self.cohorts:
            hint = (
                nearest(name, self.cohorts)
                if self.cohorts
                else f"add it with: fedmed privacy cohort add {name}"
            )
            raise BudgetError(f"cohort '{name}': no such cohort; {hint}")
        return self.cohorts[name]

    def default_delta(self, cohort: str) -> float:
        """A site's default: min(1e-5, 1 / (10 x declared size)) (rule 15)."""
        return min(1e-5, 1 / (10 * self.cohort(cohort).declared_size))

    def open_holds(self, run: str) -> list[Hold]:
        """A run's holds that have not been given back."""
        return [hold for hold in self.holds.values() if hold.run == run and not hold.closed]

    def drawn(self, run: str) -> int:
        """How many rounds of training a run was charged for: all that were begun and not refunded."""
        hold = self.holds.get((run, "train"))
        return hold.rounds - hold.left if hold else 0

    def pending(self) -> Iterator[Attempt]:
        """Attempts that were reserved and never came to an end: they count as spent."""
        return (a for a in self.attempts.values() if a.state in ("reserved", "opened"))

    def check_fits(self, name: str, event: str, rounds: int) -> None:
        """Raise `BudgetError` unless so many more rounds fit beside everything spent and promised."""
        cohort = self.cohort(name)
        if cohort.budget is None:
            raise BudgetError(
                f"cohort '{name}' has no budget; set one with: fedmed privacy budget set {name} --epsilon …"
            )
        after = cohort.charges + Counter({event: rounds})
        if not cohort.budget.allows(after):
            raise BudgetError(
                f"cohort '{name}': epsilon {cohort.budget.spent(after):.2f} after this run, by the filter that binds; "
                f"allowed {cohort.budget.epsilon:g}"
            )

    def check(self, values: dict[str, Any]) -> None:
        """Raise `BudgetError` or `ConfigError` where an entry cannot come next."""
        kind = values["kind"]
        if kind == "site":
            if self.site is not None:
                raise BudgetError("the ledger belongs to a site already")
        elif kind == "cohort":
            name = values["cohort"]
            require(
                bool(name) and name.isprintable() and len(name) <= 100, "cohort", name or "''", "a short name"
            )
            require(values["declared_size"] >= 1, "declared_size", values["declared_size"], ">= 1")
            if name in self.cohorts:
                raise BudgetError(f"cohort '{name}': exists already, and keeps its budget for its lifetime")
        elif kind == "budget":
            self.cohort(values["cohort"])
            _budget(values)
        elif kind == "charge":
            self._check_charge(values)
        elif kind not in ("request", "decision", "outside"):
            raise BudgetError(f"an entry of kind '{kind}' is not known here; install a newer fedmed")

    def _check_charge(self, values: dict[str, Any]) -> None:
        state = values["state"]
        if state == "hold":
            require(values["purpose"] in PURPOSES, "purpose", values["purpose"], " | ".join(PURPOSES))
            require(values["rounds"] >= 1, "rounds", values["rounds"], ">= 1")
            from_json(values["event"])
            self.check_fits(values["cohort"], values["event"], values["rounds"])
        elif state in ("reserved", "returned"):
            hold = self.holds[values["run"], values["purpose"]]
            if hold.closed or (state == "reserved" and hold.left < 1):
                raise BudgetError(f"run '{hold.run}': nothing is left of what it was promised")
        else:
            self._check_next(values["of"], state)

    def _check_next(self, nonce: str, state: str) -> None:
        attempt = self.attempts.get(nonce)
        if attempt is None:
            raise BudgetError(f"entry '{nonce}': no reservation has this id; see: fedmed privacy report")
        before = {"opened": ("reserved",), "committed": ("opened",), "refunded": ("reserved",)}
        if state not in before:
            raise BudgetError(f"state '{state}' is not known here; install a newer fedmed")
        if attempt.state not in before[state]:
            spent = "; what opened data stays spent (a failure is an output)" if state == "refunded" else ""
            raise BudgetError(f"entry '{nonce}' is {attempt.state}: it cannot become {state}{spent}")

    def apply(self, values: dict[str, Any]) -> None:
        """Take over an entry that was checked when it was written."""
        kind = values["kind"]
        if kind == "site":
            self.site, self.public_key = values["site"], values["public_key"]
        elif kind == "cohort":
            self.cohorts[values["cohort"]] = Cohort(values["cohort"], values["declared_size"])
        elif kind == "budget":
            self.cohorts[values["cohort"]].budget = _budget(values)
        elif kind == "request":
            self.requests[values["run"]] = values["what"]
        elif kind == "decision":
            self.decisions[values["run"]] = values
        elif kind == "charge":
            self._apply_charge(values)

    def _apply_charge(self, values: dict[str, Any]) -> None:
        state = values["state"]
        if state == "hold":
            key = values["run"], values["purpose"]
            hold = self.holds.setdefault(
                key, Hold(values["run"], values["cohort"], values["purpose"], values["event"])
            )
            hold.rounds += values["rounds"]
            hold.left += values["rounds"]
            hold.closed = False
            self.cohorts[hold.cohort].charges[hold.event] += values["rounds"]
        elif state == "reserved":
            hold = self.holds[values["run"], values["purpose"]]
            hold.left -= 1
            self.attempts[values["nonce"]] = Attempt(
                values["nonce"],
                hold.run,
                hold.cohort,
                hold.purpose,
                hold.event,
                values["round"],
                values["request"],
            )
        elif state == "returned":
            hold = self.holds[values["run"], values["purpose"]]
            self.cohorts[hold.cohort].charges[hold.event] -= hold.left
            hold.rounds, hold.left, hold.closed = hold.rounds - hold.left, 0, True
        else:
            attempt = self.attempts[values["of"]]
            attempt.state = state
            if state == "committed":
                attempt.released = values["released"]
                self.answered[attempt.run, attempt.purpose, attempt.round, attempt.request] = attempt.nonce
            elif state == "refunded":
                self._give_back(attempt)

    def _give_back(self, attempt: Attempt) -> None:
        hold = self.holds[attempt.run, attempt.purpose]
        if hold.closed:
            self.cohorts[hold.cohort].charges[hold.event] -= 1
            hold.rounds -= 1
        else:
            hold.left += 1


def _budget(values: dict[str, Any]) -> Budget:
    return Budget(epsilon=values["epsilon"], delta=values["delta"], order=values["filter"]["renyi_order"])
