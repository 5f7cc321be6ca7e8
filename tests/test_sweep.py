"""Sweeps: all jobs checked before the first starts, what fails stops nothing, and all of it is charged."""

import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dp_accounting
import pytest
from dp_accounting.pld import PLDAccountant

from fedmed.compose import compose_sweep
from fedmed.config import RunConfig
from fedmed.errors import ConfigError, Interrupted, RunError
from fedmed.privacy.accounting import round_up
from fedmed.privacy.plan import make_plan
from strategies.summary import privacy_statement
from strategies.sweep import run_sweep
from tests.commands import FAST, Ended, heavy, light
from tests.conftest import sha256

CANARY = "PATIENT-4711"
# Two of the four jobs fail: one as nobody expected, one as somebody did.
FAILING = f"""
import strategies.run
from fedmed.errors import RunError
create = strategies.run.RunFolder.create
def broken(config, plans, **rest):
    if config.seed == 1:
        raise ValueError("{CANARY}")
    if config.seed == 2:
        raise RunError("round 1: 1 good replies of 4 sites")
    return create(config, plans, **rest)
strategies.run.RunFolder.create = broken
strategies.run.write_report = lambda *_: None
"""


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> tuple[Ended, Path]:
    """A sweep of four jobs, as typed, and where it ran."""
    path = tmp_path_factory.mktemp("swept")
    return heavy()("run", "-m", *FAST, "rounds=2", "seed=0,1,2,3", cwd=path, before=FAILING), path


def saved(path: Path) -> dict[str, Any]:
    (file,) = path.glob("sweeps/*/sweep.json")
    values: dict[str, Any] = json.loads(file.read_text())
    return values


def test_a_failing_job_does_not_stop_the_others(swept: tuple[Ended, Path]) -> None:
    ended, path = swept
    assert ended.code == 1
    (root,) = path.glob("sweeps/*")
    assert ended.err.rstrip().rpartition("\n")[2] == (
        f"error: 2 of 4 jobs failed; why is in {root.relative_to(path)}/sweep.json"
    )
    assert "Traceback" not in ended.err
    jobs = saved(path)["jobs"]
    assert [job["overrides"][-1] for job in jobs] == ["seed=0", "seed=1", "seed=2", "seed=3"]
    assert [job["error"] is None for job in jobs] == [True, False, False, True]
    assert [(path / job["folder"] / "summary.json").exists() for job in jobs] == [True, False, False, True]
    assert not (root / "1").exists()
    for job in (jobs[0], jobs[3]):
        summary = json.loads((path / job["folder"] / "summary.json").read_text())
        assert job["auc"] == summary["test"]["auc"]
        assert job["epsilon"] == summary["privacy"]["consortium"]["one_site"]["epsilon"]


def test_a_failure_is_told_without_the_text_of_a_foreign_exception(swept: tuple[Ended, Path]) -> None:
    ended, path = swept
    jobs = saved(path)["jobs"]
    assert re.match(r"internal: ValueError at <string>:\d+;", jobs[1]["error"])
    assert jobs[2]["error"] == "round 1: 1 good replies of 4 sites"
    assert CANARY not in ended.out + ended.err + json.dumps(jobs)


def test_all_jobs_are_charged_together(swept: tuple[Ended, Path]) -> None:
    """Rule 14 of the privacy specification, against dp-accounting itself; a job that failed counts too."""
    ended, path = swept
    total = saved(path)["epsilon_of_all_jobs"]
    ledger = PLDAccountant(neighboring_relation=dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE)
    for _, config in compose_sweep([*FAST, "rounds=2", "seed=0,1,2,3"]):
        # All patients are in every step, so that the plan of one site is that of all.
        plan = make_plan(config, "Hungary")
        ledger.compose(dp_accounting.GaussianDpEvent(plan.noise_multiplier), plan.steps)
    assert total == pytest.approx(ledger.get_epsilon(1e-4), rel=1e-3)
    assert 3.0 < total < 4 * 3.0
    assert f"all jobs together: epsilon {round_up(total):.2f} (PLD) at a site" in ended.out


WRONG = [
    ("rounds=2,0", "rounds=0: expected >= 1"),
    ("task.label=num,nmu", "task.label=nmu: the table has no such column; did you mean 'num'?"),
    ("privacy.min_declared_size=20,300", "declares 201 training patients; privacy.min_declared_size=300"),
    ("privacy.delta=1e-4,1e-20", "privacy.delta=1e-20: expected > 0"),
]  # fmt: skip


@pytest.mark.parametrize(("swept_over", "message"), WRONG, ids=[text for text, _ in WRONG])
def test_one_wrong_job_and_nothing_runs(swept_over: str, message: str, tmp_path: Path) -> None:
    """Settings, data and plan of every job are looked at before the first starts, and before torch loads."""
    ended = light()("run", "-m", *FAST, swept_over, "seed=0,1", cwd=tmp_path)
    assert ended.err.count("\n") == 1
    assert message in ended.err
    assert (ended.code, ended.out, ended.torch) == (2, "", False)
    assert list(tmp_path.iterdir()) == []


def test_one_wrong_model_and_nothing_runs(tmp_path: Path) -> None:
    for name, text in (("config.json", "{}"), ("model.safetensors", "x"), ("vocab.txt", "")):
        (tmp_path / name).write_text(text)
    right = sha256(tmp_path / "model.safetensors")
    model = ["model=hf", f"model.path={tmp_path}", f"model.sha256={right},{'0' * 64}"]
    ended = light()("run", "-m", "tracking=none", *model, cwd=tmp_path)
    assert f"has {right}; pin that digest only if you trust" in ended.err
    assert (ended.code, ended.err.count("\n"), ended.torch) == (2, 1, False)
    assert not (tmp_path / "sweeps").exists()


