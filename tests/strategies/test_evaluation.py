"""The evaluation of what is released: charged before it is asked for, asked for once, and said to be what it is."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import clients.site
import strategies.evaluation
from fedmed.compose import compose
from fedmed.errors import ConfigError
from fedmed.privacy.histogram import HistogramPlan, metrics_plans, site_epsilon
from fedmed.private_metrics import NoisyHistogram, bin_edges
from strategies.evaluation import final_figures, private_result
from strategies.folder import RunFolder
from strategies.forecast import forecast
from strategies.sites import Sites
from tests.strategies.test_run import QUICK, SITES, run, summary_of

PRIVATE = ["task=heart", "privacy.metrics=private", "privacy.metrics_epsilon=2"]


@pytest.fixture(scope="module")
def private_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(tmp_path_factory.mktemp("private") / "run", *PRIVATE)


def again(folder: Path, *overrides: str) -> None:
    """What `fedmed run resume=…` does."""
    from clients.client_app import app as client_app
    from fedmed.flower.in_process import run_in_process
    from strategies.server_app import app as server_app

    texts = " ".join([f"resume={folder}", *overrides])
    run_in_process(server_app, client_app, nodes=4, workers=1, run_config={"overrides": texts})


def test_the_epsilon_of_a_private_run_is_that_of_training_and_metrics(private_run: Path) -> None:
    """Also in table, report and card; no exact figure is anywhere."""
    summary = summary_of(private_run)
    config = compose([*QUICK, *PRIVATE])
    plans, histograms = RunFolder(private_run).plans(), metrics_plans(config.task, config.privacy)
    for site, spent in summary["privacy"]["sites"].items():
        assert spent["epsilon"] == site_epsilon(plans[site], histograms[site])
        assert spent["epsilon_training"] == plans[site].epsilon() <= 3
        assert spent["epsilon_metrics"] == histograms[site].epsilon() <= 2
        assert 3.5 < spent["epsilon"] < 5
        assert spent["epsilon_rdp"] > spent["epsilon"]
    privacy = summary["privacy"]
    assert privacy["consortium"]["one_site"]["epsilon"] == privacy["sites"]["Hungary"]["epsilon"]
    assert privacy["consortium"]["all_sites"]["epsilon"] > 8
    assert privacy["metrics"]["expected_auc_error"] == summary["test"]["expected_auc_error"] < 0.05
    assert not [line for line in privacy["outside"] if "exact" in line]
    test = summary["test"]
    assert (test["release"], test["covered_by_epsilon"]) == ("private", True)
    assert list(test["sites"]) == SITES
    assert test["auc_interval"][0] < test["auc"] < test["auc_interval"][1]
    printed = f"{privacy['sites']['Hungary']['epsilon']:.1f}"
    for name in ("report.html", "MODEL_CARD.md"):
        text = (private_run / name).read_text()
        assert printed in text
        assert "private metrics" in text
        assert not re.search(r"exact(?!e)(?!ly)", re.sub(r"<style>.*?</style>", "", text, flags=re.DOTALL)), (
            name
        )


def test_nothing_is_evaluated_before_the_end(private_run: Path) -> None:
    history = json.loads((private_run / "history.json").read_text())
    assert [(entry["auc"], entry["site_metrics"]) for entry in history] == [(None, {})] * 2
    # Per round: what training has spent.
    assert history[-1]["epsilon"]["Hungary"] == pytest.approx(3, rel=1e-3)
    events = [json.loads(line)["event"] for line in (private_run / "journal.jsonl").read_text().splitlines()]
    assert events == ["round-sent", "round-sent", "metrics-sent"]


@pytest.mark.usefixtures("no_report")
def test_a_run_that_is_continued_reads_its_metrics_and_draws_no_others(
    private_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = summary_of(private_run)["test"]
    asked: list[Any] = []
    monkeypatch.setattr(Sites, "evaluate_privately", lambda *_: asked.append(_))
    again(private_run)
    assert summary_of(private_run)["test"] == before
    kept = (private_run / "metrics.json").read_bytes()
    (private_run / "metrics.json").unlink()
    # The answer is lost: it stays spent, and there is no second one.
    again(private_run)
    lost = summary_of(private_run)
    assert (lost["test"]["auc"], lost["test"]["sites"]) == (None, {})
    assert lost["privacy"]["sites"]["Hungary"]["epsilon"] > 3.5
    (private_run / "metrics.json").write_bytes(kept)
    with pytest.raises(ConfigError, match="once per run; start a new run"):
        again(private_run, "rounds=3")
    assert not asked


@pytest.fixture
def no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("strategies.run.write_report", lambda *_: None)


def test_the_journal_lasts_before_a_site_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A crash in between costs the metrics, never a second draw."""

    class Crash(Exception):
        pass

    def crash(*_: object) -> None:
        assert RunFolder(tmp_path / "run").metrics_asked()
        raise Crash

    monkeypatch.setattr(strategies.evaluation.Sites, "evaluate_privately", crash)
    with pytest.raises(Crash):
        run(tmp_path / "run", *PRIVATE)
    assert not (tmp_path / "run" / "summary.json").exists()


