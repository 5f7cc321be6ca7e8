"""`fedmed coordinator`: make one, admit sites, renew certificates. Heavy imports wait until a command runs."""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from strategies.coordinator.folder import CoordinatorFolder

COORDINATOR_HELP = """Coordinate a consortium of sites on other machines.

A coordinator is a folder: coordinator.yaml, its certificate authority, the sites that it admitted, its runs and logs.
DIR is this folder unless a command names another one or FEDMED_COORDINATOR does.

\b
Examples:
  fedmed coordinator init /srv/hub --name hub --host hub.example.org --host 10.1.2.3
  fedmed coordinator admit mercy.pub --coordinator /srv/hub
  fedmed coordinator start /srv/hub
  fedmed run federation=consortium federation.coordinator=/srv/hub experiment=demo
"""

INIT_HELP = """Make a coordinator in DIR, a new or an empty folder.

It gets a certificate authority of its own, a server certificate for the hosts by which sites reach it, new secrets and
a coordinator.yaml in which every option stands with what it means. Give ca.pem to the sites; keep all else. Back the
folder up where nobody else can read it.

\b
Examples:
  fedmed coordinator init /srv/hub --name hub --host hub.example.org
  fedmed coordinator init hub --name hub --host 10.1.2.3 --host hub.lan --port 9443
  fedmed coordinator init hub --name "on this machine" --host 127.0.0.1
"""

ADMIT_HELP = """Admit a site by its public key.

`fedmed site init` writes it to NAME.pub. Ask the site by another way than the file's whether the key is its own.

\b
Examples:
  fedmed coordinator admit mercy.pub --coordinator /srv/hub
  fedmed coordinator admit key.pub --name "St. Mary's" --coordinator /srv/hub
"""

EXPEL_HELP = """Expel a site: from now on its key is refused, for good.

It can come back only with the key of a new folder.

\b
Examples:
  fedmed coordinator expel mercy --coordinator /srv/hub
"""

ROTATE_HELP = """Make a new server certificate, without losing a run.

A running coordinator takes it up. With --ca also a new authority. While it changes, sites with the old ca.pem and
sites with the new one are both accepted: give the new ca.pem to each site, then end the change.

\b
Examples:
  fedmed coordinator rotate /srv/hub                        every year, or after a change of hosts
  fedmed coordinator rotate /srv/hub --ca                   a new authority
  fedmed coordinator rotate /srv/hub --end-transition       once every site has the new ca.pem
"""

START_HELP = """Run the coordinator: SuperLink, MLflow, runs. Ctrl-C ends it; runs go on with the next start.

Runs that a crash cut off go on by themselves, those that a person stopped do not. On a terminal it shows sites and
runs; elsewhere it prints a line for each change. The log is DIR/logs/coordinator.jsonl.

\b
Examples:
  fedmed coordinator start /srv/hub
  fedmed coordinator start /srv/hub --detach                    in the background; end it with: fedmed coordinator stop
  fedmed coordinator start hub --insecure-for-testing           no TLS; refused unless it listens on 127.0.0.1
"""

STOP_HELP = """End the coordinator that runs in DIR. Runs under way go on with the next start.

\b
Examples:
  fedmed coordinator stop /srv/hub
"""

STATUS_HELP = """Show sites, runs and servers, and what should be done.

\b
Examples:
  fedmed coordinator status /srv/hub
  fedmed coordinator status /srv/hub --json
"""

SERVICE_HELP = """Print a systemd unit for the coordinator.

\b
Examples:
  fedmed coordinator service /srv/hub > /etc/systemd/system/fedmed-coordinator.service
"""

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None)

# Hidden: described in the help's text.
Folder = Annotated[Path, typer.Argument(metavar="[DIR]", envvar="FEDMED_COORDINATOR", hidden=True)]
Coordinator = Annotated[
    Path,
    typer.Option(
        "--coordinator", metavar="DIR", envvar="FEDMED_COORDINATOR", help="The coordinator's folder."
    ),
]
HERE = Path()


def add_commands(root: typer.Typer) -> None:
    """Add the coordinator's commands to the root command."""
    root.add_typer(app, name="coordinator")


@app.callback(help=COORDINATOR_HELP)
def coordinator() -> None:
    """Coordinate a consortium."""


@app.command("init", help=INIT_HELP)
def init(
    folder: Folder,
    name: Annotated[str, typer.Option(metavar="NAME", help="The coordinator's name, for people.")],
    host: Annotated[
        list[str], typer.Option(metavar="HOST", help="A DNS name or IP address that sites use; repeatable.")
    ],
    port: Annotated[int, typer.Option(metavar="PORT", help="The port that sites reach.")] = 9092,
    listen: Annotated[
        str, typer.Option(metavar="ADDRESS", help="The address of this machine to answer on; 0.0.0.0: all.")
    ] = "0.0.0.0",
) -> None:
    """Make the folder, say what to do next."""
    from strategies.coordinator.config import CoordinatorConfig
    from strategies.coordinator.folder import CONFIG, TRUSTED, CoordinatorFolder, command

    made = CoordinatorFolder.init(folder, CoordinatorConfig(name=name, hosts=host, port=port, listen=listen))
    typer.echo(f"coordinator '{made.config.name}': {made.path}")
    typer.echo(f"options: {made.path / CONFIG}", err=True)
    typer.echo(f"for the sites: {made.path / TRUSTED}, and the address {host[0]}:{port}", err=True)
    typer.echo(f"next: fedmed coordinator admit SITE.pub --coordinator {made.path}", err=True)
    typer.echo(f"then: {command('start', made.path)}", err=True)


