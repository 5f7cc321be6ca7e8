"""What a ledger says, for those who answer for it: one mapping, which page, text and `--json` print.

Every epsilon in it is rounded up to hundredths, what is left is rounded down, so that the three show the same figure
and none shows less than was spent.
"""

import math
import shlex
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from fedmed.privacy.account import Account, Attempt, Cohort, Hold
from fedmed.privacy.budget import Budget, Charges, pld_epsilon
from fedmed.privacy.chain import START, Entry
from fedmed.privacy.in_words import belief_in_words, round_up

UNIT = "patient"
ADJACENCY = "add or remove one patient with all of its records"
POLICY = "the site's policy"


def statement(entries: Iterable[Entry]) -> dict[str, Any]:
    """What was allowed, spent, promised and released, and who decided it, as plain values; times are in UTC.

    A round counts as spent from its reservation on, whatever became of it, unless it was refunded. The mapping
    depends on the entries alone.

    Args:
        entries: a whole ledger, oldest first, as it was checked when it was opened.
    """
    tally = Tally()
    for entry in entries:
        tally.take(entry)
    account = tally.account
    return {
        "site": account.site,
        "head": tally.last.hash,
        "entries": tally.last.number,
        "first": tally.first,
        "last": tally.time,
        "unit": UNIT,
        "adjacency": ADJACENCY,
        "cohorts": {name: _cohort(tally, cohort) for name, cohort in account.cohorts.items()},
        "runs": [_run(tally, *key, use) for key, use in tally.uses.items()],
        "released": [
            {"run": run, "purpose": purpose, **_group(found)}
            for (run, purpose), found in tally.releases.items()
        ],
        "outside": [
            {"run": run, "what": what, "approval": approval, **_group(found)}
            for (run, what, approval), found in tally.outside.items()
        ],
        "unfinished": [_named(attempt, tally.reserved[attempt.nonce]) for attempt in account.pending()],
        "refunds": tally.refunds,
        "returns": tally.returns,
        "decisions": tally.decisions,
        "waiting": [run for run in account.requests if tally.approval(run)["state"] == "waiting"],
        "next": _next(tally),
    }


@dataclass
class Use:
    """What became of the rounds that a run was promised for one purpose."""

    hold: Hold
    plan_rounds: int = 0
    promised: int = 0
    drawn: int = 0
    committed: int = 0
    returned: int = 0
    refunded: int = 0
    first: str = ""
    last: str = ""


@dataclass
class Tally:
    """What is counted while the entries are read; what they add up to is in `account`."""

    account: Account = field(default_factory=Account)
    last: Entry = START
    first: str | None = None
    time: str | None = None
    uses: dict[tuple[str, str], Use] = field(default_factory=dict)
    budgets: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    added: dict[str, dict[str, Any]] = field(default_factory=dict)
    spent: dict[str, Counter[str]] = field(default_factory=dict)
    series: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    reserved: dict[str, str] = field(default_factory=dict)
    releases: dict[tuple[str, str], list[dict[str, Any]]] = field(default_factory=dict)
    outside: dict[tuple[str, str, str], list[dict[str, Any]]] = field(default_factory=dict)
    refunds: list[dict[str, Any]] = field(default_factory=list)
    returns: list[dict[str, Any]] = field(default_factory=list)
    decisions: list[dict[str, Any]] = field(default_factory=list)
    decided: dict[str, dict[str, Any]] = field(default_factory=dict)

    def take(self, entry: Entry) -> None:
        """Count the next entry."""
        values = entry.values
        self.account.apply(values)
        self.last, self.time = entry, _time(values["time"])
        self.first = self.first or self.time
        who = {key: values[key] for key in ("by", "why") if key in values} | {"time": self.time}
        kind = values["kind"]
        if kind == "cohort":
            self.added[values["cohort"]] = who
            self.spent[values["cohort"]] = Counter()
            self.series[values["cohort"]] = []
            self.budgets[values["cohort"]] = []
        elif kind == "budget":
            order = values["filter"]["renyi_order"]
            self.budgets[values["cohort"]].append(
                {"epsilon": values["epsilon"], "delta": values["delta"], "order": order, **who}
            )
            self._mark(values["cohort"])
        elif kind == "decision":
            self.decided[values["run"]] = {"approved": values["approved"], **who}
            self.decisions.append({"run": values["run"], **self.decided[values["run"]]})
        elif kind == "outside":
            key = values["run"], values["what"], values["approval"]
            self.outside.setdefault(key, []).append({"time": self.time, "sha256": values["released"]})
        elif kind == "charge":
            self._charge(values, who)

    def _charge(self, values: dict[str, Any], who: dict[str, Any]) -> None:
        state, attempt = values["state"], self.account.attempts.get(values.get("of", values["nonce"]))
        key = (attempt.run, attempt.purpose) if attempt else (values["run"], values["purpose"])
        hold = self.account.holds[key]
        use = self.uses.setdefault(key, Use(hold))
        use.first, use.last = use.first or who["time"], who["time"]
        if state == "hold":
            use.promised += values["rounds"]
            use.plan_rounds = max(use.plan_rounds, hold.rounds)
        elif state == "returned":
            use.returned += values["rounds"]
            self.returns.append({"run": key[0], "purpose": key[1], "rounds": values["rounds"], **who})
        elif attempt is not None and state == "reserved":
            use.drawn += 1
            self.reserved[attempt.nonce] = who["time"]
            self._spend(hold, 1)
        elif attempt is not None and state == "refunded":
            use.refunded += 1
            self.refunds.append({**_named(attempt, who["time"]), **who})
            self._spend(hold, -1)
        elif attempt is not None and state == "committed":
            use.committed += 1
            self.releases.setdefault(key, []).append(
                {"time": who["time"], "round": attempt.round, "sha256": values["released"]}
            )

    def _spend(self, hold: Hold, rounds: int) -> None:
        self.spent[hold.cohort][hold.event] += rounds
        self._mark(hold.cohort)

    def _mark(self, cohort: str) -> None:
        """A point of the curve, where the figure is another one than before."""
        budget = self.account.cohorts[cohort].budget
        if budget is None:
            return
        point = {
            "time": self.time,
            "epsilon": round_up(budget.spent(self.spent[cohort])),
            "budget": budget.epsilon,
        }
        series = self.series[cohort]
        if not series or any(point[key] != series[-1][key] for key in ("epsilon", "budget")):
            series.append(point)

    def approval(self, run: str) -> dict[str, Any]:
        """Who let the run go on: a person, or the policy, which asks nobody."""
        decided, asked = self.decided.get(run), self.account.requests.get(run)
        if asked is not None and (
            decided is None or self.account.decisions[run]["what"].get("digest") != asked.get("digest")
        ):
            return {"state": "waiting", "by": None, "why": None, "time": None}
        if decided is None:
            return {"state": "not needed", "by": POLICY, "why": None, "time": None}
        who = {key: decided[key] for key in ("by", "why", "time")}
        return {"state": "approved" if decided["approved"] else "refused", **who}


