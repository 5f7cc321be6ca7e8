"""What a run on a public benchmark is compared with: each site alone, no privacy, and the image as the unit."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from fedmed.config import RunConfig
from fedmed.errors import RunError
from fedmed.metrics import ScoreCounts
from fedmed.models.classifier import Classifier
from fedmed.privacy.plan import PrivacyPlan, make_plan
from fedmed.records import Instruction
from strategies.console import RunConsole
from strategies.folder import Progress
from strategies.rounds import Loop
from strategies.sites import Sites
from strategies.summary import scores
from strategies.units import compares_units, unit_costs


def train_references(
    config: RunConfig, sites: Sites, plans: Mapping[str, PrivacyPlan], model: Classifier, console: RunConsole
) -> dict[str, Any]:
    """Train each reference on the same patients again and evaluate it exactly.

    `local_only`: each site alone, under the same plan. `non_private`: all sites, without clipping and noise.
    `image_level`: all sites, each image clipped and accounted by itself, at the same epsilon; only where a patient
    may have several.
    """
    console.say(f"references: {', '.join(_titles(config))}")

    def trained(run: RunConfig, own: Mapping[str, PrivacyPlan], name: str) -> dict[str, ScoreCounts]:
        loop = Loop(run, sites, dict(own), name, score_rounds=False)
        progress = loop.run(Progress(round=0, arrays=model.initialise(run.seed)), until=run.rounds)
        last = Instruction.of(run, own, run_id=name, round=run.rounds)
        return sites.evaluate(last, progress.released(), own)

    alone: dict[str, ScoreCounts] = {}
    for site, plan in plans.items():
        try:
            alone |= trained(config, {site: plan}, "local-only")
        except RunError as error:
            console.warn(f"no reference of '{site}' alone: {error}")
    references = {"local_only": {"private": config.private, **scores(alone)}}
    if config.privacy.kind == "dp":
        open_config = dataclasses.replace(config, privacy=dataclasses.replace(config.privacy, kind="off"))
        open_plans = {site: dataclasses.replace(plan, noise_multiplier=0.0) for site, plan in plans.items()}
        test = trained(open_config, open_plans, "non-private")
        references["non_private"] = {"private": False, **scores(test)}
    if compares_units(config):
        image_config = by_image(config)
        image_plans = {site: make_plan(image_config, site) for site in plans}
        test = trained(image_config, image_plans, "image-level")
        costs = unit_costs(config, plans, image_plans)
        references["image_level"] = {"private": config.private, **scores(test), "costs": costs}
    return references


def by_image(config: RunConfig) -> RunConfig:
    """The same run with one image as the unit: sampled, clipped and accounted for by itself."""
    return dataclasses.replace(
        config,
        task=dataclasses.replace(config.task, unit="image"),
        privacy=dataclasses.replace(config.privacy, records_per_patient=1),
    )


def _titles(config: RunConfig) -> list[str]:
    titles = ["each site alone"]
    titles += ["all sites without privacy"] if config.privacy.kind == "dp" else []
    return titles + (["all sites with each image clipped by itself"] if compares_units(config) else [])
