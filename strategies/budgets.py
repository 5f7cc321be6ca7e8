"""What a run would cost against what is left at its sites, by their ledgers, which are only read."""

import dataclasses
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedmed.config import RunConfig
from fedmed.errors import ConfigError, PrivacyError, nearest
from fedmed.privacy.account import Cohort
from fedmed.privacy.budget import Budget, pld_epsilon
from fedmed.privacy.events import to_json
from fedmed.privacy.histogram import HistogramPlan, metrics_plans, site_charges
from fedmed.privacy.plan import PrivacyPlan, make_plan
from fedmed.privacy.reader import read_account

LEDGER = "ledger.db"
# Those of privacy.noise_multiplier.
LEAST_NOISE, MOST_NOISE = 0.1, 10_000.0


@dataclass(frozen=True, kw_only=True)
class SiteBudget:
    """What a site's ledger says of the cohort that a run would draw on.

    Attributes:
        last: the hash of the ledger's last entry: what the forecast was made against.
    """

    site: str
    cohort: Cohort
    budget: Budget
    last: str


def read_budgets(
    paths: Iterable[Path], *, cohorts: Sequence[str] = (), config: RunConfig
) -> list[SiteBudget]:
    """The budgets in some ledgers: each a site's folder, or its ledger.db.

    Args:
        cohorts: the names to choose from, where a ledger has several.

    Raises:
        LedgerError: one cannot be read.
        ConfigError: its site is not in the run, or was named before, or no one cohort of it is meant.
    """
    found: list[SiteBudget] = []
    if config.resume:
        raise ConfigError("--site-ledger: forecasts a new run; leave out resume=…, whose run has its promise")
    for path in paths:
        account, last = read_account(path / LEDGER if path.is_dir() else path)
        site = str(account.site)
        if site not in config.task.declared_sizes:
            hint = nearest(site, config.task.declared_sizes)
            raise ConfigError(
                f"--site-ledger {path}: of site '{site}', which is not in task.declared_sizes; {hint}"
            )
        if any(site == other.site for other in found):
            raise ConfigError(
                f"--site-ledger {path}: of site '{site}', as one before it; expected one a site"
            )
        cohort = _cohort(path, account.cohorts, cohorts)
        if cohort.budget is None:
            raise ConfigError(
                f"--site-ledger {path}: cohort '{cohort.name}' has no budget, so that every run is refused; at the "
                f"site: fedmed privacy budget set {cohort.name} --epsilon … --why …"
            )
        found.append(SiteBudget(site=site, cohort=cohort, budget=cohort.budget, last=last))
    return found


def _cohort(path: Path, known: Mapping[str, Cohort], asked: Sequence[str]) -> Cohort:
    where = f"--site-ledger {path}"
    if not known:
        raise ConfigError(f"{where}: has no cohort; at the site: fedmed privacy cohort add NAME …")
    named = [name for name in dict.fromkeys(asked) if name in known]
    if asked and not named:
        raise ConfigError(f"--cohort {asked[0]}: no such cohort in {path}; {nearest(asked[0], known)}")
    chosen = named or list(known)
    if len(chosen) > 1:
        raise ConfigError(f"{where}: has cohorts {', '.join(chosen)}; choose one with: --cohort NAME")
    return known[chosen[0]]


def compare(config: RunConfig, budgets: Iterable[SiteBudget]) -> list[dict[str, Any]]:
    """For each ledger: before, cost, after; whether a new run would be promised its budget; and what would be.

    The verdict is that of `Ledger.hold`, by the same filter. A person, or the site's own policy, may still refuse.
    """
    histograms = metrics_plans(config.task, config.privacy)
    return [_compare(config, found, histograms.get(found.site)) for found in budgets]


def _compare(config: RunConfig, found: SiteBudget, histogram: HistogramPlan | None) -> dict[str, Any]:
    budget, before = found.budget, found.cohort.charges
    values: dict[str, Any] = {
        "site": found.site,
        "cohort": found.cohort.name,
        "ledger_head": found.last,
        "budget": {"epsilon": budget.epsilon, "delta": budget.delta, "renyi_order": budget.order},
        "before": _figures(budget, before),
        "not_private_reason": config.not_private_reason(),
        "verdict": "not charged",
    }
    if not config.private:
        return values
    plan = make_plan(config, found.site)
    run = site_charges(plan, histogram)
    metrics = site_charges(plan, histogram) - site_charges(plan, None)
    noise = least_noise(budget, before, plan, histogram)
    after = before + run
    values["cost"] = {
        **_figures(budget, run),
        "training": _figures(budget, site_charges(plan, None)),
        "metrics": _figures(budget, metrics) if metrics else None,
    }
    return values | {
        "after": _figures(budget, after),
        "verdict": "fits" if budget.allows(after) else "refused",
        "rounds": plan.rounds,
        "noise_multiplier": plan.noise_multiplier,
        # False also where nothing at all is left.
        "metrics_fit": not metrics or budget.allows(before + metrics),
        "rounds_that_fit": budget.rounds_that_fit(before + metrics, to_json(plan.event(rounds=1))),
        "noise_multiplier_that_fits": noise,
    }


def _figures(budget: Budget, charges: Mapping[str, int]) -> dict[str, float | None]:
    """Epsilon at the budget's delta: by the filter, which binds, and by PLD, which would bind for one fixed plan."""
    try:
        pld = pld_epsilon(charges, delta=budget.delta)
    except PrivacyError:
        # Far beyond any budget: the accountant does not say how far.
        pld = None
    return {"epsilon": budget.spent(charges), "epsilon_pld": pld}


def least_noise(
    budget: Budget, before: Counter[str], plan: PrivacyPlan, histogram: HistogramPlan | None
) -> float | None:
    """The smallest noise multiplier, at most 1% above the true bound, at which the whole run would fit.

    None where no noise does that privacy.noise_multiplier may name. The metrics keep their noise.
    """

    def fits(noise: float) -> bool:
        asked = dataclasses.replace(plan, noise_multiplier=noise)
        return budget.allows(before + site_charges(asked, histogram))

    low, high = LEAST_NOISE, MOST_NOISE
    if fits(low):
        return low
    if not fits(high):
        return None
    while high / low > 1.005:
        middle = math.sqrt(low * high)
        low, high = (low, middle) if fits(middle) else (middle, high)
    # Four digits can be typed; upwards, so that it still fits.
    scale = 10.0 ** (3 - math.floor(math.log10(high)))
    return math.ceil(high * scale) / scale
