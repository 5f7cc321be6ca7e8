"""The wheel: whole, and enough to run from any folder."""

import json
import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
TOP = ("fedmed", "strategies", "clients", "configs")
# Noise that need not be sought for an epsilon.
NOISE = ["privacy.epsilon=null", "privacy.noise_multiplier=9"]
# What the repository keeps beside a package and no installation needs.
LEFT_OUT = {"strategies/ruff.toml", "clients/ruff.toml"}


def carried() -> set[str]:
    """Every file on disk that an installation needs."""
    files = {
        path.relative_to(ROOT).as_posix() for top in TOP for path in (ROOT / top).rglob("*") if path.is_file()
    }
    return {name for name in files if "__pycache__" not in name and "/." not in name} - LEFT_OUT


def test_the_packages_of_the_project_are_the_folders_on_disk() -> None:
    on_disk = {
        path.parent.relative_to(ROOT).as_posix().replace("/", ".")
        for top in TOP
        for path in (ROOT / top).rglob("__init__.py")
    }
    assert len(on_disk) > 15
    assert sorted(PROJECT["tool"]["setuptools"]["packages"]) == sorted(on_disk)


def test_no_code_lies_in_a_folder_that_is_no_package() -> None:
    for name in carried():
        assert (ROOT / name).with_name("__init__.py").exists(), name


def test_the_commands_of_the_entry_points_exist() -> None:
    points = PROJECT["project"]["entry-points"]["fedmed.commands"] | PROJECT["project"]["scripts"]
    assert len(points) >= 2
    for reference in points.values():
        module, _, name = reference.partition(":")
        source = (ROOT / f"{module.replace('.', '/')}.py").read_text()
        assert f"def {name}(" in source


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from a copy, so that nothing is left in the repository."""
    copy = tmp_path_factory.mktemp("source")
    for name in TOP:
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", PROJECT["project"]["readme"], *PROJECT["project"]["license-files"]):
        shutil.copy(ROOT / name, copy)
    out = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", out, copy],
        check=True, capture_output=True,
    )  # fmt: skip
    (built,) = out.glob("*.whl")
    return built


def test_the_wheel_carries_every_file_and_no_other(wheel: Path) -> None:
    """Code, configs/**/*.yaml, the table of the demo, the templates; no test and no experiment."""
    with zipfile.ZipFile(wheel) as archive:
        inside = {name for name in archive.namelist() if ".dist-info/" not in name}
    expected = carried()
    for needed in ("configs/config.yaml", "fedmed/data/heart_disease.csv", "fedmed/report/report.html.j2"):
        assert needed in expected
    assert len([name for name in expected if name.endswith(".yaml")]) > 22
    assert inside == expected


def test_the_wheel_runs_from_any_folder(wheel: Path, tmp_path: Path) -> None:
    """Installed beside the same libraries, without this repository."""
    installed, elsewhere = tmp_path / "installed", tmp_path / "elsewhere"
    elsewhere.mkdir()
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", installed, wheel],
        check=True, capture_output=True,
    )  # fmt: skip
    assert (installed / "bin" / "fedmed").exists()
    # What would come from the repository after all is named at the end.
    probe = (
        "import atexit, sys; from fedmed.cli.main import main; "
        f"files = lambda: [m.__file__ for n, m in sys.modules.items() if n.split('.')[0] in {TOP} and m.__file__]; "
        f"atexit.register(lambda: print(len(files()), [f for f in files() if not f.startswith({str(installed)!r})])); "
        "main()"
    )
    ended = subprocess.run(
        [sys.executable, "-c", probe, "run", "model=logistic", "tracking=none", "rounds=1", "run_dir=run", *NOISE],
        cwd=elsewhere, env=os.environ | {"PYTHONPATH": str(installed)}, capture_output=True, text=True,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    assert ended.stderr == "loading torch …\n"
    modules, foreign = ended.stdout.splitlines()[-1].split(" ", 1)
    assert int(modules) > 30
    assert foreign == "[]"
    assert json.loads((elsewhere / "run" / "summary.json").read_text())["rounds"] == 1
    for name in ("report.html", "MODEL_CARD.md"):
        assert (elsewhere / "run" / name).stat().st_size > 1000
