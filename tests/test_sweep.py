"""Sweeps: all jobs checked before the first starts, what fails stops nothing, and all of it is charged."""

import dataclasses
import functools
import io
import json
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dp_accounting
import pytest
from dp_accounting.pld import PLDAccountant
from dp_accounting.rdp import RdpAccountant

from fedmed.compose import compose_sweep
from fedmed.config import RunConfig
from fedmed.errors import ConfigError, Interrupted, RunError
from fedmed.privacy.histogram import metrics_plans
from fedmed.privacy.in_words import round_up
from fedmed.privacy.plan import make_plan
from strategies.folder import RunFolder
from strategies.joint import announce
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


@functools.cache
def ledger(accountant: Any, *events: dp_accounting.DpEvent) -> Any:
    """dp-accounting by itself; sites whose plans are equal ask it once."""
    made = accountant(neighboring_relation=dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE)
    for event in events:
        made.compose(event)
    return made


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
    # All patients are in every step, so that the plan of one site is that of all.
    plans = [make_plan(config, "Hungary") for _, config in compose_sweep([*FAST, "rounds=2", "seed=0,1,2,3"])]
    steps = [
        dp_accounting.SelfComposedDpEvent(dp_accounting.GaussianDpEvent(plan.noise_multiplier), plan.steps)
        for plan in plans
    ]
    assert total == pytest.approx(ledger(PLDAccountant, *steps).get_epsilon(1e-4), rel=1e-3)
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


# Noise that need not be sought for an epsilon.
NOISE = ["privacy.epsilon=null", "privacy.noise_multiplier=12"]


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
    jobs = compose_sweep([*FAST, *NOISE, "privacy.metrics=none,private", "privacy.metrics_epsilon=1.5"])
    run_sweep(jobs, pretend)
    (here / "other").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(here / "other")
        run_sweep([jobs[0], jobs[0]], pretend)
    spent = [job["epsilon"] for job in saved(here)["jobs"]]
    assert spent[0] < spent[1] < spent[0] + 1.5
    trained_twice = saved(here / "other")["epsilon_of_all_jobs"]
    assert trained_twice < saved(here)["epsilon_of_all_jobs"] < trained_twice + 1.5


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


# What a sweep has cost, by its folder.


def written(job: Path, config: RunConfig, *, sent: int, metrics: bool = False) -> None:
    """A job's folder as a run leaves it that sent so many rounds."""
    job.mkdir(parents=True)
    plans = {site: make_plan(config, site) for site in config.task.declared_sizes}
    folder = RunFolder.create(dataclasses.replace(config, run_dir=str(job)), plans, run_id=job.name)
    for number in range(1, sent + 1):
        folder.journal(event="round-sent", round=number)
    if metrics:
        folder.journal(event="metrics-sent")


PARTS = [
    "privacy.metrics=private", "privacy.metrics_epsilon=1.5", "training.sample_rate=0.3", "privacy.epsilon=null",
]  # fmt: skip


@pytest.fixture
def unequal(here: Path) -> Path:
    """Jobs that ended, failed in the midst, died at work, and never sent anything."""
    jobs = compose_sweep([*FAST, *PARTS, "rounds=4", "privacy.noise_multiplier=9,5,3,2"])
    root = here / "sweeps" / "x"
    written(root / "0", jobs[0][1], sent=4, metrics=True)
    written(root / "1", jobs[1][1], sent=2)
    written(root / "2", jobs[2][1], sent=1)
    with (root / "2" / "journal.jsonl").open("a") as file:
        file.write('{"event": "round-s')
    written(root / "3", jobs[3][1], sent=0)
    return root


def independent(
    accountant: Any, configs: list[RunConfig], sent: list[int], site: str, *, metrics: int
) -> float:
    """dp-accounting by itself, of these rounds and of this many of the jobs' metrics."""
    steps = [
        dp_accounting.SelfComposedDpEvent(
            dp_accounting.PoissonSampledDpEvent(
                0.3, dp_accounting.GaussianDpEvent(make_plan(config, site).noise_multiplier)
            ),
            rounds * config.training.steps_per_round,
        )
        for config, rounds in zip(configs, sent, strict=True)
    ]
    histogram = metrics_plans(configs[0].task, configs[0].privacy)[site]
    drawn = dp_accounting.SelfComposedDpEvent(
        dp_accounting.GaussianDpEvent(histogram.noise_multiplier), metrics
    )
    return float(ledger(accountant, *steps, drawn).get_epsilon(1e-4))


