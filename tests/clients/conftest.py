"""What the tests of the sites' commands share."""

import sys
from typing import Any

import pytest

import fedmed.cli.main


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """`fedmed ARGUMENTS` in this process: its exit code, output and errors."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["fedmed", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            fedmed.cli.main.main()
        out, err = capsys.readouterr()
        return int(ended.value.code or 0), out, err

    return run
