"""Dependencies point one way, and ruff says so when they do not."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
OWN = {"fedmed", "strategies", "clients", "experiments"}
# What each may import of these.
MAY = {"fedmed": {"fedmed"}, "strategies": {"fedmed", "strategies"}, "clients": {"fedmed", "clients"}}
# All of Flower that its documentation lists; the rest moves between versions.
PUBLIC = {"flwr", "flwr.app", "flwr.serverapp", "flwr.clientapp"}
FILES = sorted(path for package in MAY for path in (ROOT / package).rglob("*.py"))


def imports(path: Path) -> list[str]:
    """Every module that a file imports, wherever in it: in functions, under TYPE_CHECKING, by name."""
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    found = []
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(filter(None, (base, node.module)))
            found += [module, *(f"{module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            found += [
                arg.value for arg in node.args if isinstance(arg, ast.Constant) and isinstance(arg.value, str)
            ]
    return found


def test_the_walk_saw_the_code() -> None:
    assert len(FILES) > 40
    assert {path.relative_to(ROOT).parts[0] for path in FILES} == set(MAY)
    every = [name for path in FILES for name in imports(path)]
    assert len(every) > 300
    assert {"fedmed.config", "strategies.folder", "clients.site"} <= set(every)


@pytest.mark.parametrize("package", MAY)
def test_dependencies_point_one_way(package: str) -> None:
    seen = 0
    for path in (path for path in FILES if path.relative_to(ROOT).parts[0] == package):
        for name in imports(path):
            top = name.partition(".")[0]
            assert top not in OWN - MAY[package], f"{path}: {name}"
            seen += top in MAY[package]
    assert seen > 3


def test_private_flower_is_touched_in_one_file() -> None:
    flower = [(path, name) for path in FILES for name in imports(path) if name.split(".")[0] == "flwr"]
    assert len({path for path, _ in flower}) >= 4
    touching = {
        path.relative_to(ROOT).as_posix()
        for path, name in flower
        if ".".join(name.split(".")[:2]) not in PUBLIC or name.count(".") > 2
    }
    assert touching == {"fedmed/flower.py"}


def ruff(text: str, where: str) -> str:
    """What ruff says of a file with this text at this place, by the settings that hold there."""
    ended = subprocess.run(
        [sys.executable, "-m", "ruff", "check", "--output-format=concise", f"--stdin-filename={where}", "-"],
        input=text, capture_output=True, text=True, cwd=ROOT,
    )  # fmt: skip
    assert ended.returncode in (0, 1), ended.stderr
    return ended.stdout


@pytest.mark.parametrize("package", MAY)
@pytest.mark.parametrize("imported", sorted(OWN))
def test_ruff_refuses_what_points_the_other_way(package: str, imported: str) -> None:
    for line in (f"import {imported}.a\n", f"from {imported} import a\n"):
        said = ruff(f"{line}\n__all__ = ['a', '{imported}']\n", f"{package}/new.py")
        assert ("TID251" in said) == (imported not in MAY[package]), said


def test_the_other_rules_hold_in_every_folder() -> None:
    """The settings of a folder extend those of the repository and do not replace them."""
    unsorted = "import os\nimport ast\n\n__all__ = ['ast', 'os']\n"
    long = f"x = '{'a' * 130}'\n"
    for package in MAY:
        assert "I001" in ruff(unsorted, f"{package}/new.py")
        assert "E501" in ruff(long, f"{package}/new.py")
        assert "All checks passed" in ruff(
            "import ast\nimport os\n\n__all__ = ['ast', 'os']\n", f"{package}/new.py"
        )
