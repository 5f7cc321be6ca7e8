"""`fedmed privacy`: what a site's privacy officer does with cohorts, budgets and the ledger."""

import contextlib
import getpass
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from clients.cli import By, Why
from fedmed.cli.privacy import app as privacy

if TYPE_CHECKING:
    from clients.guard import Guard

cohort = typer.Typer(no_args_is_help=True, rich_markup_mode=None)
budget = typer.Typer(no_args_is_help=True, rich_markup_mode=None)

Site = Annotated[
    Path,
    typer.Option("--site", envvar="FEDMED_SITE", metavar="DIR", help="The site's folder; else FEDMED_SITE."),
]
HERE = Path()

COHORT_HELP = """Name the groups of patients who share one budget.

\b
Examples:
  fedmed privacy cohort add default --declared-size 1200 --site /srv/fedmed
"""

ADD_HELP = """Add a cohort: patients who share one budget for good.

They share it over all runs, and over all later versions of their data.

The declared size is a public number, such as a published yearly count: nobody counts records for it.

\b
Examples:
  fedmed privacy cohort add default --declared-size 1200 --site /srv/fedmed
"""

BUDGET_HELP = """Set what a cohort may spend.

\b
Examples:
  fedmed privacy budget set default --epsilon 6 --delta 1e-5 --why "board of 3 May" --site /srv/fedmed
"""

SET_HELP = """Set a cohort's budget, or change its epsilon. Delta stays for the cohort's lifetime.

What may be spent is decided by a Renyi filter, whose order is fixed with the first budget; epsilon by PLD is shown
beside it. A budget below what was spent stops every new run.

\b
Examples:
  fedmed privacy budget set default --epsilon 6 --delta 1e-5 --why "board of 3 May" --site /srv/fedmed
  fedmed privacy budget set default --epsilon 8 --why "board of 7 June: second study"
"""

REFUND_HELP = """Take back a reservation whose process never opened data.

What opened data stays spent: a failure is an output as well.

\b
Examples:
  fedmed privacy refund 3f1c… --why "power cut before training" --site /srv/fedmed
"""

RETURN_HELP = """Give back what a run was promised and will never use.

\b
Examples:
  fedmed privacy return demo-1f2e3d4c5b6a --why "the coordinator gave it up" --site /srv/fedmed
"""

VERIFY_HELP = """Check every entry of the ledger, and the receipts sent out.

Hashes, order, signatures and sums are computed anew.

Exit codes: 0 nothing is wrong, 1 an entry is wrong (the first is named), 2 it cannot be read.

\b
Examples:
  fedmed privacy verify --site /srv/fedmed
  fedmed privacy verify --site /srv/fedmed --receipts runs/20261122-101500-demo
  fedmed privacy verify --site /srv/fedmed --json
"""

REPORT_HELP = """Report what was allowed, spent and released, to be signed.

What is still promised, and who decided what, stands there too.

Every entry is checked first; a ledger in which one is wrong is not reported on (exit code 1).

\b
Examples:
  fedmed privacy report --site /srv/fedmed
  fedmed privacy report --site /srv/fedmed --html statement.html    one page to print and sign
  fedmed privacy report --site /srv/fedmed --json > statement.json  with every release
"""


def add_commands(root: typer.Typer) -> None:
    """Add the officer's commands to `fedmed privacy`."""
    del root
    privacy.add_typer(cohort, name="cohort", help=COHORT_HELP)
    privacy.add_typer(budget, name="budget", help=BUDGET_HELP)
    privacy.command("refund", help=REFUND_HELP)(refund)
    privacy.command("return", help=RETURN_HELP)(give_back)
    privacy.command("verify", help=VERIFY_HELP)(verify_command)
    privacy.command("report", help=REPORT_HELP)(report)