def test_a_sweeps_folder_says_what_was_sent(unequal: Path) -> None:
    """Failed and unfinished jobs too; PLD and RDP against dp-accounting itself."""
    ended = light()("privacy", "sweep", str(unequal), "--json")
    assert (ended.code, ended.err, ended.torch) == (0, "", False)
    values = json.loads(ended.out)
    jobs = [*FAST, *PARTS, "rounds=4", "privacy.noise_multiplier=9,5,3"]
    configs = [config for _, config in compose_sweep(jobs)]
    assert values["jobs_sent"] == 3
    assert set(values["sites"]) == set(configs[0].task.declared_sizes)
    for site, cost in values["sites"].items():
        assert (cost["runs"], cost["rounds"], cost["delta"], cost["not_private"]) == (3, 7, 1e-4, None)
        for name, accountant in (("pld", PLDAccountant), ("rdp", RdpAccountant)):
            expected = independent(accountant, configs, [4, 2, 1], site, metrics=1)
            assert cost[f"epsilon_{name}"] == pytest.approx(expected, rel=0.01)
        whole = independent(PLDAccountant, configs, [4, 4, 4], site, metrics=3)
        assert cost["epsilon_pld_of_whole_plans"] == pytest.approx(whole, rel=0.01)
    ended = light()("privacy", "sweep", str(unequal))
    cost = values["sites"]["Hungary"]
    assert (
        f"site 'Hungary': epsilon {round_up(cost['epsilon_pld']):.2f} (PLD), {round_up(cost['epsilon_rdp']):.2f} (RDP) "
        f"at delta 0.0001; {cost['adjacency']} (3 jobs, 7 rounds sent)"
    ) in ended.out
    assert "jobs ended early; charged whole: epsilon" in ended.out


def test_a_sweep_that_ran_costs_what_it_said(swept: tuple[Ended, Path]) -> None:
    """Two of its four jobs sent nothing."""
    _, path = swept
    (root,) = path.glob("sweeps/*")
    values = json.loads(light()("privacy", "sweep", str(root), "--json").out)
    assert values["jobs_sent"] == 2
    (config, _) = (config for _, config in compose_sweep([*FAST, "rounds=2", "seed=0,3"]))
    plan = make_plan(config, "Hungary")
    steps = [dp_accounting.GaussianDpEvent(plan.noise_multiplier)] * (2 * plan.steps)
    alone = ledger(PLDAccountant, *steps).get_epsilon(1e-4)
    assert values["sites"]["Hungary"]["epsilon_pld"] == pytest.approx(alone, rel=0.01)


def test_a_job_without_privacy_leaves_no_epsilon_of_the_sweep(here: Path) -> None:
    for index, (_, config) in enumerate(compose_sweep([*FAST, "rounds=2", "privacy=dp,off"])):
        written(here / "s" / str(index), config, sent=1)
    ended = light()("privacy", "sweep", str(here / "s"))
    assert "site 'Hungary': NOT PRIVATE: privacy=off" in ended.out
    cost = json.loads(light()("privacy", "sweep", str(here / "s"), "--json").out)["sites"]["Hungary"]
    assert (cost["epsilon_pld"], cost["epsilon_rdp"], cost["epsilon_pld_of_whole_plans"]) == (
        None,
        None,
        None,
    )


