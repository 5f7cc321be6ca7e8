"""A run from its configuration to its folder: quotes, rounds, references, release, report."""

import dataclasses
import logging
import secrets
import shlex
import time
from pathlib import Path
from typing import Any

from flwr.serverapp import Grid

from fedmed.atomic import write_json
from fedmed.config import RunConfig
from fedmed.errors import ConfigError, Interrupted
from fedmed.models.build import build as build_model
from fedmed.models.classifier import Classifier
from fedmed.models.export import export, write_card
from fedmed.privacy.accounting import round_up
from fedmed.privacy.histogram import HistogramPlan, metrics_plans, site_epsilon
from fedmed.privacy.plan import PrivacyPlan, check_sampler, make_plan
from fedmed.records import Instruction
from fedmed.report.html import write_report
from fedmed.resources import PeakMemory
from fedmed.tracking import Tracker, make_tracker
from fedmed.training import one_thread
from strategies.console import RunConsole
from strategies.evaluation import evaluate_released, final_figures
from strategies.folder import Progress, RunFolder
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
    one_thread()
    with PeakMemory() as memory:
        folder = RunFolder(Path(config.resume)) if config.resume else None
        plans = _plans(config, folder)
        config = _asked(config, plans)
        # Refuses what is not worth its epsilon.
        histograms = metrics_plans(config.task, config.privacy)
        # Before the grid forks its workers, so that they share the loaded model.
        model = build_model(config.task, config.model, config.adapter)
        if config.private:
            check_sampler(plans.values(), parameters=model.trainable)
        run_id = folder.run_id if folder else f"{config.name}-{secrets.token_hex(6)}"
        heads: list[tuple[str, str, str]] = []
        sites = Sites(grid, config.federation.timeout, received=lambda *head: heads.append(head))
        launch = Instruction.of(config, plans, run_id=run_id, round=0)
        folder = _admitted(config, plans, histograms, sites, launch, console, folder)
        ok, where = False, None
        sites.received = folder.receive
        try:
            for head in heads:
                folder.receive(*head)
            _say_start(console, config, plans, folder)
            where = tracker.start(config, folder.path)
            progress = _train(config, sites, plans, folder, model, console, tracker, began)
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
                sites.end(launch)
            if not ok and not config.resume and not folder.rounds_sent():
                folder.discard()
    console.table(summary)
    _say_end(console, folder, where)
    return folder.path


def _admitted(
    config: RunConfig,
    plans: dict[str, PrivacyPlan],
    histograms: dict[str, HistogramPlan],
    sites: Sites,
    launch: Instruction,
    console: RunConsole,
    folder: RunFolder | None,
) -> RunFolder:
    """The run's folder, once every site has agreed to the run and, where it keeps a ledger, promised its budget.

    A run that does not start gives back what some sites have promised already.
    """

    def waits(reasons: dict[str, str]) -> None:
        for site, reason in sorted(reasons.items()):
            console.say(f"site '{site}': {reason}: fedmed site approve DIR {launch.run_id}")

    # Before they are asked: sites that are played by workers forked from this process then find it computed.
    ours = {site: site_epsilon(plan, histograms.get(site)) for site, plan in plans.items()}
    try:
        quotes = sites.connect(launch, approval_timeout=config.federation.approval_timeout, waits=waits)
        for site, quote in quotes.items():
            if quote.declared_size != plans[site].declared_size:
                raise ConfigError(
                    f"site '{site}' declares {quote.declared_size} patients, the run another number"
                )
            if config.private and quote.epsilon is not None and quote.epsilon > ours[site] * 1.001:
                raise ConfigError(
                    f"site '{site}' accounts epsilon {quote.epsilon}, the run less; same versions?"
                )
        if folder is None:
            return RunFolder.create(config, plans, run_id=launch.run_id)
        folder.change(config, plans)
        return folder
    except BaseException:
        if folder is None:
            sites.end(launch)
        raise


def _plans(config: RunConfig, folder: RunFolder | None) -> dict[str, PrivacyPlan]:
    """New plans, or those under which a resumed run started: its noise never changes half-way."""
    if folder is None:
        return {site: make_plan(config, site) for site in config.task.declared_sizes}
    # Fewer rounds than planned are charged as planned: PLD holds for the plan that was fixed in advance.
    return {
        site: dataclasses.replace(plan, rounds=max(plan.rounds, config.rounds))
        for site, plan in folder.plans().items()
    }


def _asked(config: RunConfig, plans: dict[str, PrivacyPlan]) -> RunConfig:
    """The run with the epsilon that it asks the sites for: more rounds of a resumed run cost more."""
    if not config.resume or config.privacy.kind == "off" or config.privacy.epsilon is None:
        return config
    epsilon = max(config.privacy.epsilon, *(plan.epsilon() for plan in plans.values()))
    return dataclasses.replace(config, privacy=dataclasses.replace(config.privacy, epsilon=epsilon))


def _train(
    config: RunConfig,
    sites: Sites,
    plans: dict[str, PrivacyPlan],
    folder: RunFolder,
    model: Classifier,
    console: RunConsole,
    tracker: Tracker,
    began: float,
) -> Progress:
    progress = folder.load() or Progress(round=0, arrays=model.initialise(config.seed))
    interrupted = folder.rounds_sent() - progress.round
    earlier = progress.total_seconds
    until = _last_round(config, interrupted, progress, console)

    def sent(number: int) -> None:
        folder.journal(event="round-sent", round=number)

    def finished(now: Progress) -> None:
        now.total_seconds = earlier + time.monotonic() - began
        folder.save(now)
        entry = now.history[-1]
        console.round_done(entry, until, private=config.private)
        tracker.log(_tracked(entry), entry["round"])

    loop = Loop(
        config, sites, plans, folder.run_id, interrupted, sent=sent, finished=finished, warn=console.warn
    )
    console.begin("federated training", until, progress.round)
    loop.run(progress, until=until)
    console.end()
    progress.total_seconds = earlier + time.monotonic() - began
    return progress


def _last_round(config: RunConfig, interrupted: int, progress: Progress, console: RunConsole) -> int:
    """The round to stop at. A round that was sent and never finished has spent its budget: under privacy the
    run then ends that many rounds earlier, and so stays within its plan."""
    if config.resume:
        console.say(f"resumed after round {progress.round} of {config.rounds}")
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