def _cohort(tally: Tally, cohort: Cohort) -> dict[str, Any]:
    """A cohort's part: its budget, what is spent, promised and left of it, by the filter, PLD beside it."""
    changes, spent = tally.budgets[cohort.name], tally.spent[cohort.name]
    promised = sum(hold.left for hold in tally.account.holds.values() if hold.cohort == cohort.name)
    unfinished = sum(attempt.cohort == cohort.name for attempt in tally.account.pending())
    found = {
        "declared_size": cohort.declared_size,
        "added": tally.added[cohort.name],
        "budget": None,
        "changes": changes,
        "rounds_spent": spent.total(),
        "rounds_promised": promised,
        "attempts_unfinished": unfinished,
        "series": tally.series[cohort.name],
    }
    budget = cohort.budget
    if budget is None:
        return found
    both = _figures(budget, cohort.charges)
    # Whole hundredths: the budget less what is printed as spent, never more than the filter has left.
    left = math.floor((budget.epsilon - both["epsilon"]) * 100 + 1e-9) / 100
    return found | {
        "budget": changes[-1],
        "accountant": f"Renyi filter of order {budget.order}",
        "spent": _figures(budget, spent),
        "spent_and_promised": both,
        "left": max(0.0, left),
        "belief_at_budget": belief_in_words(budget.epsilon, UNIT),
    }


def _figures(budget: Budget, charges: Charges) -> dict[str, Any]:
    """What charges cost, by the accountant that binds and by PLD beside it, and what it means."""
    epsilon = budget.spent(charges)
    return {
        "epsilon": round_up(epsilon),
        "epsilon_pld": round_up(pld_epsilon(charges, delta=budget.delta)),
        "belief": belief_in_words(epsilon, UNIT),
    }


def _run(tally: Tally, run: str, purpose: str, use: Use) -> dict[str, Any]:
    """A run's part. PLD holds for a plan that was fixed in advance, so that it charges the whole plan, wherever the
    run stopped (rule 11)."""
    budget = tally.account.cohorts[use.hold.cohort].budget
    # Where something is promised there is a budget: the ledger promises nothing without.
    assert budget is not None
    return {
        "run": run,
        "purpose": purpose,
        "cohort": use.hold.cohort,
        "plan_rounds": use.plan_rounds,
        "promised": use.promised,
        "drawn": use.drawn,
        "committed": use.committed,
        "returned": use.returned,
        "refunded": use.refunded,
        "not_drawn": use.hold.left,
        "epsilon": round_up(pld_epsilon({use.hold.event: use.plan_rounds}, delta=budget.delta)),
        "delta": budget.delta,
        "accountant": "PLD",
        "first": use.first,
        "last": use.last,
        "approval": tally.approval(run),
    }


def _group(releases: list[dict[str, Any]]) -> dict[str, Any]:
    first, last = releases[0]["time"], releases[-1]["time"]
    return {"count": len(releases), "first": first, "last": last, "releases": releases}


def _named(attempt: Attempt, time: str) -> dict[str, Any]:
    named = {"entry": attempt.nonce, "run": attempt.run, "purpose": attempt.purpose, "round": attempt.round}
    return {**named, "state": attempt.state, "time": time}


def _next(tally: Tally) -> list[dict[str, str]]:
    """What a person would do next, each with the command; none where all is in order."""
    account, found = tally.account, []
    if not account.cohorts:
        command = "fedmed privacy cohort add default --declared-size N"
        found.append({"reason": "no cohort is named: no run can be promised a budget", "command": command})
    for cohort in account.cohorts.values():
        if cohort.budget is None:
            command = f'fedmed privacy budget set {shlex.quote(cohort.name)} --epsilon NUMBER --why "…"'
            found.append(
                {"reason": f"cohort '{cohort.name}' has no budget: no run can draw on it", "command": command}
            )
    for run in account.requests:
        if tally.approval(run)["state"] == "waiting":
            command = f'fedmed site approve DIR {shlex.quote(run)} --why "…"'
            found.append({"reason": f"run '{run}' waits for a person (or: site refuse)", "command": command})
    if not (found or tally.uses or account.requests or tally.outside):
        reason = "no run has asked for anything yet; what one may ask"
        found.append({"reason": reason, "command": "fedmed site policy DIR"})
    return found


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")
