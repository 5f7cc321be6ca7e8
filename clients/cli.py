"""`fedmed site`: a folder, its policy, and runs that wait for a person. Heavy imports wait until a command runs."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from clients.daemon_cli import add_commands as add_daemon_commands
from clients.data import add_commands as add_data_commands

if TYPE_CHECKING:
    from clients.policy import Policy

SITE_HELP = """Make a site, show what it allows, decide on runs.

A site is a folder: site.yaml (what runs may ask of it), its secret split key and its signing identity.

\b
Examples:
  fedmed site init /srv/fedmed --name mercy
  fedmed site policy /srv/fedmed
  fedmed site check /srv/fedmed
  fedmed site start /srv/fedmed
  fedmed site requests /srv/fedmed
  fedmed site approve /srv/fedmed demo-1f2e3d4c5b6a --why "ethics vote 12/26"
"""

INIT_HELP = """Make a site in DIR, a new or an empty folder.

It gets new secrets and a site.yaml in which every option stands with its default and what it means. The defaults
allow no task: list in site.yaml what may be learned. Back the folder up where nobody else can read it: without its
key, test patients and training patients mix.

With --coordinator the site belongs to a consortium: its NAME.pub then lies in DIR, to be sent to the coordinator, who
admits the site by it. It holds no secret.

\b
Examples:
  fedmed site init /srv/fedmed --name mercy
  fedmed site init . --name "St. Mary's"
  fedmed site init /srv/fedmed --name mercy --coordinator fl.example.org:9092 --ca ca.pem
"""

POLICY_HELP = """Show the policy of the site in DIR, and mark its defaults.

\b
Examples:
  fedmed site policy /srv/fedmed
  fedmed site policy /srv/fedmed --json
"""

REQUESTS_HELP = """List the runs that were asked for.

Who asks, for what, what was decided: each with all that would leave the site, what the run would cost, and what it
would leave of the cohort's budget.

\b
Examples:
  fedmed site requests /srv/fedmed
  fedmed site requests /srv/fedmed --json
"""

APPROVE_HELP = """Approve a run, exactly as it was asked for.

A change of its settings asks for another approval.

\b
Examples:
  fedmed site approve /srv/fedmed demo-1f2e3d4c5b6a --why "ethics vote 12/26"
"""

REFUSE_HELP = """Refuse a run.

\b
Examples:
  fedmed site refuse /srv/fedmed demo-1f2e3d4c5b6a --why "no vote for this task"
"""

CACHE_HELP = """Show, or clear, what models made of the site's records.

The frozen part of a pretrained model is run once on each record. What it makes of them is kept in the site's folder, at
most activations_gb of site.yaml; clearing it loses nothing but the time to compute it again.

\b
Examples:
  fedmed site cache /srv/fedmed
  fedmed site cache /srv/fedmed --clear
"""

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None)

# Hidden: described in the help's text, where Typer 0.20 under click 8.5 would lose its line.
Folder = Annotated[Path, typer.Argument(metavar="DIR", hidden=True)]
Run = Annotated[str, typer.Argument(metavar="RUN", hidden=True)]


def reason(text: str) -> str:
    """A reason that says something: it stands in the ledger for good."""
    from fedmed.errors import require

    require(bool(text.strip()), "--why", repr(text), "a reason in words, for the record")
    return text


Why = Annotated[str, typer.Option(metavar="TEXT", help="The reason, for the record.", callback=reason)]
By = Annotated[str | None, typer.Option(metavar="NAME", help="Who decides; else this account's name.")]


def add_commands(root: typer.Typer) -> None:
    """Add this side's commands to the root command."""
    add_data_commands(app)
    add_daemon_commands(app)
    root.add_typer(app, name="site")


@app.callback(help=SITE_HELP)
def site() -> None:
    """Make a site, and show what it allows."""


@app.command("init", help=INIT_HELP)
def init(
    folder: Folder,
    name: Annotated[str, typer.Option(metavar="NAME", help="The site's name in the federation.")],
    coordinator: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="Of the consortium's coordinator.")
    ] = None,
    ca: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The coordinator's ca.pem, which is copied into DIR.")
    ] = None,
) -> None:
    """Make the folder, say what to do next."""
    from clients.coordinator import admission_name, given
    from clients.folder import POLICY, SiteFolder

    authority = given(coordinator, ca)
    made = SiteFolder.init(folder, name=name, coordinator=coordinator, ca=authority)
    typer.echo(f"site '{made.policy.name}': {made.path}")
    typer.echo(
        f"next: name in {made.path / POLICY} the data, its patient column, and the tasks and models that may be used",
        err=True,
    )
    if coordinator is not None:
        typer.echo(
            f"next: send {made.path / admission_name(name)} to the coordinator, who admits the site by it",
            err=True,
        )


