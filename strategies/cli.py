"""`fedmed run` and `fedmed plan`. Heavy imports wait until every setting has been checked."""

import json
import os
import shlex
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedmed.cli.loading import loading
from fedmed.cli.privacy import app as privacy
from strategies.coordinator.cli import add_commands as add_coordinator
from strategies.coordinator.runs_cli import add_commands as add_runs
from strategies.officer import SWEEP_HELP, joint_cost

if TYPE_CHECKING:
    from fedmed.config import RunConfig

CLIENT_APP = "clients.client_app:app"

Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Settings, in Hydra's grammar.", show_default=False),
]

RUN_HELP = """Run a federation here, or with a coordinator's sites.

A setting is KEY=VALUE: a group's option (task, model, adapter, privacy, strategy, federation, tracking,
experiment) or a single value.

\b
Examples:
  fedmed run                                    heart disease, MiniLM, head, epsilon 3
  fedmed run experiment=demo                    the demo, every choice in one file
  fedmed run adapter=lora privacy.epsilon=1 strategy=fedadam rounds=20
  fedmed run privacy=off tracking=none          NOT PRIVATE, no MLflow
  fedmed run -m privacy.epsilon=1,3,8 seed=0,1  six runs, all checked before the first starts
  fedmed run task=csv task.declaration=mine.yaml
  fedmed run resume=runs/20261121-101500-run    go on after the last finished round
  fedmed run federation=consortium federation.coordinator=/srv/hub adapter=lora   at the sites that /srv/hub admitted

A sweep spends what all its runs spend. On anything but a public benchmark it says first how much that is, and asks.
"""

PLAN_HELP = """Show what a run would cost, and train nothing.

Epsilon, noise and steps of each site; bytes a round; seconds a step, measured here on made-up records. With a site's
ledger, which is only read: what its cohort has left, whether the run would fit, and if not, what would.

\b
Examples:
  fedmed plan privacy.epsilon=1 rounds=30
  fedmed plan experiment=demo --json
  fedmed plan experiment=demo --site-ledger=sites/Cleveland --site-ledger=sites/Hungary
  fedmed plan rounds=50 --site-ledger=sites/Cleveland/ledger.db --cohort=cardiology
"""


def add_commands(root: typer.Typer) -> None:
    """Add this side's commands to the root command."""
    settings = {"ignore_unknown_options": False}
    root.command("run", help=RUN_HELP, context_settings=settings)(run)
    root.command("plan", help=PLAN_HELP, context_settings=settings)(plan)
    privacy.command("sweep", help=SWEEP_HELP)(joint_cost)
    add_coordinator(root)
    add_runs(root)


def run(
    overrides: Overrides = None,
    multirun: Annotated[
        bool, typer.Option("-m", "--multirun", help="Sweep over comma-separated values.")
    ] = False,
    yes: Annotated[
        bool, typer.Option("--yes", help="With -m: start without being asked about the joint cost.")
    ] = False,
) -> None:
    """Compose, check, run."""
    from fedmed.compose import compose, compose_sweep
    from fedmed.errors import ConfigError

    texts = list(overrides or [])
    if not multirun:
        config = compose(texts)
        if config.federation.kind == "local" or config.resume:
            _check_folder(config)
        _warn(_check(config))
        (_run_local if config.federation.kind == "local" else _launch)(config, texts)
        return
    jobs = compose_sweep(texts)
    if any(config.federation.kind != "local" for _, config in jobs):
        raise ConfigError("--multirun with federation=consortium: expected one run at a time")
    _check_folder(jobs[0][1])
    _warn([warning for _, config in jobs for warning in _check(config)])
    from strategies.joint import announce

    announce([config for _, config in jobs], yes=yes)
    from strategies.sweep import run_sweep

    run_sweep(jobs, _run_local)


