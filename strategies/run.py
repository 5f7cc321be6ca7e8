"""A run from its configuration to its folder: quotes, rounds, references, release, report."""

import logging
import secrets
import shlex
import shutil
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flwr.serverapp import Grid

from fedmed.atomic import write_json
from fedmed.config import RunConfig
from fedmed.errors import Interrupted
from fedmed.models.build import build as build_model
from fedmed.models.classifier import Classifier
from fedmed.models.export import export, write_card
from fedmed.privacy.histogram import metrics_plans, site_epsilon
from fedmed.privacy.in_words import round_up
from fedmed.privacy.plan import PrivacyPlan, check_sampler
from fedmed.records import Instruction
from fedmed.report.html import write_report
from fedmed.resources import PeakMemory
from fedmed.tracking import Tracker, make_tracker
from fedmed.training import one_thread
from strategies.console import RunConsole
from strategies.consortium import Consortium
from strategies.evaluation import evaluate_released, final_figures
from strategies.folder import REPLIES, Progress, RunFolder
from strategies.launch import admit, asked, plans_of
from strategies.members import Members, Spent
from strategies.references import train_references
from strategies.rounds import Loop
from strategies.sites import Sites
from strategies.summary import summarise

log = logging.getLogger("fedmed.coordinator")


def run(config: RunConfig, grid: Grid) -> Path:
    """Do one run and return its folder.

    Raises:
        FedmedError: a setting, the data or a site stands in the way; nothing half-written is left behind
            unless a round had been sent.
        Interrupted: Ctrl-C after a round had been sent.
    """
    began = time.monotonic()
    console = RunConsole()
    # A consortium's run does not stand still because MLflow does.
    tracker = make_tracker(config.tracking, console.warn, insist=config.federation.kind == "local")
    one_thread(trains=config.federation.kind == "local")
    with PeakMemory() as memory:
        folder = RunFolder(Path(config.resume)) if config.resume else None
        plans = plans_of(config, folder)
        config = asked(config, plans)
        # Refuses what is not worth its epsilon.
        histograms = metrics_plans(config.task, config.privacy)
        # Before the grid forks its workers, so that they share the loaded model.
        model = build_model(config.task, config.model, config.adapter)
        if config.private:
            check_sampler(plans.values(), parameters=model.trainable)
        run_id = folder.run_id if folder else f"{config.name}-{secrets.token_hex(6)}"
        folder = folder or RunFolder.create(config, plans, run_id=run_id)
        sites = Sites(grid, config.federation.timeout, received=folder.receive)
        launch = Instruction.of(config, plans, run_id=run_id, round=0)
        ok, where, members = False, None, None
        try:
            members = admit(config, plans, histograms, sites, launch, console)
            if config.resume:
                folder.change(config, plans)
            _say_start(console, config, plans, folder)
            where = tracker.start(config, folder.path)
            progress = _train(config, sites, members, plans, folder, model, console, tracker, began)
            trained = time.monotonic()
            released = progress.released()
            final = Instruction.of(config, plans, run_id=run_id, round=progress.round)
            test = evaluate_released(config, sites, folder, final, released)
            tracker.log(final_figures(config, plans, test), progress.round)
            references = train_references(config, sites, plans, model, console) if config.reference else None
            export(model, released, config, folder.path / "adapter")
            seconds = {
                "total": round(progress.total_seconds + time.monotonic() - trained, 2),
                "training": round(progress.seconds, 2),
            }
            summary = summarise(
                config, plans, test=test, references=references, rounds=progress.round, seconds=seconds,
                history=progress.history, peak_rss_mb=memory.megabytes, mlflow=where,
            )  # fmt: skip
            write_card(summary, config, folder.path / "MODEL_CARD.md")
            write_report(summary, progress.history, folder.path / "report.html")
            write_json(folder.path / "history.json", progress.history)
            # Last: a folder with a summary is a finished run.
            write_json(folder.path / "summary.json", summary)
            ok = True
        except KeyboardInterrupt:
            if not (config.resume or folder.rounds_sent()):
                raise
            again = shlex.join(["fedmed", "run", f"resume={folder.path}"])
            raise Interrupted(f"interrupted; finished rounds are kept: continue with: {again}") from None
        finally:
            console.end()
            tracker.finish(folder.path, ok=ok)
            if ok or not folder.rounds_sent():
                # Of a run that can be resumed, what it was promised stays promised.
                _end(sites, members, launch, console)
            if not ok and not config.resume and not folder.rounds_sent():
                folder.discard()
    console.table(summary)
    _say_end(console, folder, where)
    return folder.path


