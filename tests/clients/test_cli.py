"""`fedmed site`, with the commands of this checkout, whichever is installed."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from clients.folder import SiteFolder
from clients.policy import Policy
from tests.clients.test_policy_file import fields

ROOT = Path(__file__).parent.parent.parent


def test_init_and_policy(command: Any, tmp_path: Path) -> None:
    folder = tmp_path / "site"
    code, out, err = command("site", "init", folder, "--name", "mercy")
    assert (code, out) == (0, f"site 'mercy': {folder}\n")
    assert err.startswith(f"next: name in {folder / 'site.yaml'} the data, its patient column")
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
