"""Before the first round: the plans of a run, and the sites' agreement to them."""

import dataclasses
from collections.abc import Callable, Mapping

from fedmed.config import RunConfig
from fedmed.errors import ConfigError
from fedmed.privacy.histogram import HistogramPlan, site_epsilon
from fedmed.privacy.plan import PrivacyPlan, make_plan
from fedmed.records import Instruction, Quote
from strategies.console import RunConsole
from strategies.consortium import Consortium
from strategies.folder import RunFolder
from strategies.members import Everyone, Members
from strategies.rounds import quorum_of
from strategies.sites import Sites


def plans_of(config: RunConfig, folder: RunFolder | None) -> dict[str, PrivacyPlan]:
    """New plans, or those under which a resumed run started: its noise never changes half-way."""
    if folder is None:
        return {site: make_plan(config, site) for site in config.task.declared_sizes}
    # Fewer rounds than planned are charged as planned: PLD holds for the plan that was fixed in advance.
    return {
        site: dataclasses.replace(plan, rounds=max(plan.rounds, config.rounds))
        for site, plan in folder.plans().items()
    }


def asked(config: RunConfig, plans: Mapping[str, PrivacyPlan]) -> RunConfig:
    """The run with the epsilon that it asks the sites for: more rounds of a resumed run cost more."""
    if not config.resume or config.privacy.kind == "off" or config.privacy.epsilon is None:
        return config
    epsilon = max(config.privacy.epsilon, *(plan.epsilon() for plan in plans.values()))
    return dataclasses.replace(config, privacy=dataclasses.replace(config.privacy, epsilon=epsilon))


def admit(
    config: RunConfig,
    plans: Mapping[str, PrivacyPlan],
    histograms: Mapping[str, HistogramPlan],
    sites: Sites,
    launch: Instruction,
    console: RunConsole,
) -> Members:
    """The sites, once they have agreed to the run and, where they keep a ledger, promised its budget.

    Raises:
        ConfigError, RunError: all of them on one machine, or the quorum of a consortium, did not.
    """
    objection = _objection(config, plans, histograms)
    if config.federation.kind == "consortium":
        consortium = Consortium(
            sites, launch, quorum_of(config, plans), config.federation.timeout, config.federation.approval_timeout,
            objection=objection, say=console.say,
        )  # fmt: skip
        consortium.start()
        return consortium

    def waits(reasons: dict[str, str]) -> None:
        for site, reason in sorted(reasons.items()):
            console.say(f"site '{site}': {reason}: fedmed site approve DIR {launch.run_id}")

    quotes = sites.connect(launch, approval_timeout=config.federation.approval_timeout, waits=waits)
    for site, quote in quotes.items():
        reason = objection(site, quote)
        if reason is not None:
            raise ConfigError(f"site '{site}' {reason}")
    return Everyone(list(plans))


def _objection(
    config: RunConfig, plans: Mapping[str, PrivacyPlan], histograms: Mapping[str, HistogramPlan]
) -> Callable[[str, Quote], str | None]:
    # Before they are asked: sites that are played by workers forked from this process then find it computed.
    ours = {site: site_epsilon(plan, histograms.get(site)) for site, plan in plans.items()}

    def reason(site: str, quote: Quote) -> str | None:
        if quote.declared_size != plans[site].declared_size:
            return f"declares {quote.declared_size} patients, the run another number"
        if config.private and quote.epsilon is not None and quote.epsilon > ours[site] * 1.001:
            return f"accounts epsilon {quote.epsilon}, the run less; same versions?"
        return None

    return reason
