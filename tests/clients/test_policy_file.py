"""site.yaml: every option written with its meaning, and read strictly."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel

from clients.folder import SiteFolder
from clients.policy import MetricsPolicy, Policy
from clients.policy_file import PolicyError, option_values, read_policy, render
from clients.refusal import Rule
from tests.clients.test_policy import asked, policy, refusal


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
    "device: gpu": "device=gpu: expected auto, cpu, cuda or cuda:N",
    "device: cpu:1": "device=cpu:1: expected auto, cpu, cuda or cuda:N",
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