def test_a_site_that_drew_by_another_plan_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is merged has the noise that its intervals and its charge are reckoned with."""
    draw = clients.site.private_score

    def other(instruction: Any, site: str, arrays: Any, own: Any) -> tuple[HistogramPlan, np.ndarray]:
        plan, counts = draw(instruction, site, arrays, own)
        changed = {**vars(plan), "noise_multiplier": 0.1} if site == "Hungary" else vars(plan)
        return HistogramPlan(**changed), counts

    monkeypatch.setattr(clients.site, "private_score", other)
    monkeypatch.setattr("strategies.run.write_report", lambda *_: None)
    summary = summary_of(run(tmp_path / "run", *PRIVATE))
    assert list(summary["test"]["sites"]) == [site for site in SITES if site != "Hungary"]
    assert summary["privacy"]["sites"]["Hungary"]["epsilon"] > 3.5


def test_a_run_without_metrics_asks_for_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("evaluate", "evaluate_privately"):
        monkeypatch.setattr(Sites, name, lambda *_: pytest.fail("a site was asked"))
    folder = run(tmp_path / "run", "task=heart", "privacy.metrics=none")
    summary = summary_of(folder)
    assert (summary["test"]["release"], summary["test"]["auc"]) == ("none", None)
    assert summary["privacy"]["sites"]["Hungary"]["epsilon"] <= 3
    assert not [line for line in summary["privacy"]["outside"] if "exact" in line]
    assert "not evaluated (privacy.metrics=none)" in capsys.readouterr().out
    for name in ("report.html", "MODEL_CARD.md"):
        text = (folder / name).read_text()
        assert "ot evaluated" in text
        assert "no answer" not in text


@pytest.mark.usefixtures("no_report")
def test_two_runs_in_folders_of_one_name_have_metrics_of_their_own(tmp_path: Path) -> None:
    """A site that lives on takes the second for another run, not for the first asking again."""
    one, other = (summary_of(run(tmp_path / name / "run", *PRIVATE)) for name in ("one", "other"))
    assert one["test"]["auc"] is not None
    assert other["test"]["auc"] is not None
    assert one["test"] != other["test"]


def test_a_refused_release_leaves_no_run_behind(tmp_path: Path) -> None:
    from fedmed.errors import PrivacyError

    with pytest.raises(PrivacyError, match="expected error of the AUC"):
        run(tmp_path / "run", "task=heart", "privacy.metrics=private")
    assert not (tmp_path / "run").exists()


def test_a_tracker_gets_private_names_and_the_whole_epsilon() -> None:
    config = compose([*QUICK, *PRIVATE])
    plans = _plans(config)
    edges = bin_edges(10)
    found = {"Hungary": NoisyHistogram(np.full((2, 10), 50.0), 2.0, edges)}
    figures = final_figures(config, plans, private_result(config, found))
    assert figures["private.auc"] == figures["private.auc/Hungary"] == pytest.approx(0.5)
    assert figures["epsilon.pld/Hungary"] > plans["Hungary"].epsilon()
    assert not [name for name in figures if name.startswith("exact")]
    # No site answered: the epsilon is spent all the same.
    nothing = final_figures(config, plans, private_result(config, {}))
    assert nothing.keys() == {f"epsilon.pld/{site}" for site in SITES}


def _plans(config: Any) -> dict[str, Any]:
    from fedmed.privacy.plan import make_plan

    return {site: make_plan(config, site) for site in config.task.declared_sizes}


def test_a_forecast_shows_the_metrics_cost_and_worth(capsys: pytest.CaptureFixture[str]) -> None:
    from strategies.console import print_forecast

    values = forecast(compose([*QUICK, *PRIVATE]))
    print_forecast(values)
    out = capsys.readouterr().out
    assert "composed of training (3.00) and private metrics (2.00)" in out
    assert "expected error of the AUC: 0.032" in out
    assert values["privacy"]["sites"]["Hungary"]["epsilon"] > 3.5
