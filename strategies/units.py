"""Patient or image: what a run that protects single images would mean for the patients behind them."""

import math
from collections.abc import Mapping
from typing import Any

from fedmed.config import RunConfig
from fedmed.privacy.group import group_epsilon
from fedmed.privacy.plan import PrivacyPlan
from fedmed.task import ImageTaskConfig


def compares_units(config: RunConfig) -> bool:
    """Whether the comparison says something: patients are protected, and may have several images each."""
    task = config.task
    return (
        isinstance(task, ImageTaskConfig)
        and task.unit == "patient"
        and (task.images_per_patient or 1) > 1
        and config.private
    )


def unit_costs(
    config: RunConfig, plans: Mapping[str, PrivacyPlan], image_plans: Mapping[str, PrivacyPlan]
) -> dict[str, Any]:
    """The epsilons of two runs that differ in their unit, each the largest of a site, at the same delta.

    Returns:
        `images_per_patient`: the declared maximum k. `delta`. `patient`: the patient-level run's epsilon for a
        patient. `image`: the image-level run's epsilon for one image. `image_for_patients`: of the image-level
        run, [images, epsilon] for a patient with 1, 2, … k images; null where no bound is worth stating.
    """
    most = config.task.images_per_patient
    largest = max(image_plans.values(), key=lambda plan: plan.epsilon())
    asked = sorted({1, 2, most // 2, most} - {0}) if most > 4 else list(range(1, most + 1))
    found = [(images, group_epsilon(largest, units=images)) for images in asked]
    return {
        "images_per_patient": most,
        "delta": max(plan.delta for plan in plans.values()),
        "patient": max(plan.epsilon() for plan in plans.values()),
        "image": largest.epsilon(),
        "image_for_patients": [
            [images, epsilon if math.isfinite(epsilon) else None] for images, epsilon in found
        ],
    }
