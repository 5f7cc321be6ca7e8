"""The privacy officer's page as lines of text, for a terminal."""

from collections.abc import Iterator, Mapping
from typing import Any

from fedmed.report.officer import claim, day
from fedmed.report.page import ranges

Values = Mapping[str, Any]


def as_text(statement: Values) -> str:
    """What the ledger says, in short. Whatever could steer a terminal is shown as a question mark."""
    lines = [*_head(statement)]
    for name, cohort in statement["cohorts"].items():
        lines += ["", *_cohort(statement, name, cohort)]
    lines += ["", *_runs(statement), "", *_left(statement), "", *_people(statement)]
    for step in statement["next"]:
        lines += [f"next: {step['reason']}", f"  {step['command']}"]
    printable = ("".join(c if c.isprintable() else "?" for c in line) for line in lines)
    return "\n".join(printable).rstrip()


def _head(statement: Values) -> Iterator[str]:
    yield (
        f"site '{statement['site']}': {statement['entries']} entries, {day(statement['first'])} to "
        f"{day(statement['last'])} (UTC)"
    )
    yield f"head  {statement['head']}"


def _cohort(statement: Values, name: str, cohort: Values) -> Iterator[str]:
    yield f"cohort '{name}', declared size {cohort['declared_size']}"
    budget = cohort["budget"]
    if budget is None:
        yield "  budget: none; nothing can be spent"
        return
    yield f"  every epsilon: {claim(statement, cohort)}"
    earlier = [f"before: {change['epsilon']:g}" for change in cohort["changes"][:-1]]
    who = "; ".join([f"set by {budget['by']}, {day(budget['time'])}: {budget['why']}", *earlier])
    rows = [("budget", budget["epsilon"], who)]
    for title, key, rounds in (
        ("spent", "spent", f"{cohort['rounds_spent']} rounds"),
        ("spent and promised", "spent_and_promised", f"{cohort['rounds_promised']} rounds not drawn yet"),
    ):
        pld = f"PLD of the same, if it had been fixed in advance: {cohort[key]['epsilon_pld']:.2f}"
        rows.append((title, cohort[key]["epsilon"], f"{rounds}; {pld}"))
    rows.append(("left", cohort["left"], "rounded down"))
    for title, figure, words in rows:
        yield f"  {title:<18} {figure:>6.2f}  {words}"
    if cohort["attempts_unfinished"]:
        yield f"  {cohort['attempts_unfinished']} attempt(s) reserved and not finished: they count as spent"
    yield f"  {cohort['spent_and_promised']['belief']}"


def _runs(statement: Values) -> Iterator[str]:
    yield "runs" if statement["runs"] else "runs: none was promised anything"
    for use in statement["runs"]:
        given = "".join(f", {use[key]} {key}" for key in ("returned", "refunded", "not_drawn") if use[key])
        yield f"  {use['run']}, {use['purpose']}, cohort '{use['cohort']}', {day(use['first'])} to {day(use['last'])}"
        yield (
            f"    rounds: {use['promised']} promised, {use['drawn']} drawn, {use['committed']} released"
            f"{given.replace('_', ' ')}"
        )
        yield (
            f"    epsilon {use['epsilon']:.2f} alone, as a plan of {use['plan_rounds']} rounds (unit: one "
            f"{statement['unit']}; {use['accountant']}, delta {use['delta']:g})"
        )
        yield f"    {approval_text(use['approval'])}"


def approval_text(approval: Values) -> str:
    """Who let a run go on, in words."""
    if approval["state"] == "not needed":
        return "allowed by the site's policy, which asks nobody"
    if approval["state"] == "waiting":
        return "waits for a person"
    return f"{approval['state']} by {approval['by']}, {day(approval['time'])}: {approval['why']}"


def _left(statement: Values) -> Iterator[str]:
    yield "what left the site, covered by epsilon" + ("" if statement["released"] else ": nothing")
    for group in statement["released"]:
        rounds = ranges(sorted({release["round"] for release in group["releases"]}))
        yield f"  {group['run']}, {group['purpose']}: {group['count']} release(s), round {rounds}"
    yield "OUTSIDE EVERY GUARANTEE" + ("" if statement["outside"] else ": nothing")
    for group in statement["outside"]:
        yield f"  {group['run']}: {group['what']}, {group['count']} time(s), allowed by {group['approval']}"


def _people(statement: Values) -> Iterator[str]:
    for refund in statement["refunds"]:
        where = f"{refund['run']}, {refund['purpose']}, round {refund['round']}"
        yield f"refunded: {where}, by {refund['by']}, {day(refund['time'])}: {refund['why']}"
    for attempt in statement["unfinished"]:
        where = f"{attempt['run']}, {attempt['purpose']}, round {attempt['round']}"
        yield f"not finished ({attempt['state']}, counts as spent): {where}, entry {attempt['entry']}"
    for decision in statement["decisions"]:
        said = "approved" if decision["approved"] else "refused"
        yield f"{said}: {decision['run']}, by {decision['by']}, {day(decision['time'])}: {decision['why']}"
