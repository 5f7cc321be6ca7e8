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


def test_private_flower_is_touched_in_one_package() -> None:
    flower = [(path, name) for path in FILES for name in imports(path) if name.split(".")[0] == "flwr"]
    assert len({path for path, _ in flower}) >= 4
    touching = {
        path.relative_to(ROOT).parent.as_posix()
        for path, name in flower
        if ".".join(name.split(".")[:2]) not in PUBLIC or name.count(".") > 2
    }
    assert touching == {"fedmed/flower"}


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


def calls(path: Path) -> list[tuple[str, str]]:
    """Every call in a file: the function that it stands in, and the name that is called."""
    found = []

    def walk(node: ast.AST, inside: str) -> None:
        for child in ast.iter_child_nodes(node):
            here = child.name if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef) else inside
            if isinstance(child, ast.Call):
                found.append((here, ast.unparse(child.func).rpartition(".")[2]))
            walk(child, here)

    walk(ast.parse(path.read_text("utf-8")), "")
    return found


def test_nothing_but_the_gate_s_output_becomes_a_message_of_a_site() -> None:
    """A reply is made in one place, from what a desk gives, which is what its gate released."""
    files = [path for path in FILES if path.relative_to(ROOT).parts[0] == "clients"]
    every = [(path.name, *call) for path in files for call in calls(path)]
    assert [call for call in every if call[2] == "Message"] == [("client_app.py", "_reply", "Message")]
    handlers = [call for call in every if call[2] == "_reply"]
    assert {name for _, name, _ in handlers} == {"query", "end", "train", "evaluate"}
    # No content is made by hand.
    for made in ("RecordDict", "ConfigRecord", "ArrayRecord", "MetricRecord", "Array", "Error"):
        assert made not in {name for _, _, name in every}
    # Whatever a desk returns, the gate has released.
    for desk in desks(ROOT / "clients" / "guard.py"):
        for method in ("quote", "train", "evaluate", "end"):
            returned = [ast.unparse(node.value) for node in returns(desk, method)]
            assert returned
            assert all(text.startswith((*RELEASES, "self._train(", "self._evaluate(")) for text in returned)
    guard = next(desk for desk in desks(ROOT / "clients" / "guard.py") if desk.name == "Guard")
    for method in ("_train", "_evaluate", "_charged"):
        inner = [ast.unparse(node.value) for node in returns(guard, method) if node.value is not None]
        released = [text for text in inner if text.startswith(RELEASES)]
        assert released
        # Besides them, only what the mechanisms inside give to the gate.
        assert set(inner) - set(released) <= {
            "(_receipt(instruction, site, update.noise_draws), update.delta)"
        }


RELEASES = ("self.gate.release(", "Gate(None).release(", "self._charged(")


def desks(path: Path) -> list[ast.ClassDef]:
    found = [node for node in ast.parse(path.read_text("utf-8")).body if isinstance(node, ast.ClassDef)]
    assert {"Guard", "NoGuard"} <= {node.name for node in found}
    return [node for node in found if node.name in ("Guard", "NoGuard")]


def returns(desk: ast.ClassDef, method: str) -> list[ast.Return]:
    """The method's own return statements, without those of functions within it."""
    function = next(node for node in desk.body if isinstance(node, ast.FunctionDef) and node.name == method)
    inner = {id(leaf) for node in ast.walk(function) if isinstance(node, ast.FunctionDef) and node is not function
             for leaf in ast.walk(node)}  # fmt: skip
    return [node for node in ast.walk(function)
            if isinstance(node, ast.Return) and node.value is not None and id(node) not in inner]  # fmt: skip


def test_records_for_outside_are_built_by_the_gate_alone() -> None:
    """What leaves a site is written by `fedmed/privacy/release.py`; the coordinator writes instructions."""
    builders = {
        "quote_record",
        "update_record",
        "scores_record",
        "private_scores_record",
        "ended_record",
        "head_record",
    }
    where = {
        path.relative_to(ROOT).as_posix() for path in FILES for _, name in calls(path) if name in builders
    }
    assert where == {"fedmed/privacy/release.py"}
    messages = {
        (path.relative_to(ROOT).as_posix(), inside)
        for path in FILES
        for inside, name in calls(path)
        # A method of Flower's Grid that nothing here calls.
        if name == "Message" and inside != "create_message"
    }
    assert messages == {
        ("clients/client_app.py", "_reply"), ("strategies/sites.py", "_ask"),
        ("fedmed/flower/in_process.py", "constant_failure"), ("fedmed/flower/in_process.py", "_unavailable"),
        ("fedmed/flower/objects.py", "failed"),
        ("fedmed/flower/node.py", "refused"),
    }  # fmt: skip


def test_a_refusal_is_one_of_the_gate_s_constants() -> None:
    """Whoever refuses a message writes which constant leaves, in so many words."""
    codes = [
        ast.unparse(node.args[1])
        for path in FILES
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "refused"
    ]
    assert {"Code.PAUSED", "Code.BUNDLE"} <= set(codes)
    assert all(code.startswith("Code.") for code in codes)
