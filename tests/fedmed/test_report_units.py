"""Patient-level against image-level clipping, as table, sentence and section of the report."""

import copy
from pathlib import Path
from typing import Any

import pytest

from fedmed.compose import compose
from fedmed.privacy.group import group_epsilon
from fedmed.privacy.plan import make_plan
from fedmed.report.html import write_report
from fedmed.report.units import unit_sentence, unit_table, units_compared
from strategies.references import by_image
from strategies.summary import exact_result, summarise
from strategies.units import compares_units, unit_costs
from tests.stores import settings

PUBLIC = ["task.public_benchmark=true", "privacy.metrics=exact"]


def run(*overrides: str) -> Any:
    return compose(settings("nowhere", *PUBLIC, "privacy.noise_multiplier=4", *overrides))


@pytest.fixture(scope="module")
def summary() -> dict[str, Any]:
    config = run("reference=true")
    plans = {site: make_plan(config, site) for site in ("a", "b")}
    image_plans = {site: make_plan(by_image(config), site) for site in ("a", "b")}
    result = {"auc": 0.8, "accuracy": 0.7, "sites": {}}
    references = {
        "local_only": {"private": True, **result},
        "image_level": {
            "private": True,
            **result,
            "auc": 0.85,
            "costs": unit_costs(config, plans, image_plans),
        },
    }
    return summarise(
        config, plans, test={**exact_result({}), "auc": 0.8, "accuracy": 0.7}, references=references, rounds=1,
        seconds={"total": 1.0, "training": 0.5}, history=[], peak_rss_mb=1.0, mlflow=None,
    )  # fmt: skip


def test_the_reference_differs_in_its_unit_and_in_nothing_else() -> None:
    config = run()
    image = by_image(config)
    ours, theirs = make_plan(config, "a"), make_plan(image, "a")
    assert (ours.unit, theirs.unit) == ("patient", "image")
    assert theirs.adjacency == "add or remove one image"
    assert theirs.declared_size == 3 * 60 - round(0.34 * 3 * 60)
    assert theirs.records_per_patient == 1
    for name in ("sample_rate", "noise_multiplier", "max_grad_norm", "steps", "delta"):
        assert getattr(ours, name) == getattr(theirs, name)


def test_the_comparison_is_made_where_a_patient_may_have_several_images() -> None:
    assert compares_units(run())
    assert not compares_units(run("task.images_per_patient=1"))
    assert not compares_units(run("task.images_per_patient=null"))
    assert not compares_units(run("task.unit=image"))
    assert not compares_units(run("privacy=off"))
    assert not compares_units(compose(["model=logistic"]))


def test_every_number_of_units_is_stated_at_the_run_s_delta(summary: dict[str, Any]) -> None:
    compared = units_compared(summary)
    assert compared is not None
    plan = make_plan(by_image(run()), "a")
    assert compared["image_for_patients"] == [[k, group_epsilon(plan, units=k)] for k in (1, 2, 3)]
    assert compared["image"] == compared["patient"] == plan.epsilon()
    assert compared["delta"] == plan.delta == 1e-4
    patient, image = unit_table(compared)
    assert image[3].endswith("(3 images)")
    assert float(image[3].split()[0]) > 3 * float(patient[3])
    sentence = unit_sentence(compared)
    assert f"promises epsilon {patient[3]} however many images" in sentence
    assert "costs 0.050 of AUC (0.800 against 0.850)" in sentence


def test_the_report_says_it_in_words_and_only_where_it_was_compared(
    summary: dict[str, Any], tmp_path: Path
) -> None:
    write_report(summary, [], tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text()
    assert 'id="units"' in text
    assert "a patient with 3 images" in text
    assert "arXiv:2401.10294" in text
    plain = copy.deepcopy(summary)
    del plain["references"]["image_level"]
    write_report(plain, [], tmp_path / "plain.html")
    assert 'id="units"' not in (tmp_path / "plain.html").read_text()


def test_no_useful_bound_and_no_auc_are_said_so(summary: dict[str, Any], tmp_path: Path) -> None:
    changed = copy.deepcopy(summary)
    reference = changed["references"]["image_level"]
    reference["auc"] = None
    reference["costs"]["image_for_patients"][-1][1] = None
    write_report(changed, [], tmp_path / "report.html")
    assert "no useful bound" in (tmp_path / "report.html").read_text()
    compared = units_compared(changed)
    assert compared is not None
    assert "no useful bound is left" in unit_sentence(compared)
    assert "cannot be compared" in unit_sentence(compared)
