"""What the tests of the sites' commands share."""

import sys
import tomllib
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest

import fedmed.cli.main

PROJECT = Path(__file__).parent.parent.parent / "pyproject.toml"


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """`fedmed ARGUMENTS` in this process: its exit code, output and errors."""
    # As this checkout registers them, whichever is installed.
    registered = tomllib.loads(PROJECT.read_text())["project"]["entry-points"]["fedmed.commands"]
    entries = [EntryPoint(name, value, "fedmed.commands") for name, value in registered.items()]
    monkeypatch.setattr(fedmed.cli.main, "entry_points", lambda group: entries if group else [])

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["fedmed", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            fedmed.cli.main.main()
        out, err = capsys.readouterr()
        return int(ended.value.code or 0), out, err

    return run
