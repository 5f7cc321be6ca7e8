"""A whole run on ingested images, references included, as `experiment=demo_imaging` does it."""

from pathlib import Path

import pytest

from tests.clients.sites import run
from tests.stores import hospital, settings


def test_a_run_on_images_ends_in_a_report_that_compares_patient_and_image(tmp_path: Path) -> None:
    for seed, site in enumerate("ab"):
        hospital(tmp_path / "data" / site, patients=60, name=site, seed=seed)
    summary, said = run(
        settings(
            tmp_path / "data", "reference=true", "task.public_benchmark=true", "task.split=shuffle",
            "privacy.metrics=exact", "privacy.noise_multiplier=4", f"run_dir={tmp_path / 'run'}",
        )
    )  # fmt: skip
    references = summary["references"]
    assert references.keys() == {"local_only", "non_private", "image_level"}
    costs = references["image_level"]["costs"]
    assert summary["privacy"]["consortium"]["one_site"]["epsilon"] == pytest.approx(costs["patient"])
    assert costs["image_for_patients"][-1][0] == 3
    assert costs["image_for_patients"][-1][1] > 3 * costs["patient"]
    assert "patient-level against image-level clipping" in said
    assert "The image-level run protects one image with epsilon" in said
    text = (tmp_path / "run" / "report.html").read_text()
    assert "whom the clipping protects" in text
    assert text.count("<svg") >= 2
    assert (tmp_path / "run" / "MODEL_CARD.md").read_text().count("convolutional network") == 1