@app.command("admit", help=ADMIT_HELP)
def admit(
    file: Annotated[Path, typer.Argument(metavar="FILE", hidden=True)],
    name: Annotated[
        str | None, typer.Option(metavar="NAME", help="The site's name, in place of the file's.")
    ] = None,
    coordinator: Coordinator = HERE,
) -> None:
    """Write the admission down, tell the SuperLink."""
    from strategies.coordinator.admissions import Admissions
    from strategies.coordinator.folder import CoordinatorFolder

    opened = CoordinatorFolder.open(coordinator)
    admitted = Admissions(opened.path).admit(file, name)
    typer.echo(f"site '{admitted}': admitted{_tell(opened)}")


@app.command("expel", help=EXPEL_HELP)
def expel(
    name: Annotated[str, typer.Argument(metavar="NAME", hidden=True)], coordinator: Coordinator = HERE
) -> None:
    """Write it down, tell the SuperLink."""
    from strategies.coordinator.admissions import Admissions
    from strategies.coordinator.folder import CoordinatorFolder

    opened = CoordinatorFolder.open(coordinator)
    Admissions(opened.path).expel(name)
    typer.echo(f"site '{name}': expelled{_tell(opened)}")


def _tell(folder: "CoordinatorFolder") -> str:
    """Tell the running SuperLink who is admitted; what to say of it."""
    from strategies.coordinator.admissions import Admissions, reconcile
    from strategies.coordinator.link import control

    if folder.running() is None:
        return "; it holds from the next start on"
    problems = [
        line for line in reconcile(Admissions(folder.path).read(), control(folder)) if "not admitted" in line
    ]
    return f", but {'; '.join(problems)}" if problems else ""


@app.command("rotate", help=ROTATE_HELP)
def rotate(
    folder: Folder = HERE,
    ca: Annotated[
        bool, typer.Option("--ca", help="A new authority too; give its ca.pem to the sites.")
    ] = False,
    end_transition: Annotated[
        bool, typer.Option("--end-transition", help="Let the authority before the present one go.")
    ] = False,
) -> None:
    """Issue, write, say until when."""
    from fedmed.errors import ConfigError
    from strategies.coordinator.folder import TRUSTED, CoordinatorFolder, command

    if ca and end_transition:
        raise ConfigError("--ca with --end-transition: expected one of them; sites come between the two")
    opened = CoordinatorFolder.open(folder)
    authority = opened.authority()
    if ca:
        if authority.former is not None:
            raise ConfigError(
                f"--ca: the authority is changing already; first: {command('rotate', opened.path, '--end-transition')}"
            )
        authority = authority.successor(opened.config.name)
    opened.renew(authority.alone() if end_transition else authority)
    until, hosts = opened.certificate()
    typer.echo(f"server certificate: valid until {until:%Y-%m-%d}, for {', '.join(hosts)}")
    if ca:
        typer.echo(f"give each site the new {opened.path / TRUSTED}; the old one works until then", err=True)
        typer.echo(f"then: {command('rotate', opened.path, '--end-transition')}", err=True)


@app.command("start", help=START_HELP)
def start(
    folder: Folder = HERE,
    detach: Annotated[bool, typer.Option("--detach", help="In the background, once it answers.")] = False,
    insecure: Annotated[
        bool, typer.Option("--insecure-for-testing", help="Without TLS, on loopback alone.")
    ] = False,
) -> None:
    """Supervise until a signal."""
    from strategies.coordinator.folder import CoordinatorFolder

    opened = CoordinatorFolder.open(folder)
    from strategies.coordinator.foreground import detached, in_foreground

    if detach:
        typer.echo(detached(opened, insecure=insecure))
    else:
        in_foreground(opened, insecure=insecure)


@app.command("stop", help=STOP_HELP)
def stop(folder: Folder = HERE) -> None:
    """Ask its process to end, wait for that."""
    from strategies.coordinator.folder import CoordinatorFolder
    from strategies.coordinator.foreground import end

    opened = CoordinatorFolder.open(folder)
    end(opened)
    typer.echo(f"coordinator '{opened.config.name}': ended")


@app.command("status", help=STATUS_HELP)
def status(
    folder: Folder = HERE,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Ask the SuperLink, read the folder, print both."""
    from strategies.console import plain_console
    from strategies.coordinator.folder import CoordinatorFolder
    from strategies.coordinator.link import nodes
    from strategies.coordinator.snapshot import snapshot, view

    opened = CoordinatorFolder.open(folder)
    values = snapshot(opened, nodes(opened))
    if as_json:
        typer.echo(json.dumps(values, indent=2, allow_nan=False))
    else:
        plain_console().print(view(values))


@app.command("service", help=SERVICE_HELP)
def service(folder: Folder = HERE) -> None:
    """Print the unit."""
    from strategies.coordinator.folder import CoordinatorFolder
    from strategies.coordinator.service import unit

    opened = CoordinatorFolder.open(folder)
    sys.stdout.write(unit(opened.path, opened.config.name))