def plan(
    overrides: Overrides = None,
    site_ledger: Annotated[
        list[Path] | None,
        typer.Option(metavar="PATH", help="A site's folder, or its ledger.db, to compare with; repeatable."),
    ] = None,
    cohort: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="The cohort, where a ledger has several; repeatable."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Compose, check, forecast."""
    from fedmed.compose import compose
    from fedmed.errors import ConfigError

    if cohort and not site_ledger:
        raise ConfigError(f"--cohort {cohort[0]}: names a cohort of a ledger; add --site-ledger PATH")
    config = compose(list(overrides or []))
    _warn(_check(config, records=False))
    from strategies.budgets import compare, read_budgets

    budgets = read_budgets(site_ledger or [], cohorts=cohort or [], config=config) if site_ledger else []
    from strategies.forecast import forecast

    values = forecast(config)
    if budgets:
        values["ledgers"] = compare(config, budgets)
    if as_json:
        print(json.dumps(values, indent=2, allow_nan=False))
    else:
        from strategies.console import print_forecast

        print_forecast(values)


def _warn(warnings: Iterable[str]) -> None:
    for warning in dict.fromkeys(warnings):
        print(f"warning: {warning}", file=sys.stderr)


def _check(config: "RunConfig", *, records: bool = True) -> list[str]:
    """Everything that can be wrong with a run on this machine, before torch is loaded.

    Args:
        records: also read every site's records, whose split may make the site's key: what a plan must not do.

    Returns:
        What a person should know of the data: one sentence for each reason that left records out.
    """
    with loading():
        from fedmed.data.readers import check_site, sites_in
        from fedmed.errors import ConfigError
        from fedmed.model import ImageModelConfig
        from fedmed.models.loading import check_digest, locate, preprocessor_of
        from fedmed.privacy.histogram import metrics_plans
        from fedmed.privacy.plan import make_plan
        from fedmed.tracking import check

    if not config.task.trained:
        raise ConfigError(
            "task=sound: sounds are not trained on; their embeddings: fedmed embed task=sound model=hear …"
        )
    elsewhere = config.federation.kind == "consortium"
    # A run of a consortium goes on without MLflow, and its figures are sent later.
    check(config.tracking, reach=not elsewhere)
    _check_sites(config)
    # Only a site itself opens its data, and not before its policy and its budget allow it.
    by_sites = elsewhere or bool(config.federation.sites)
    records = records and not by_sites
    if not config.task.declared_sizes:
        # Their names are not listed: of a mistyped column they might be patient ids.
        found = "" if by_sites else f" names {len(sites_in(config.task))} sites"
        raise ConfigError(
            f"task.declared_sizes: none declared; {config.task.sites_from}{found}; declare a "
            f"public number of {config.task.unit}s for each site, e.g. 'task.declared_sizes={{A: 100, B: 80}}'"
            f"{config.task.propose}"
        )
    if config.model.pretrained:
        check_digest(config.model, locate(config.model))
    warnings = []
    if isinstance(config.model, ImageModelConfig):
        size = config.task.image_size
        larger = max(preprocessor_of(config.model).resampled(size, size))
        if larger > size:
            warnings.append(
                f"task.image_size={size}: images are enlarged to the {larger} pixels that the encoder reads; "
                f"task.image_size={larger} keeps their detail"
            )
    for site in config.task.declared_sizes:
        make_plan(config, site)
        if not records:
            continue
        manifest = check_site(config.task, site, seed=config.seed)
        warnings += [f"site '{site}': {warning}" for warning in manifest.warnings]
        left_out = manifest.quarantined.items()
        warnings += [f"site '{site}': {count} record(s) left out: {reason}" for reason, count in left_out]
    # Refused where it would not be worth its epsilon.
    metrics_plans(config.task, config.privacy)
    if by_sites:
        return warnings
    undeclared = {
        site: rows for site, rows in sites_in(config.task).items() if site not in config.task.declared_sizes
    }
    if undeclared:
        total = sum(undeclared.values())
        warnings.append(f"{total} record(s) left out: their site is not in task.declared_sizes")
    return warnings


def _check_sites(config: "RunConfig") -> None:
    """Whether each site of the run has its folder under `federation.sites`."""
    from fedmed.errors import ConfigError

    folder = config.federation.sites
    for site in config.task.declared_sizes if folder else ():
        path = Path(folder, site)
        if not (path / "site.yaml").is_file():
            raise ConfigError(
                f"federation.sites={folder}: no site in {path}; make it with: "
                f"{shlex.join(['fedmed', 'site', 'init', str(path), '--name', site])}"
            )


def _check_folder(config: "RunConfig") -> None:
    """Whether a new run's folder can be made and is empty, or an earlier run's can be read."""
    from fedmed.errors import ConfigError

    if config.resume:
        _check_resumable(config, config.resume)
        return
    name = config.run_dir or "runs"
    try:
        path = Path(name).absolute()
        if config.run_dir and (path / "config.json").exists():
            raise ConfigError(
                f"run_dir={name}: holds a run already; continue it with: fedmed run resume={name}"
            )
        if config.run_dir and path.is_dir() and any(path.iterdir()):
            # Tracking uploads what is in a run's folder.
            raise ConfigError(f"run_dir={name}: holds other files; expected a new or an empty folder")
        existing = next(folder for folder in (path, *path.parents) if folder.exists())
        if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
            raise ConfigError(f"run_dir={name}: {existing} is no folder that can be written to")
    except OSError as error:
        raise ConfigError(f"run_dir={name}: cannot be used ({error.strerror})") from None


def _check_resumable(config: "RunConfig", name: str) -> None:
    from safetensors import SafetensorError

    from fedmed.errors import ConfigError
    from strategies.folder import RunFolder

    folder = RunFolder(Path(name))
    try:
        whole = folder.plans().keys() == config.task.declared_sizes.keys()
        folder.rounds_sent()
        folder.load()
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError):
        whole = False
    if not whole:
        raise ConfigError(
            f"resume={name}: its plans.json, journal.jsonl or checkpoint.safetensors is damaged"
        )


def _launch(config: "RunConfig", overrides: list[str]) -> None:
    """Hand the run to a coordinator."""
    from strategies.coordinator.launch import launch

    launch(config, overrides)


def _run_local(config: "RunConfig", overrides: list[str]) -> None:
    """Run the two apps in this process and in workers forked from it."""
    # Read when torch is imported: one thread a process, or the processes fight over the cores.
    os.environ["OMP_NUM_THREADS"] = "1"
    with loading("torch"):
        from fedmed.flower.in_process import load_object, run_in_process
        from strategies.server_app import app

        client_app = load_object(CLIENT_APP)
        from fedmed.devices import check

        check(config.federation.device)
    sites = list(config.task.declared_sizes)
    workers = config.federation.workers or min(os.cpu_count() or 1, len(sites))
    folder, device = config.federation.sites, {"device": config.federation.device}
    run_in_process(
        app,
        client_app,
        nodes=[{"site-folder": str(Path(folder, site).absolute())} if folder else device for site in sites],
        workers=workers,
        run_config={"overrides": shlex.join(overrides)},
    )
