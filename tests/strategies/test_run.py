"""A run, end to end: the same bits however many processes play the sites, and a summary that says what it cost."""

import json
import math
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import strategies.launch
import strategies.run
from clients.client_app import app as client_app
from fedmed.errors import ConfigError, RunError
from fedmed.flower.in_process import run_in_process
from fedmed.privacy.plan import PrivacyPlan
from strategies.folder import RunFolder
from strategies.rounds import Loop
from strategies.server_app import app as server_app
from tests.conftest import count

SITES = ["Cleveland", "Hungary", "Switzerland", "VA Long Beach"]
QUICK = ["model=logistic", "tracking=none", "rounds=2"]


def run(folder: Path, *overrides: str, workers: int = 1) -> Path:
    """What `fedmed run` does once every setting has been checked."""
    texts = [*QUICK, *overrides, f"run_dir={folder}"]
    run_in_process(
        server_app, client_app, nodes=4, workers=workers, run_config={"overrides": shlex.join(texts)}
    )
    return folder


def adapter(folder: Path) -> bytes:
    return (folder / "adapter" / "adapter.safetensors").read_bytes()


def summary_of(folder: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    return values


@pytest.fixture
def no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plots take longer than the runs whose bits are compared."""
    monkeypatch.setattr(strategies.run, "write_report", lambda *_: None)


@pytest.mark.usefixtures("no_report")
@pytest.mark.parametrize("model", ["logistic", "mlp"])
def test_bits_do_not_depend_on_how_many_processes_play_the_sites(model: str, tmp_path: Path) -> None:
    """Nor do they change from run to run; without privacy, with a fixed seed."""
    settings = [f"model={model}", "task=heart", "privacy=off", "rounds=3", "training.sample_rate=0.7"]
    workers = [1, 2, 3, 1] if model == "logistic" else [1, 3]
    if model == "mlp":
        settings.append("adapter=full")
    folders = [
        run(tmp_path / str(index), *settings, workers=number)
        for index, number in enumerate(workers * count(1, 3))
    ]
    assert len({adapter(folder) for folder in folders}) == 1
    histories = []
    for folder in folders:
        history = json.loads((folder / "history.json").read_text())
        histories.append([{k: v for k, v in entry.items() if k != "seconds"} for entry in history])
    assert all(history == histories[0] for history in histories)
    other = run(tmp_path / "other", *settings, "seed=1")
    assert adapter(other) != adapter(folders[0])


@pytest.mark.usefixtures("no_report")
def test_a_private_run_cannot_be_repeated_and_a_seeded_one_can(tmp_path: Path) -> None:
    """privacy.md, rule 8: the noise is the sites' secret; what a seed repeats is not private."""
    private = [run(tmp_path / f"p{i}", "seed=3") for i in range(2)]
    seeded = [run(tmp_path / f"s{i}", "seed=3", "privacy.seeded=true", workers=i + 1) for i in range(2)]
    assert adapter(private[0]) != adapter(private[1])
    assert adapter(seeded[0]) == adapter(seeded[1])
    assert summary_of(private[0])["privacy"]["private"]
    assert not summary_of(seeded[0])["privacy"]["private"]


def test_the_summary_of_a_private_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It has every figure that must stand beside an epsilon; its path is the last line printed."""
    folder = run(tmp_path / "run", "task=heart10")
    printed = capsys.readouterr().out
    assert printed.splitlines()[-1] == str(folder / "summary.json")
    assert "NOT PRIVATE" not in printed
    summary = summary_of(folder)

    test = summary["test"]
    assert test["release"] == "exact"
    assert list(test["sites"]) == SITES
    for figures in (test, *test["sites"].values()):
        assert 0 <= figures["accuracy"] <= 1
        assert figures["auc"] is None or 0 <= figures["auc"] <= 1
    assert test["auc"] > 0.6

    privacy = summary["privacy"]
    assert privacy["unit"] == "patient"
    assert privacy["adjacency"] == "add or remove one patient with all of its records"
    assert privacy["delta"] == 1e-4
    assert privacy["accountant"] == "pld"
    assert list(privacy["sites"]) == SITES
    plans = RunFolder(folder).plans()
    declared = {"Cleveland": 304, "Hungary": 260, "Switzerland": 46, "VA Long Beach": 130}
    for site, spent in privacy["sites"].items():
        assert 2.99 < spent["epsilon"] <= 3.0
        assert spent["epsilon"] == plans[site].epsilon()
        assert spent["noise_multiplier"] == plans[site].noise_multiplier > 0
        assert spent["sample_rate"] == 1.0
        assert spent["steps"] == 2
        assert spent["declared_size"] == round(0.66 * declared[site])

    assert summary["rounds"] == 2
    assert 0 < summary["seconds"]["training"] <= summary["seconds"]["total"]
    assert summary["bytes_up_per_round"] > 0
    assert summary["peak_rss_mb"] > 50
    for name in (
        "report.html",
        "MODEL_CARD.md",
        "history.json",
        "adapter/adapter.json",
        "checkpoint.safetensors",
    ):
        assert (folder / name).stat().st_size > 0
    assert not list(folder.rglob(".*"))


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        (["privacy=off"], "privacy=off: no clipping, no noise"),
        (["privacy.seeded=true"], "privacy.seeded=true"),
    ],
)
@pytest.mark.usefixtures("no_report")
def test_no_epsilon_stands_where_nothing_is_private(
    overrides: list[str], reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = run(tmp_path / "run", *overrides)
    privacy = summary_of(folder)["privacy"]
    assert not privacy["private"]
    assert reason in privacy["not_private_reason"]
    assert {site["epsilon"] for site in privacy["sites"].values()} == {None}
    assert privacy["accountant"] is privacy["delta"] is privacy["consortium"] is None
    printed = capsys.readouterr().out
    # Before the first round, and under the table.
    assert printed.count(f"NOT PRIVATE: {reason}") == 2
    assert not re.search(r"epsilon.{0,8}\d", printed)
    assert "NOT PRIVATE" in (folder / "MODEL_CARD.md").read_text()


@pytest.mark.usefixtures("no_report")
def test_a_site_whose_test_part_has_one_class_has_no_auc(tmp_path: Path) -> None:
    """And the others have; all of them count in the AUC over all sites."""
    path = tmp_path / "table.csv"
    rows = ["site,age,sick"]
    for index in range(200):
        site = "bcd"[index % 3] if index < 120 else "a"
        rows.append(f"{site},{20 + index % 60},{int(site != 'a' and index % 60 > 30)}")
    path.write_text("\n".join(rows) + "\n")
    folder = run(
        tmp_path / "run", "task=csv", f"task.path={path}", "task.site_column=site", "task.label=sick", "privacy=off",
        "task.declared_sizes={a: 80, b: 40, c: 40, d: 40}", "task.columns={age: {kind: numeric, low: 18, high: 90}}",
    )  # fmt: skip
    summary = summary_of(folder)
    test = summary["test"]
    assert test["sites"]["a"]["auc"] is None
    assert 0 <= test["sites"]["a"]["accuracy"] <= 1
    assert all(test["sites"][site]["auc"] is not None for site in "bcd")
    assert test["auc"] is not None
    assert summary["privacy"]["unit"] == "record"
    assert summary["privacy"]["adjacency"] == "add or remove one record"


@pytest.mark.usefixtures("no_report")
def test_each_reference_is_named_and_no_part_of_the_result(tmp_path: Path) -> None:
    """The adapter and the epsilon are those of the run without references."""
    settings = ["privacy.seeded=true", "task=heart10"]
    plain, beside = run(tmp_path / "plain", *settings), run(tmp_path / "beside", *settings, "reference=true")
    assert adapter(plain) == adapter(beside)
    references = summary_of(beside)["references"]
    assert list(references) == ["local_only", "non_private"]
    for reference in references.values():
        assert list(reference["sites"]) == SITES
    assert references["local_only"]["sites"] != references["non_private"]["sites"]
    assert len((beside / "journal.jsonl").read_text().splitlines()) == 2


@pytest.mark.usefixtures("no_report")
def test_a_site_that_has_died_costs_its_reference_not_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    train = Loop.run

    def run_loop(self: Loop, *args: Any, **options: Any) -> Any:
        if self.run_id == "local-only" and list(self.plans) == ["Hungary"]:
            raise RunError("round 1: 0 good replies of 1 sites")
        return train(self, *args, **options)

    monkeypatch.setattr(Loop, "run", run_loop)
    folder = run(tmp_path / "run", "privacy=off", "reference=true")
    assert list(summary_of(folder)["references"]["local_only"]["sites"]) == [
        s for s in SITES if s != "Hungary"
    ]
    assert "no reference of 'Hungary' alone" in capsys.readouterr().out


def refuse(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(*_: object) -> None:
        raise ConfigError("no tracker")

    monkeypatch.setattr("fedmed.tracking.NoTracker.start", start)


def lose_the_quorum(monkeypatch: pytest.MonkeyPatch) -> None:
    def run_loop(self: Loop, *_: object, **__: object) -> None:
        self.sent(1, SITES)
        raise RunError("no quorum")

    monkeypatch.setattr(Loop, "run", run_loop)


def test_a_run_that_fails_before_its_first_round_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse(monkeypatch)
    with pytest.raises(ConfigError, match="no tracker"):
        run(tmp_path / "run", "privacy=off")
    assert not (tmp_path / "run").exists()


def test_a_run_that_fails_takes_nothing_else_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """run_dir may name a folder that holds other things."""
    refuse(monkeypatch)
    (tmp_path / "sub").mkdir()
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="no tracker"):
        run(tmp_path, "privacy=off")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes.txt", "sub"]


def test_a_run_that_fails_after_a_round_was_sent_keeps_what_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lose_the_quorum(monkeypatch)
    with pytest.raises(RunError, match="no quorum"):
        run(tmp_path / "run")
    folder = RunFolder(tmp_path / "run")
    assert folder.rounds_sent() == 1
    assert sorted(folder.plans()) == SITES
    assert not (folder.path / "summary.json").exists()


def test_a_folder_that_holds_a_run_is_not_written_over(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"holds a run already; continue it with: fedmed run resume="):
        run(tmp_path, "privacy=off")
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


@pytest.mark.parametrize("field", ["noise_multiplier", "delta", "max_grad_norm"])
def test_a_site_that_refuses_the_plan_ends_the_run_before_any_round(
    field: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A coordinator that promises one epsilon and sends another plan is found out by the sites."""
    plan_of: Callable[..., PrivacyPlan] = strategies.launch.make_plan

    def tampered(*args: Any) -> PrivacyPlan:
        plan = plan_of(*args)
        return type(plan)(**{**vars(plan), field: 0.9 * getattr(plan, field)})

    monkeypatch.setattr(strategies.launch, "make_plan", tampered)
    with pytest.raises(ConfigError, match=r"refuses the run: plans\.Cleveland"):
        run(tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_figures_are_json_numbers() -> None:
    """A NaN would be no JSON; the writer refuses it, so that no run ends with an unreadable summary."""
    from fedmed.atomic import write_json

    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(Path("never written"), {"auc": math.nan})
    assert not Path("never written").exists()