def test_a_folder_that_tells_nothing_is_refused(unequal: Path, tmp_path: Path) -> None:
    ended = light()("privacy", "sweep", str(tmp_path / "nowhere"))
    assert (ended.code, ended.err.count("\n")) == (2, 1)
    assert "expected a sweep's, e.g. sweeps/" in ended.err
    assert "no sweep in it" in light()("privacy", "sweep", str(tmp_path)).err
    for name in ("plans.json", "config.json", "journal.jsonl"):
        content = (unequal / "1" / name).read_text()
        (unequal / "1" / name).write_text("{}\n")
        ended = light()("privacy", "sweep", str(unequal))
        assert (ended.code, ended.out) == (2, "")
        assert "is damaged: what the job has spent is not known" in ended.err
        (unequal / "1" / name).write_text(content)
    # What is missing is not free.
    (unequal / "1" / "summary.json").write_text("{}")
    (unequal / "1" / "journal.jsonl").rename(tmp_path / "journal.jsonl")
    assert "is damaged: what the job has spent" in light()("privacy", "sweep", str(unequal)).err
    shutil.rmtree(unequal / "1")
    jobs = [{"error": None}, {"error": None}, {"error": "failed"}, {"error": "not started"}]
    (unequal / "sweep.json").write_text(json.dumps({"jobs": jobs}))
    ended = light()("privacy", "sweep", str(unequal))
    assert (ended.code, ended.out) == (2, "")
    assert f"{unequal / '1'}: missing, though the job ended" in ended.err


# The question.


REAL = [
    "task.public_benchmark=false", "task.split=hash", "privacy.epsilon=null", "privacy.noise_multiplier=6,12",
    "rounds=3",
]  # fmt: skip


def test_a_sweep_on_real_cohorts_is_not_started_unasked(tmp_path: Path) -> None:
    ended = light()("run", "-m", *FAST, *REAL, cwd=tmp_path)
    assert (ended.code, ended.torch, ended.err.count("\n")) == (2, False, 1)
    assert ended.err.endswith("asks before it starts; without a terminal, agree with: --yes\n")
    assert "2 jobs on the same patients cost together, if every job runs whole:" in ended.out
    assert not (tmp_path / "sweeps").exists()
    for _, config in compose_sweep([*FAST, *REAL]):
        assert not config.task.public_benchmark


def test_what_is_announced_is_the_composition_of_all_jobs(capsys: pytest.CaptureFixture[str]) -> None:
    configs = [config for _, config in compose_sweep([*FAST, *REAL])]
    announce(configs, yes=True)
    out = capsys.readouterr().out
    for site in configs[0].task.declared_sizes:
        plans = [make_plan(config, site) for config in configs]
        said = re.search(rf"'{site}': epsilon ([\d.]+) \(PLD\), ([\d.]+) \(RDP\) at delta ([\d.e-]+)", out)
        assert said
        for text, accountant in zip(said.groups(), (PLDAccountant, RdpAccountant), strict=False):
            exact = ledger(accountant, *(plan.event() for plan in plans)).get_epsilon(plans[0].delta)
            assert exact <= float(text) <= exact * 1.01 + 0.01
        assert float(said[3]) == pytest.approx(plans[0].delta)


@pytest.mark.parametrize(("typed", "goes_on"), [("y\n", True), ("n\n", False), ("\n", False)])
def test_the_question(
    typed: str, goes_on: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    configs = [config for _, config in compose_sweep([*FAST, *REAL])]
    monkeypatch.setattr("sys.stdin", Terminal(typed))
    if goes_on:
        announce(configs, yes=False)
    else:
        with pytest.raises(RunError, match="the sweep was not started; nothing was spent"):
            announce(configs, yes=False)
    assert "go on? [y/N]" in capsys.readouterr().out


def test_who_is_asked(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Sites with a ledger are, whatever the task; nobody for public benchmarks alone."""
    monkeypatch.setattr("sys.stdin", io.StringIO())
    public = [config for _, config in compose_sweep([*FAST, "seed=0,1"])]
    announce(public, yes=False)
    assert capsys.readouterr().out == ""
    remembered = dataclasses.replace(
        public[1], federation=dataclasses.replace(public[1].federation, sites="sites")
    )
    real = next(config for _, config in compose_sweep([*FAST, *REAL]))
    for other in (remembered, real):
        with pytest.raises(ConfigError, match="--yes"):
            announce([public[0], other], yes=False)
        announce([public[0], other], yes=True)


def test_yes_starts_the_sweep(tmp_path: Path) -> None:
    ended = heavy()("run", "-m", "--yes", *FAST, *REAL, cwd=tmp_path, before=FAILING)
    assert (ended.code, ended.err.count("error")) == (0, 0), ended.err
    assert len(saved(tmp_path)["jobs"]) == 2
    assert ended.out.index("cost together") < ended.out.index("[1/2]")