@app.command("policy", help=POLICY_HELP)
def policy(
    folder: Folder,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Open the site, print what is in force."""
    from clients.folder import SiteFolder

    opened = SiteFolder.open(folder).policy
    typer.echo(_as_json(opened) if as_json else _as_text(opened))


@app.command("requests", help=REQUESTS_HELP)
def requests(
    folder: Folder,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Print every run that was asked for, and what became of it."""
    from clients.officer import opened
    from clients.request import forecast
    from clients.request_words import in_words

    with opened(folder) as guard:
        account, cohort = guard.ledger.account, guard.folder.policy.cohort
        found = {
            run: {
                **what,
                "forecast": forecast(account, cohort, run, what),
                "decision": _decision(account.decisions.get(run), what),
            }
            for run, what in account.requests.items()
        }
    if as_json:
        typer.echo(json.dumps(found, indent=2, allow_nan=False))
        return
    for run, what in found.items():
        typer.echo("\n".join(in_words(run, what)))
    if not found:
        typer.echo("no run was asked for")


def _decision(decision: "dict[str, Any] | None", what: "dict[str, Any]") -> str:
    if decision is None or decision["what"]["digest"] != what["digest"]:
        return "waiting"
    return f"{'approved' if decision['approved'] else 'refused'} by {decision['by']}: {decision['why']}"


@app.command("approve", help=APPROVE_HELP)
def approve(folder: Folder, run: Run, why: Why = "no reason given", by: By = None) -> None:
    """Write the approval into the ledger."""
    _decide(folder, run, approved=True, why=why, by=by)


@app.command("refuse", help=REFUSE_HELP)
def refuse(
    folder: Folder,
    run: Run,
    why: Why,
    by: By = None,
) -> None:
    """Write the refusal into the ledger."""
    _decide(folder, run, approved=False, why=why, by=by)


@app.command("cache", help=CACHE_HELP)
def cache(
    folder: Folder,
    clear: Annotated[bool, typer.Option("--clear", help="Remove all of it.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Count the entries and the bytes."""
    from clients.folder import SiteFolder
    from clients.guard import activations

    kept = activations(SiteFolder.open(folder))
    sizes = [path.stat().st_size for path in kept.entries()]
    if clear:
        kept.clear()
    found = {"entries": len(sizes), "bytes": sum(sizes), "most_bytes": kept.max_bytes, "cleared": clear}
    if as_json:
        typer.echo(json.dumps(found))
        return
    files = f"{len(sizes)} file{'s' if len(sizes) != 1 else ''} of {sum(sizes) / 1e9:.2f} GB"
    typer.echo(f"{files} removed" if clear else f"{files}; at most {kept.max_bytes / 1e9:g} GB are kept")


def _decide(folder: Path, run: str, *, approved: bool, why: str, by: str | None) -> None:
    from clients.officer import opened, person
    from fedmed.errors import ConfigError, nearest

    with opened(folder) as guard:
        waiting = guard.ledger.account.requests
        if run not in waiting:
            hint = nearest(run, waiting) if waiting else "nobody asked for a run"
            raise ConfigError(f"run '{run}': not asked for here; {hint}")
        guard.ledger.decide(run, approved=approved, by=person(by), why=why, what=waiting[run])
    typer.echo(f"{run}: {'approved' if approved else 'refused'}")


def _as_json(policy: "Policy") -> str:
    from clients.policy_file import option_values

    values = {
        key: {"value": value, "default": default} for key, (value, default) in option_values(policy).items()
    }
    return json.dumps(values, indent=2, allow_nan=False)


def _as_text(policy: "Policy") -> str:
    from clients.policy_file import option_values, plain

    lines = [
        (f"{key}: {plain(value)}", "default" if default else "set")
        for key, (value, default) in option_values(policy).items()
    ]
    # A list of models may be long; it does not push the marks of the others aside.
    width = max(len(text) for text, _ in lines if len(text) <= 60)
    return "\n".join(f"{text:<{width}}  # {mark}" for text, mark in lines)