@contextlib.contextmanager
def opened(folder: Path) -> Iterator["Guard"]:
    """The site's folder and ledger, closed again afterwards."""
    from clients.folder import LEDGER, SiteFolder
    from clients.guard import Guard
    from fedmed.privacy.ledger import Ledger

    site = SiteFolder.open(named(folder))
    ledger = Ledger(site.path / LEDGER, site)
    try:
        yield Guard(site, ledger)
    finally:
        ledger.close()


def named(folder: Path) -> Path:
    """The site's folder; refused where nobody named one and the shell's folder is none."""
    from clients.folder import POLICY
    from fedmed.errors import ConfigError

    if folder == HERE and not (folder / POLICY).exists():
        raise ConfigError(
            "--site: none named, and this folder is no site; add --site DIR, or set FEDMED_SITE"
        )
    return folder


def person(by: str | None) -> str:
    """Who takes a decision."""
    return by or getpass.getuser()


@cohort.callback()
def _cohort() -> None:
    """Cohorts."""


@cohort.command("add", help=ADD_HELP)
def add(
    name: Annotated[str, typer.Argument(metavar="NAME", hidden=True)],
    declared_size: Annotated[int, typer.Option(metavar="N", help="A public number of patients.")],
    site: Site = HERE,
    by: By = None,
) -> None:
    """Write the cohort into the ledger."""
    with opened(site) as guard:
        guard.ledger.add_cohort(name, declared_size=declared_size, by=person(by))
    typer.echo(f"cohort '{name}': declared size {declared_size}")
    typer.echo(f"next: fedmed privacy budget set {name} --epsilon … --why …", err=True)


@budget.callback()
def _budget() -> None:
    """Budgets."""


@budget.command("set", help=SET_HELP)
def set_budget(
    name: Annotated[str, typer.Argument(metavar="COHORT", hidden=True)],
    epsilon: Annotated[float, typer.Option(metavar="NUMBER", help="What all runs together may spend.")],
    why: Why,
    delta: Annotated[
        float | None,
        typer.Option(
            metavar="NUMBER", help="[default: min(1e-5, 1 / (10 x declared size))]", show_default=False
        ),
    ] = None,
    site: Site = HERE,
    by: By = None,
) -> None:
    """Hold it against site.yaml, write it into the ledger, print what is left."""
    from fedmed.errors import require
    from fedmed.privacy.budget import divergence

    with opened(site) as guard:
        most = guard.folder.policy
        require(
            epsilon <= most.epsilon_total,
            "--epsilon",
            epsilon,
            f"at most epsilon_total={most.epsilon_total:g} of site.yaml",
        )
        require(
            delta is None or 0 < delta <= most.delta_total,
            "--delta",
            delta,
            f"above 0, at most delta_total={most.delta_total:g} of site.yaml",
        )
        made = guard.ledger.set_budget(name, epsilon=epsilon, delta=delta, by=person(by), why=why)
        charges = guard.ledger.account.cohort(name).charges
    typer.echo(
        f"cohort '{name}': epsilon {made.epsilon:g} at delta {made.delta:g}, by a Renyi filter of order {made.order}; "
        f"spent or promised: {100 * divergence(charges, made.order) / made.limit:.1f}% of it"
    )


def refund(
    entry: Annotated[str, typer.Argument(metavar="ENTRY", hidden=True)],
    why: Why,
    site: Site = HERE,
    by: By = None,
) -> None:
    """Write the refund into the ledger."""
    with opened(site) as guard:
        guard.ledger.refund(entry, by=person(by), why=why)
    typer.echo(f"refunded: {entry}")


def give_back(
    run: Annotated[str, typer.Argument(metavar="RUN", hidden=True)],
    why: Why,
    site: Site = HERE,
    by: By = None,
) -> None:
    """End the run here."""
    from fedmed.privacy.account import BudgetError

    with opened(site) as guard:
        if not guard.ledger.account.open_holds(run):
            raise BudgetError(f"run '{run}': nothing is promised to it; see: fedmed privacy report")
        left = guard.ledger.end(run, by=person(by), why=why)
    typer.echo(f"run '{run}': {left} round(s) given back")


