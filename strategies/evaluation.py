"""The evaluation of the released adapter: exact, private and once per run, or none."""

import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from fedmed.atomic import write_json
from fedmed.config import RunConfig
from fedmed.privacy.histogram import expected_error, metrics_plans, site_epsilon
from fedmed.privacy.plan import PrivacyPlan
from fedmed.private_metrics import NoisyHistogram
from fedmed.records import Instruction
from strategies.base import Arrays
from strategies.folder import RunFolder
from strategies.sites import Sites
from strategies.summary import exact_result

# The noisy histograms as they came, so that a resumed run has no cause to ask again.
HISTOGRAMS = "metrics.json"


def evaluate_released(
    config: RunConfig, sites: Sites, folder: RunFolder, instruction: Instruction, released: Arrays
) -> dict[str, Any]:
    """The result on held-out patients, marked with its release.

    Private metrics are asked for once in the life of the run's folder: what was asked counts as spent, and is never
    asked again, whether or not the answer was kept (privacy.md, rule 17). Sites that remember what they answered are
    asked again where it was not kept: they repeat it.
    """
    if config.privacy.metrics == "none":
        return no_result(config)
    if config.privacy.metrics == "exact":
        return exact_result(sites.evaluate(instruction, released, config.task.declared_sizes))
    lost = config.federation.ledgers and not (folder.path / HISTOGRAMS).exists()
    if lost or not folder.metrics_asked():
        folder.journal(event="metrics-sent", round=instruction.round)
        plans = metrics_plans(config.task, config.privacy)
        found = sites.evaluate_privately(instruction, released, plans)
        values = {
            site: {
                "noise": histogram.noise,
                "edges": histogram.edges.tolist(),
                "counts": histogram.counts.tolist(),
            }
            for site, histogram in found.items()
        }
        write_json(folder.path / HISTOGRAMS, values)
    return private_result(config, _kept(folder))


def no_result(config: RunConfig) -> dict[str, Any]:
    """The result of a run that evaluates nothing."""
    nothing = {"release": "none", "auc": None, "accuracy": None}
    return {
        "covered_by_epsilon": False,
        **nothing,
        "sites": {site: dict(nothing) for site in config.task.declared_sizes},
    }


def private_result(config: RunConfig, found: Mapping[str, NoisyHistogram]) -> dict[str, Any]:
    """What the merged histogram says, with each site's AUC and accuracy from its own: all post-processing."""
    error = expected_error(config.task, config.privacy, metrics_plans(config.task, config.privacy).values())
    result: dict[str, Any] = {
        "release": "private",
        "covered_by_epsilon": True,
        "expected_auc_error": error,
        "auc": None,
        "accuracy": None,
        "sites": {site: histogram.figures() for site, histogram in sorted(found.items())},
    }
    if found:
        first, *rest = found.values()
        result |= sum(rest, start=first).all_figures()
    return result


def final_figures(
    config: RunConfig, plans: Mapping[str, PrivacyPlan], test: Mapping[str, Any]
) -> dict[str, float]:
    """What private metrics add to a tracker: the figures, and each site's epsilon with theirs in it."""
    if test["release"] != "private":
        return {}
    figures = {f"private.{name}": test[name] for name in ("auc", "accuracy")}
    for site, result in test["sites"].items():
        figures |= {f"private.{name}/{site}": result[name] for name in ("auc", "accuracy")}
    histograms = metrics_plans(config.task, config.privacy)
    figures |= {f"epsilon.pld/{site}": site_epsilon(plan, histograms[site]) for site, plan in plans.items()}
    return {name: float(value) for name, value in figures.items() if value is not None}


def _kept(folder: RunFolder) -> dict[str, NoisyHistogram]:
    path = folder.path / HISTOGRAMS
    values = json.loads(path.read_text()) if path.exists() else {}
    return {
        site: NoisyHistogram(np.array(kept["counts"]), kept["noise"], np.array(kept["edges"]))
        for site, kept in values.items()
    }
