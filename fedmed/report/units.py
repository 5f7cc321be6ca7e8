"""Patient-level against image-level clipping, in words: what each costs and what each protects."""

from collections.abc import Mapping
from typing import Any

from fedmed.privacy.in_words import belief_percent
from fedmed.report.page import delta_text, epsilon_text

NO_BOUND = "no useful bound"


def units_compared(summary: Mapping[str, Any]) -> dict[str, Any] | None:
    """What the comparison needs of a summary; None where the run made none."""
    reference = (summary["references"] or {}).get("image_level")
    if not reference or not summary["privacy"]["private"]:
        return None
    return {
        **reference["costs"],
        "patient_auc": summary["test"]["auc"],
        "image_auc": reference["auc"],
    }


def unit_table(compared: Mapping[str, Any]) -> list[list[str]]:
    """Rows of the comparison: what is clipped, AUC, epsilon for one image, epsilon for a patient with all images.

    An image is one of a patient's, so that what protects the patient protects each image at least as well.
    """
    most = compared["images_per_patient"]
    patient = epsilon_text(compared["patient"])
    return [
        ["each patient", auc_text(compared["patient_auc"]), f"at most {patient}", patient],
        [
            "each image",
            auc_text(compared["image_auc"]),
            epsilon_text(compared["image"]),
            f"{bound_text(compared['image_for_patients'][-1][1])} ({most} images)",
        ],
    ]


def unit_sentence(compared: Mapping[str, Any]) -> str:
    """The comparison as a clinician reads it."""
    most, delta = compared["images_per_patient"], delta_text(compared["delta"])
    worst = compared["image_for_patients"][-1][1]
    real = (
        f"for a patient with {most} images it is epsilon {epsilon_text(worst)}"
        if worst is not None
        else f"for a patient with {most} images no useful bound is left"
    )
    return (
        f"The image-level run protects one image with epsilon {epsilon_text(compared['image'])}; {real}, where the "
        f"patient-level run promises epsilon {epsilon_text(compared['patient'])} however many images there are (delta "
        f"{delta}). {cost_sentence(compared)}"
    )


def cost_sentence(compared: Mapping[str, Any]) -> str:
    """What protecting the patient costs in AUC."""
    ours, theirs = compared["patient_auc"], compared["image_auc"]
    if ours is None or theirs is None:
        return "Its AUC cannot be compared: the test patients all have the same outcome."
    price = theirs - ours
    if abs(price) < 0.005:
        return f"Both reach the same AUC within 0.005 ({ours:.3f} and {theirs:.3f})."
    more = "costs" if price > 0 else "cost nothing here but gained"
    return f"Protecting the patient {more} {abs(price):.3f} of AUC ({ours:.3f} against {theirs:.3f})."


def auc_text(auc: float | None) -> str:
    """An AUC as printed."""
    return "one class" if auc is None else f"{auc:.3f}"


def bound_text(epsilon: float | None) -> str:
    """An epsilon, or that it would be too large to mean anything."""
    return NO_BOUND if epsilon is None else epsilon_text(epsilon)


def belief(epsilon: float | None) -> str:
    """How sure an attacker who was half sure can become, in percent, rounded up."""
    return "100%" if epsilon is None else f"{belief_percent(epsilon):g}%"
