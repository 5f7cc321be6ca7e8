"""What a finished run says of itself: one mapping that table, report, card and summary.json render."""

from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

from fedmed.config import RunConfig
from fedmed.metrics import ScoreCounts
from fedmed.privacy.accounting import BINDING, composed_epsilon
from fedmed.privacy.histogram import (
    HistogramPlan,
    expected_error,
    metrics_plans,
    run_events,
    site_epsilon,
)
from fedmed.privacy.in_words import belief_in_words
from fedmed.privacy.plan import PrivacyPlan

OUTSIDE = [
    "hyperparameters were tuned outside epsilon",
    "the encoder's pretraining data is outside epsilon",
]
EXACT = "test metrics are exact and not covered by epsilon"
ASSUMPTION = (
    "a patient whose records are at one site has that site's epsilon; one with records at every site has the "
    "composition of all sites"
)


def scores(counts: Mapping[str, ScoreCounts]) -> dict[str, Any]:
    """AUC and accuracy, pooled and per site; null where there is one class or no record."""
    sites = {site: {"auc": c.auc(), "accuracy": c.accuracy()} for site, c in sorted(counts.items())}
    if not counts:
        return {"auc": None, "accuracy": None, "sites": {}}
    pooled = list(counts.values())
    total = sum(pooled[1:], start=pooled[0])
    return {"auc": total.auc(), "accuracy": total.accuracy(), "sites": sites}


def exact_result(counts: Mapping[str, ScoreCounts]) -> dict[str, Any]:
    """The result on held-out patients from exact counts, marked as such."""
    return {"release": "exact", "covered_by_epsilon": False, **scores(counts)}


def _outside(config: RunConfig, references: object) -> list[str]:
    """What the epsilon of a run does not cover."""
    lines = [*OUTSIDE, EXACT] if config.privacy.metrics == "exact" else list(OUTSIDE)
    if config.task.split == "shuffle":
        lines.append(
            "the split is a seeded shuffle of a public benchmark: epsilon holds for the training part as it was drawn"
        )
    if references:
        lines.append("the references trained on the same patients again, one of them without privacy")
    return lines


def privacy_statement(
    config: RunConfig, plans: Mapping[str, PrivacyPlan], *, references: object = None
) -> dict[str, Any]:
    """Everything that must stand beside an epsilon. Without privacy every epsilon is null.

    The whole plan is charged: PLD binds for a plan that was fixed in advance, whenever the run stopped. With private
    metrics an epsilon is the composition of training and metrics; both parts stand beside it.
    """
    histograms = metrics_plans(config.task, config.privacy)
    any_plan = next(iter(plans.values()))
    private = config.private
    sites = {}
    for site, plan in plans.items():
        sites[site] = {
            "epsilon": site_epsilon(plan, histograms.get(site)) if private else None,
            "epsilon_rdp": site_epsilon(plan, histograms.get(site), accountant="rdp") if private else None,
            **_parts(plan, histograms.get(site)),
            "delta": plan.delta if private else None,
            "noise_multiplier": plan.noise_multiplier,
            "sample_rate": plan.sample_rate,
            "steps": plan.steps,
            "declared_size": plan.declared_size,
        }
    largest_delta = max(plan.delta for plan in plans.values())
    # At the smallest delta, all sites together never seem to cost less than one of them.
    smallest_delta = min(plan.delta for plan in plans.values())
    consortium = None
    in_words = None
    if private:
        largest = max(float(site["epsilon"]) for site in sites.values() if site["epsilon"] is not None)
        rdp = [float(site["epsilon_rdp"]) for site in sites.values() if site["epsilon_rdp"] is not None]
        events = run_events(plans, histograms)
        consortium = {
            "one_site": {"epsilon": largest, "epsilon_rdp": max(rdp), "delta": largest_delta},
            "all_sites": {
                "epsilon": composed_epsilon(events, delta=smallest_delta),
                "epsilon_rdp": composed_epsilon(events, delta=smallest_delta, accountant="rdp"),
                "delta": smallest_delta,
            },
            "assumption": ASSUMPTION,
        }
        in_words = belief_in_words(largest, any_plan.unit)
    return {
        "private": private,
        "not_private_reason": config.not_private_reason(),
        "unit": any_plan.unit,
        "adjacency": any_plan.adjacency,
        "delta": largest_delta if private else None,
        "accountant": BINDING if private else None,
        "target_epsilon": config.privacy.epsilon if private else None,
        "sites": sites,
        "consortium": consortium,
        "in_words": in_words,
        "metrics": _metrics(config, histograms),
        "outside": _outside(config, references),
    }


def _parts(plan: PrivacyPlan, histogram: HistogramPlan | None) -> dict[str, float]:
    """What a site's epsilon is composed of, where it has two parts. Their sum may be larger than the whole."""
    if histogram is None:
        return {}
    return {
        "epsilon_training": plan.epsilon(),
        "epsilon_metrics": histogram.epsilon(),
        "metrics_noise_multiplier": histogram.noise_multiplier,
    }


def _metrics(config: RunConfig, histograms: Mapping[str, HistogramPlan]) -> dict[str, Any]:
    """How the run is evaluated; with private metrics, what they are expected to be worth."""
    if not histograms:
        return {"release": config.privacy.metrics}
    return {
        "release": "private",
        "epsilon": max(histogram.epsilon() for histogram in histograms.values()),
        "bins": config.privacy.metrics_bins,
        "expected_auc_error": expected_error(config.task, config.privacy, histograms.values()),
    }


def participation(
    plans: Mapping[str, PrivacyPlan], history: list[dict[str, Any]]
) -> dict[str, dict[str, int | None]]:
    """In how many rounds each site's update was used, and for how many its budget was charged (null: NOT PRIVATE).

    A site that joined late or was away was charged for fewer than planned; its epsilon is that of the whole plan.
    """
    spent = (history[-1].get("spent") if history else None) or {}
    return {
        site: {"rounds": sum(site in entry["sites"] for entry in history), "charged": spent.get(site)}
        for site in plans
    }


def summarise(
    config: RunConfig,
    plans: Mapping[str, PrivacyPlan],
    *,
    test: Mapping[str, Any],
    references: dict[str, Any] | None,
    rounds: int,
    seconds: dict[str, float],
    history: list[dict[str, Any]],
    peak_rss_mb: float,
    mlflow: dict[str, str] | None,
) -> dict[str, Any]:
    """The content of summary.json."""
    last = history[-1] if history else {"bytes_up": 0, "bytes_down": 0}
    return {
        "name": config.name,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "version": version("fedmed"),
        "seed": config.seed,
        "task": config.task.title,
        "model": config.model.in_words,
        "adapter": config.adapter.kind,
        "strategy": config.strategy.kind,
        "test": dict(test),
        "privacy": privacy_statement(config, plans, references=references),
        "references": references,
        "rounds": rounds,
        # What was charged for: a run that ended early is charged for all of them.
        "rounds_planned": next(iter(plans.values())).rounds,
        "participation": participation(plans, history),
        "seconds": seconds,
        "bytes_up_per_round": last["bytes_up"],
        "bytes_down_per_round": last["bytes_down"],
        "peak_rss_mb": round(peak_rss_mb),
        "artifacts": {"report": "report.html", "card": "MODEL_CARD.md", "adapter": "adapter"},
        "mlflow": mlflow,
    }
