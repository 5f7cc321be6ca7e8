"""`fedmed privacy sweep`: what a sweep has cost its sites. Heavy imports wait until the command runs."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from strategies.joint import Share

SWEEP_HELP = """Say what a sweep has cost each site, all jobs together.

That is the composition of all its jobs, winners and losers.

DIR is a sweep's folder (sweeps/TIME). Every round that was sent counts, also of jobs that failed or never ended, and
private metrics that were asked for. RDP charges the rounds that were sent. PLD stands beside it for the same rounds;
it holds only for plans that were fixed in advance, so that a job that ended early also counts whole.

\b
Examples:
  fedmed privacy sweep sweeps/20261122-101500
  fedmed privacy sweep sweeps/20261122-101500 --json
"""

Folder = Annotated[Path, typer.Argument(metavar="DIR", hidden=True)]


def joint_cost(
    folder: Folder,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Read the jobs, compose what was sent, print."""
    from fedmed.schema import to_dict
    from strategies.joint import in_words, joint_costs

    jobs, sent, whole = _read(folder)
    costs, charged_whole = joint_costs(sent), joint_costs(whole)
    if as_json:
        sites = {
            site: {
                **to_dict(cost),
                "epsilon_pld_of_whole_plans": charged_whole[site].epsilon_pld,
            }
            for site, cost in costs.items()
        }
        typer.echo(json.dumps({"jobs_sent": jobs, "sites": sites}, indent=2, allow_nan=False))
        return
    for site, cost in costs.items():
        typer.echo(f"site '{site}': {in_words(cost)} ({cost.runs} jobs, {cost.rounds} rounds sent)")
        entire = charged_whole[site]
        if entire.epsilon_pld is not None and entire.rounds > cost.rounds:
            typer.echo(f"  jobs ended early; charged whole: {in_words(entire)}")
    if not costs:
        typer.echo("no round of any job was sent: nothing was spent")
    else:
        typer.echo("exact metrics and references, where a job had them, are outside these figures")


def _read(folder: Path) -> "tuple[int, dict[str, list[Share]], dict[str, list[Share]]]":
    """How many jobs sent a round; each site's shares as sent; and as planned, of the jobs that sent any."""
    from fedmed.errors import ConfigError

    if not folder.is_dir():
        raise ConfigError(f"{folder}: no folder; expected a sweep's, e.g. sweeps/20261122-101500")
    jobs = sorted(
        (path for path in folder.iterdir() if path.name.isdigit() and path.is_dir()),
        key=lambda path: int(path.name),
    )
    if not jobs and not (folder / "sweep.json").is_file():
        raise ConfigError(f"{folder}: no sweep in it; expected sweep.json and a numbered folder a job")
    for index in _ended(folder / "sweep.json"):
        if not (folder / str(index)).is_dir():
            raise ConfigError(
                f"{folder / str(index)}: missing, though the job ended: what it has spent is not known"
            )
    sent: dict[str, list[Share]] = {}
    whole: dict[str, list[Share]] = {}
    count = 0
    for job in jobs:
        shares = _shares(job)
        count += bool(shares)
        for site, (as_sent, as_planned) in shares.items():
            sent.setdefault(site, []).append(as_sent)
            whole.setdefault(site, []).append(as_planned)
    return count, sent, whole


def _ended(file: Path) -> list[int]:
    """The jobs that ended well, by a sweep's own account; a job that failed may have left no folder."""
    from fedmed.errors import ConfigError

    if not file.is_file():
        # The sweep is at work, or died.
        return []
    try:
        return [
            index for index, job in enumerate(json.loads(file.read_text())["jobs"]) if job["error"] is None
        ]
    except (OSError, ValueError, KeyError, TypeError):
        raise ConfigError(f"{file}: is damaged") from None


def _shares(job: Path) -> "dict[str, tuple[Share, Share]]":
    """What one job sent to each site, and what it had planned; nothing where it sent nothing."""
    from fedmed.config import run_config_from_dict
    from fedmed.errors import ConfigError
    from fedmed.privacy.histogram import metrics_plans
    from strategies.folder import RunFolder
    from strategies.joint import Share

    folder = RunFolder(job)
    try:
        rounds, metrics = folder.rounds_sent(), folder.metrics_asked()
        if not rounds and (job / "summary.json").exists():
            raise ValueError("a finished run has sent rounds")
        if not rounds and not metrics:
            return {}
        config = run_config_from_dict(json.loads((job / "config.json").read_text()))
        plans = folder.plans()
        if plans.keys() != config.task.declared_sizes.keys():
            raise ValueError("plans of other sites")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ConfigError):
        raise ConfigError(
            f"{job}: its config.json, plans.json or journal.jsonl is damaged: what the job has spent is not known"
        ) from None
    histograms = metrics_plans(config.task, config.privacy)
    reason = config.not_private_reason()
    return {
        site: (
            Share(
                plan=plan,
                rounds=rounds,
                histogram=histograms.get(site) if metrics else None,
                not_private=reason,
            ),
            Share(
                plan=plan,
                rounds=max(rounds, plan.rounds),
                histogram=histograms.get(site),
                not_private=reason,
            ),
        )
        for site, plan in plans.items()
    }