def _end(sites: Sites, members: Members | None, launch: Instruction, console: RunConsole) -> None:
    """Tell the sites that the run is over; say what is to be done at those that cannot be told."""
    told = sites.end(launch)
    for site in sorted(members.ready - told if isinstance(members, Consortium) else ()):
        console.warn(
            f"site '{site}' could not be told that the run is over: what it never used stays promised until, there: "
            f"fedmed privacy return {launch.run_id} --why …"
        )


def _train(
    config: RunConfig,
    sites: Sites,
    members: Members,
    plans: dict[str, PrivacyPlan],
    folder: RunFolder,
    model: Classifier,
    console: RunConsole,
    tracker: Tracker,
    began: float,
) -> Progress:
    progress = folder.load() or Progress(round=0, arrays=model.initialise(config.seed))
    earlier = progress.total_seconds
    if config.resume:
        console.say(f"resumed after round {progress.round} of {config.rounds}")
    replies, until = folder.path / REPLIES, config.rounds
    if config.federation.ledgers:
        before = (progress.history[-1].get("spent") if progress.history else None) or {}
        promised = plans if config.privacy.kind == "dp" else {}
        answered = Counter(site for entry in progress.history for site in entry["sites"])
        spent = Spent.by_ledgers(before, folder.sent_after(progress.round), promised, answered)
    else:
        # Asked again, a site without a ledger trains again: what it has answered is not used beside that.
        shutil.rmtree(replies, ignore_errors=True)
        spent = Spent(dict.fromkeys(plans, folder.rounds_sent()))
        until = _last_round(config, folder.rounds_sent() - progress.round, progress, console)

    def sent(number: int, names: Sequence[str]) -> None:
        folder.journal(event="round-sent", round=number, sites=list(names))

    def finished(now: Progress) -> None:
        now.total_seconds = earlier + time.monotonic() - began
        folder.save(now)
        entry = now.history[-1]
        console.round_done(entry, until, private=config.private)
        tracker.log(_tracked(entry), entry["round"])

    loop = Loop(
        config, sites, plans, folder.run_id, members=members, spent=spent, spool=replies, sent=sent,
        finished=finished, warn=console.warn,
    )  # fmt: skip
    console.begin("federated training", until, progress.round)
    loop.run(progress, until=until)
    console.end()
    progress.total_seconds = earlier + time.monotonic() - began
    return progress


def _last_round(config: RunConfig, interrupted: int, progress: Progress, console: RunConsole) -> int:
    """The round to stop at. A round that was sent and never finished has spent its budget: under privacy the
    run then ends that many rounds earlier, and so stays within its plan."""
    if not interrupted or config.privacy.kind == "off":
        return config.rounds
    console.warn(
        f"{interrupted} interrupted round(s) had been sent: their budget counts as spent, so that the run "
        f"ends at round {config.rounds - interrupted}; continue with rounds={config.rounds + interrupted} to repeat "
        "them at a larger epsilon"
    )
    return max(progress.round, config.rounds - interrupted)


def _tracked(entry: dict[str, Any]) -> dict[str, float]:
    """A round's figures by MLflow's names: global ones, and one per site."""
    figures = {
        "exact.auc": entry["auc"],
        "exact.accuracy": entry["accuracy"],
        "bytes_up": entry["bytes_up"],
        "bytes_down": entry["bytes_down"],
        "seconds": entry["seconds"],
    }
    for site, result in entry["site_metrics"].items():
        figures |= {f"exact.auc/{site}": result["auc"], f"exact.accuracy/{site}": result["accuracy"]}
    figures |= {f"epsilon.pld/{site}": epsilon for site, epsilon in entry["epsilon"].items()}
    return {name: float(value) for name, value in figures.items() if value is not None}


def _say_start(
    console: RunConsole, config: RunConfig, plans: dict[str, PrivacyPlan], folder: RunFolder
) -> None:
    histograms = metrics_plans(config.task, config.privacy)
    total, site = max((site_epsilon(plan, histograms.get(site)), site) for site, plan in plans.items())
    plan = plans[site]
    console.say(f"run folder: {folder.path}")
    reason = config.not_private_reason()
    if reason:
        console.say(f"NOT PRIVATE: {reason}", style="bold red")
    else:
        console.say(
            f"privacy: at most epsilon {round_up(total):.2f} (PLD), delta {plan.delta:g}, {plan.adjacency}; "
            f"noise multiplier {plan.noise_multiplier:.3f}, sample rate {plan.sample_rate:g}, {plan.steps} steps a site"
        )


def _say_end(console: RunConsole, folder: RunFolder, where: dict[str, str] | None) -> None:
    console.say(f"report: {folder.path / 'report.html'}")
    console.say(f"model card: {folder.path / 'MODEL_CARD.md'}")
    if where:
        served = where["uri"].startswith("http")
        console.say(f"look further: {'' if served else 'mlflow ui --backend-store-uri '}{where['uri']}")
    console.say(str(folder.path / "summary.json"))