def verify_command(
    site: Site = HERE,
    receipts: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="RUN_DIR", help="A run's folder at the coordinator, or its receipts.jsonl; repeatable."
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Check, print, end with 1 where something is wrong."""
    from clients.folder import LEDGER, SiteFolder, verify
    from fedmed.privacy.verify import verify as verify_ledger

    folder = SiteFolder.open(named(site))
    heads = [head for path in receipts or [] for head in _heads(path, folder.policy.name)]

    def progress(done: int, total: int) -> None:
        if sys.stderr.isatty() and (done % 100 == 0 or done == total):
            print(
                f"\r\x1b[K{done} of {total}",
                end="" if done < total else "\r\x1b[K",
                file=sys.stderr,
                flush=True,
            )

    verdict = verify_ledger(
        folder.path / LEDGER,
        verifies=lambda data, signature: verify(folder.public_key, data, signature),
        receipts=heads,
        progress=progress,
    )
    if as_json:
        values = {"ok": verdict.ok, "entries": verdict.entries, "first_bad_entry": verdict.bad,
                  "reason": verdict.reason, "receipts": len(heads)}  # fmt: skip
        typer.echo(json.dumps(values, indent=2))
    elif verdict.ok:
        typer.echo(f"{verdict.entries} entries, {len(heads)} receipts: nothing is wrong")
        if not heads:
            typer.echo("without receipts a cut-off end would not show: --receipts RUN_DIR", err=True)
    else:
        typer.echo(f"entry {verdict.bad} is wrong: {verdict.reason}")
    if not verdict.ok:
        raise typer.Exit(1)


def _heads(path: Path, site: str) -> list[str]:
    """The receipts of a site in a run's folder, oldest first."""
    from fedmed.errors import ConfigError

    file = path / "receipts.jsonl" if path.is_dir() else path
    try:
        entries = [json.loads(line) for line in file.read_text().splitlines()]
        heads = [entry["head"] for entry in entries if entry["site"] == site]
        if not all(isinstance(head, str) for head in heads):
            raise TypeError("a head is a hash")
        return heads
    except OSError as error:
        raise ConfigError(
            f"--receipts {path}: cannot be read ({error.strerror}); expected a run's folder, e.g. "
            "runs/20261122-101500-demo"
        ) from None
    except (ValueError, KeyError, TypeError):
        raise ConfigError(f"--receipts {path}: is no receipts.jsonl of a run") from None


def report(
    site: Site = HERE,
    html: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write a page to print and sign; print its path.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Check the ledger, then print what it says, or write it to a page."""
    from clients.folder import LEDGER, verify
    from fedmed.errors import ConfigError
    from fedmed.privacy.statement import statement
    from fedmed.privacy.verify import verify as verify_ledger
    from fedmed.report.officer import write_statement
    from fedmed.report.officer_text import as_text

    # os.path: a name that is too long is no folder, and raises nothing.
    if html is not None and os.path.isdir(html):
        raise ConfigError(f"--html {html}: is a folder; expected a file, e.g. {html / 'statement.html'}")
    if html is not None and not html.absolute().parent.is_dir():
        raise ConfigError(f"--html {html}: no folder '{html.parent}' to write it to")
    with opened(site) as guard:
        key = guard.folder.public_key
        verdict = verify_ledger(
            guard.folder.path / LEDGER, verifies=lambda data, signature: verify(key, data, signature)
        )
        if not verdict.ok:
            typer.echo(f"entry {verdict.bad} is wrong: {verdict.reason}; restore a backup", err=True)
            raise typer.Exit(1)
        values = statement(guard.ledger.entries())
    if html is not None:
        try:
            write_statement(values, html)
        except OSError as error:
            raise ConfigError(f"--html {html}: cannot be written ({error.strerror})") from None
    if as_json:
        typer.echo(json.dumps(values, indent=2, allow_nan=False, ensure_ascii=False))
    else:
        typer.echo(html if html is not None else as_text(values))
