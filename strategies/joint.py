"""What several runs cost a site together (privacy.md, rule 14): of a sweep that is to start, or of one that ran."""

import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import typer
from dp_accounting import DpEvent

from fedmed.config import RunConfig
from fedmed.errors import ConfigError, RunError
from fedmed.privacy.accounting import composed_epsilon
from fedmed.privacy.histogram import HistogramPlan, metrics_plans
from fedmed.privacy.in_words import round_up
from fedmed.privacy.plan import PrivacyPlan, make_plan


@dataclass(frozen=True, kw_only=True)
class Share:
    """What one run asks, or asked, of one site.

    Attributes:
        rounds: how many rounds count; 0: none was sent.
        histogram: the plan of the private metrics, where they count.
        not_private: why no epsilon covers it.
    """

    plan: PrivacyPlan
    rounds: int
    histogram: HistogramPlan | None = None
    not_private: str | None = None

    @property
    def events(self) -> list[DpEvent]:
        """What it costs one unit."""
        training = [self.plan.event(self.rounds)] if self.rounds else []
        return training + ([self.histogram.event()] if self.histogram else [])


@dataclass(frozen=True, kw_only=True)
class Cost:
    """The joint cost of some runs at one site; without an epsilon where `not_private` says why."""

    runs: int
    rounds: int
    epsilon_pld: float | None
    epsilon_rdp: float | None
    delta: float
    adjacency: str
    not_private: str | None = None


def planned(configs: Iterable[RunConfig]) -> dict[str, list[Share]]:
    """Each site's shares, where every run runs whole."""
    shares: dict[str, list[Share]] = {}
    for config in configs:
        histograms = metrics_plans(config.task, config.privacy)
        for site in config.task.declared_sizes:
            plan = make_plan(config, site)
            share = Share(
                plan=plan,
                rounds=plan.rounds,
                histogram=histograms.get(site),
                not_private=config.not_private_reason(),
            )
            shares.setdefault(site, []).append(share)
    return shares


def joint_costs(shares: Mapping[str, list[Share]]) -> dict[str, Cost]:
    """The composition of all shares at each site, at the site's largest delta.

    PLD holds for plans that were all fixed before the first of them ran, and whole; RDP also for those that were
    chosen, or ended, in the light of earlier ones.

    Raises:
        PrivacyError: an epsilon beyond what the accountant reckons with.
    """
    return {site: _joint(of_site) for site, of_site in sorted(shares.items())}


def _joint(shares: list[Share]) -> Cost:
    counted = [share for share in shares if share.events]
    reasons = [share.not_private for share in counted if share.not_private]
    if len({share.plan.unit for share in counted}) > 1:
        reasons.append("the runs protect different units")
    delta = max(share.plan.delta for share in shares)
    events = [event for share in counted for event in share.events]
    epsilon: dict[str, float | None] = {"pld": None, "rdp": None}
    if not reasons:
        epsilon = {
            name: composed_epsilon(events, delta=delta, accountant=name) if events else 0.0
            for name in epsilon
        }
    return Cost(
        runs=len(counted),
        rounds=sum(share.rounds for share in counted),
        epsilon_pld=epsilon["pld"],
        epsilon_rdp=epsilon["rdp"],
        delta=delta,
        adjacency=shares[0].plan.adjacency,
        not_private=reasons[0] if reasons else None,
    )


def in_words(cost: Cost) -> str:
    """A site's joint cost as one phrase."""
    if cost.not_private:
        return f"NOT PRIVATE: {cost.not_private}"
    assert cost.epsilon_pld is not None
    assert cost.epsilon_rdp is not None
    return (
        f"epsilon {round_up(cost.epsilon_pld):.2f} (PLD), {round_up(cost.epsilon_rdp):.2f} (RDP) at delta "
        f"{cost.delta:g}; {cost.adjacency}"
    )


def announce(configs: list[RunConfig], *, yes: bool) -> None:
    """Say what a sweep on real cohorts would cost each of them, and ask; return if it may start.

    A sweep on public benchmarks alone, at sites that keep no ledger, is not announced.

    Raises:
        ConfigError: there is nobody to ask, and no `--yes`.
        RunError: the answer was no.
    """
    if all(config.task.public_benchmark and not config.federation.sites for config in configs):
        return
    typer.echo(f"{len(configs)} jobs on the same patients cost together, if every job runs whole:")
    for site, cost in joint_costs(planned(configs)).items():
        typer.echo(f"  site '{site}': {in_words(cost)} ({cost.runs} jobs, {cost.rounds} rounds)")
    if yes:
        return
    if not sys.stdin.isatty():
        raise ConfigError(
            "a sweep on real cohorts asks before it starts; without a terminal, agree with: --yes"
        )
    if not typer.confirm("go on?", default=False):
        raise RunError("the sweep was not started; nothing was spent")
