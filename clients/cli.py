"""`fedmed site`: a site's folder and its policy. Heavy imports wait until a command runs."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from clients.policy import Policy

SITE_HELP = """Make a site, and show what it allows.

A site is a folder: site.yaml (what runs may ask of it), its secret split key and its signing identity.

\b
Examples:
  fedmed site init /srv/fedmed --name mercy
  fedmed site policy /srv/fedmed
"""

INIT_HELP = """Make a site in DIR, a new or an empty folder.

It gets new secrets and a site.yaml in which every option stands with its default and what it means. The defaults
allow no task: list in site.yaml what may be learned. Back the folder up where nobody else can read it: without its
key, test patients and training patients mix.

\b
Examples:
  fedmed site init /srv/fedmed --name mercy
  fedmed site init . --name "St. Mary's"
"""

POLICY_HELP = """Show the policy of the site in DIR, and which of its values are defaults.

\b
Examples:
  fedmed site policy /srv/fedmed
  fedmed site policy /srv/fedmed --json
"""

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None)

# Hidden: described in the help's text, where Typer 0.20 under click 8.5 would lose its line.
Folder = Annotated[Path, typer.Argument(metavar="DIR", hidden=True)]


def add_commands(root: typer.Typer) -> None:
    """Add this side's commands to the root command."""
    root.add_typer(app, name="site")


@app.callback(help=SITE_HELP)
def site() -> None:
    """Make a site, and show what it allows."""


@app.command("init", help=INIT_HELP)
def init(
    folder: Folder,
    name: Annotated[str, typer.Option(metavar="NAME", help="The site's name in the federation.")],
) -> None:
    """Make the folder, say what to do next."""
    from clients.folder import POLICY, SiteFolder

    made = SiteFolder.init(folder, name=name)
    typer.echo(f"site '{made.policy.name}': {made.path}")
    typer.echo(f"next: list in {made.path / POLICY} the tasks and models that runs may use", err=True)


@app.command("policy", help=POLICY_HELP)
def policy(
    folder: Folder,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Open the site, print what is in force."""
    from clients.folder import SiteFolder

    opened = SiteFolder.open(folder).policy
    typer.echo(_as_json(opened) if as_json else _as_text(opened))


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