# The sweep by itself, with a run that only writes its summary.


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def pretend(config: RunConfig, overrides: list[str]) -> None:
    """A run that ends at once."""
    folder = Path(overrides[-1].removeprefix("run_dir="))
    folder.mkdir(parents=True)
    plans = {site: make_plan(config, site) for site in config.task.declared_sizes}
    summary = {
        "privacy": privacy_statement(config, plans),
        "test": {"release": "exact", "auc": 0.5, "accuracy": None},
    }
    (folder / "summary.json").write_text(json.dumps(summary))


def failing(job: int, error: BaseException) -> Callable[[RunConfig, list[str]], None]:
    """The same, but this job fails."""

    def run(config: RunConfig, overrides: list[str]) -> None:
        if overrides[-1].endswith(f"/{job}"):
            raise error
        pretend(config, overrides)

    return run


def test_a_sweep_with_a_job_that_is_not_private_has_no_epsilon(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_sweep(compose_sweep([*FAST, "privacy=dp,off"]), pretend)
    assert saved(here)["epsilon_of_all_jobs"] is None
    assert [job["epsilon"] is None for job in saved(here)["jobs"]] == [False, True]
    out = capsys.readouterr().out
    assert "NOT PRIVATE as a whole" in out
    assert "all jobs together" not in out


def test_a_site_pays_for_the_jobs_it_took_part_in(here: Path) -> None:
    jobs = compose_sweep([*FAST, "task.declared_sizes={Cleveland: 304},{Hungary: 293}"])
    run_sweep(jobs, pretend)
    alone = max(
        make_plan(config, site).epsilon() for _, config in jobs for site in config.task.declared_sizes
    )
    assert saved(here)["epsilon_of_all_jobs"] == pytest.approx(alone, rel=1e-6)


def test_a_sweep_pays_for_private_metrics_too(here: Path) -> None:
    """privacy.md, rule 14: the composition of all that its runs spend."""
    jobs = compose_sweep([*FAST, "privacy.metrics=none,private", "privacy.metrics_epsilon=3"])
    run_sweep(jobs, pretend)
    (here / "other").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(here / "other")
        run_sweep([jobs[0], jobs[0]], pretend)
    spent = [job["epsilon"] for job in saved(here)["jobs"]]
    assert spent[0] < spent[1] < spent[0] + 3
    trained_twice = saved(here / "other")["epsilon_of_all_jobs"]
    assert trained_twice < saved(here)["epsilon_of_all_jobs"] < trained_twice + 3


def test_a_patient_and_a_record_do_not_add_up(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_sweep(compose_sweep([*FAST, "task.patient_column=id,null"]), pretend)
    assert saved(here)["epsilon_of_all_jobs"] is None
    assert "NOT PRIVATE as a whole" in capsys.readouterr().out


def test_what_was_typed_is_printed_as_it_is(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Not as markup of the console."""
    run_sweep(compose_sweep([*FAST, "task.title='[/b]'"]), pretend)
    assert capsys.readouterr().out.count("[/b]") == 2
    assert saved(here)["jobs"][0]["overrides"][-1] == "task.title='[/b]'"


def test_ctrl_c_ends_the_sweep_and_charges_what_had_begun(here: Path) -> None:
    jobs = compose_sweep([*FAST, "seed=0,1,2,3"])
    stop = Interrupted("interrupted; finished rounds are kept: continue with: fedmed run resume=x")
    with pytest.raises(Interrupted, match="resume=x"):
        run_sweep(jobs, failing(1, stop))
    values = saved(here)
    assert [job["error"] for job in values["jobs"]] == [None, "interrupted", "not started", "not started"]
    (other := here / "other").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(other)
        run_sweep(jobs[:2], pretend)
    assert values["epsilon_of_all_jobs"] == saved(other)["epsilon_of_all_jobs"]


def test_ctrl_c_between_jobs_keeps_those_that_are_done(here: Path) -> None:
    with pytest.raises(Interrupted, match=r"^interrupted; finished jobs are kept: sweeps/"):
        run_sweep(compose_sweep([*FAST, "seed=0,1"]), failing(1, KeyboardInterrupt()))
    assert [job["error"] for job in saved(here)["jobs"]] == [None, "interrupted"]


def test_ctrl_c_before_anything_is_done_leaves_nothing(here: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run_sweep(compose_sweep([*FAST, "seed=0,1"]), failing(0, KeyboardInterrupt()))
    assert list(here.glob("sweeps/*")) == []


def test_when_every_job_fails_the_reasons_are_kept(here: Path) -> None:
    def broken(_config: RunConfig, _overrides: list[str]) -> None:
        raise ConfigError("site 'a' refuses the run")

    with pytest.raises(RunError, match="2 of 2 jobs failed"):
        run_sweep(compose_sweep([*FAST, "seed=0,1"]), broken)
    assert {job["error"] for job in saved(here)["jobs"]} == {"site 'a' refuses the run"}


def test_two_sweeps_of_one_second_do_not_meet(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "strftime", lambda _format: "20300101-000000")
    for _ in range(3):
        run_sweep(compose_sweep([*FAST]), pretend)
    assert sorted(path.name for path in here.glob("sweeps/*")) == [
        "20300101-000000", "20300101-000000-2", "20300101-000000-3",
    ]  # fmt: skip
