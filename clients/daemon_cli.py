"""`fedmed site start` and what belongs to it. Heavy imports wait until a command runs."""

import json
from pathlib import Path
from typing import Annotated

import typer

START_HELP = """Serve the coordinator that site.yaml names.

One process a folder. It keeps models and prepared data between rounds and runs, reconnects by itself, and takes up a
changed site.yaml with the next message. Its log is one JSON object a line, on standard error. SIGTERM and Ctrl-C end it
after the message that it is at; a second one at once.

\b
Examples:
  fedmed site start /srv/fedmed
  fedmed site start /srv/fedmed --log /var/log/fedmed.jsonl
  fedmed site start sites/a --insecure-for-testing    # a coordinator on this machine, without TLS
"""

STATUS_HELP = """Ask the daemon of the site in DIR how it is.

Exit codes: 0 in contact with its coordinator, 1 not (the last line says what to do).

\b
Examples:
  fedmed site status /srv/fedmed
  fedmed site status /srv/fedmed --json
"""

PAUSE_HELP = """Take no new runs, or take them again.

Runs that were promised their budget go on. Others are refused before any data is opened, and their coordinator is told
`paused`; so are runs that are NOT PRIVATE, which no budget was promised to.

\b
Examples:
  fedmed site pause /srv/fedmed
  fedmed site pause /srv/fedmed --resume
"""

SERVICE_HELP = """Print a systemd unit for the daemon of the site in DIR.

It runs as this account, sees the system read-only and writes to DIR alone.

\b
Examples:
  fedmed site service /srv/fedmed | sudo tee /etc/systemd/system/fedmed-site.service
"""

CHECK_HELP = """Check what the site in DIR needs.

Each line is OK, or says what to do. The folder, the policy, the data, the models, memory, disk, clock and network;
and one round of training on the site's own data, in a process of its own. Nothing of that round is sent or kept, so
that it costs no budget.

Exit codes: 0 all is well, 1 something is to be done.

\b
Examples:
  fedmed site check /srv/fedmed
  fedmed site check /srv/fedmed --json
"""

# Hidden: described in the help's text, where Typer 0.20 under click 8.5 would lose its line.
Folder = Annotated[Path, typer.Argument(metavar="DIR", hidden=True)]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
Insecure = Annotated[
    bool, typer.Option("--insecure-for-testing", help="Without TLS; only to a coordinator on this machine.")
]


def add_commands(site: typer.Typer) -> None:
    """Add what concerns a site's daemon to `fedmed site`."""
    site.command("start", help=START_HELP)(start)
    site.command("status", help=STATUS_HELP)(status)
    site.command("pause", help=PAUSE_HELP)(pause)
    site.command("service", help=SERVICE_HELP)(service)
    site.command("check", help=CHECK_HELP)(check)


def start(
    folder: Folder,
    insecure: Insecure = False,
    log: Annotated[
        Path | None, typer.Option("--log", metavar="FILE", help="Write the log there; it may be rotated.")
    ] = None,
) -> None:
    """Become the daemon."""
    import clients.start

    clients.start.start(folder, insecure=insecure, log_file=log)


def status(folder: Folder, as_json: AsJson = False) -> None:
    """Ask, print."""
    import clients.status
    from clients.folder import SiteFolder

    SiteFolder.open(folder)
    values = clients.status.status(folder)
    typer.echo(json.dumps(values, indent=2) if as_json else clients.status.in_words(folder, values))
    if not clients.status.is_well(values):
        raise typer.Exit(1)


def pause(
    folder: Folder,
    resume: Annotated[bool, typer.Option("--resume", help="Take new runs again.")] = False,
) -> None:
    """Write, or remove, the file that says so."""
    from clients.folder import SiteFolder
    from clients.pause import set_paused

    site = SiteFolder.open(folder)
    set_paused(folder, not resume)
    said = "takes new runs" if resume else "paused: new runs are refused, those under way go on"
    typer.echo(f"site '{site.policy.name}': {said}")


def service(folder: Folder) -> None:
    """Print the unit."""
    import getpass
    import shutil
    import sys

    from clients.folder import SiteFolder
    from clients.service import unit
    from fedmed.data.split import fedmed_home
    from fedmed.errors import ConfigError

    site = SiteFolder.open(folder)
    command = shutil.which("fedmed", path=str(Path(sys.executable).parent)) or shutil.which("fedmed")
    if command is None:
        raise ConfigError(
            "fedmed: no such command on the PATH; activate the environment that it is installed in"
        )
    text = unit(
        folder.resolve(), name=site.policy.name, user=getpass.getuser(), command=Path(command).absolute(),
        home=fedmed_home().absolute(), directory=Path.cwd(),
    )  # fmt: skip
    typer.echo(text, nl=False)


def check(folder: Folder, as_json: AsJson = False) -> None:
    """Look, print each line as soon as it is known."""
    import clients.check
    from clients.finding import Finding

    found: list[Finding] = []
    for finding in clients.check.check(folder):
        found.append(finding)
        if not as_json:
            typer.echo(finding.line)
    well = all(finding.ok for finding in found)
    if as_json:
        lines = [{"what": one.what, "ok": one.ok, "says": one.says} for one in found]
        typer.echo(json.dumps({"ok": well, "findings": lines}, indent=2))
    if not well:
        raise typer.Exit(1)
