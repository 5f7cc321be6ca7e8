"""The gate lets out what may leave by its type, and nothing else, at run time and for the type checker."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from fedmed.errors import PrivacyError
from fedmed.privacy.account import Attempt
from fedmed.privacy.ledger import Ledger
from fedmed.privacy.release import Approved, Ended, Gate, Privatised
from fedmed.records import Quote, Receipt, read_quote

ROOT = Path(__file__).parents[3]
OTHERS = [
    {"a": 1}, np.zeros(3), "an id", b"bytes", ValueError("a cell"), None, 0.73, [1, 2], (1, 2), True,
    Receipt(site="a", round=1, declared_size=40, noise_draws=3),
]  # fmt: skip


@pytest.mark.parametrize("value", OTHERS, ids=lambda value: type(value).__name__)
def test_a_value_of_another_type_does_not_leave_and_is_not_shown(value: object) -> None:
    with pytest.raises(PrivacyError, match=f"a {type(value).__name__} may not leave the site") as refused:
        Gate(None).release(value)  # type: ignore[arg-type]
    for text in ("an id", "a cell", "0.73"):
        assert text not in str(refused.value)


@pytest.mark.parametrize("inside", [*OTHERS[:4], (1, 2), ({"a": 1}, {}), ("receipt", np.zeros(2))], ids=str)
def test_nor_does_it_inside_of_one_that_may(inside: object) -> None:
    approved = Approved(site="a", run="r", value=inside, approval="Ada")  # type: ignore[arg-type]
    with pytest.raises((PrivacyError, TypeError, ValueError)):
        Gate(None).release(approved)


def test_what_was_charged_needs_a_ledger_to_commit_to() -> None:
    attempt = Attempt("n", "r", "c", "train", "{}", 1, "d")
    receipt = Receipt(site="a", round=1, declared_size=40, noise_draws=3)
    with pytest.raises(PrivacyError, match="without a ledger"):
        Gate(None).release(Privatised(site="a", value=(receipt, {}), attempt=attempt))


def test_what_may_leave_leaves() -> None:
    quote = Quote(site="a", declared_size=40, epsilon=3.0)
    assert read_quote(Gate(None).release(quote)) == quote
    assert "ended" in Gate(None).release(Ended("r"))


def test_the_type_checker_refuses_the_others(tmp_path: Path) -> None:
    file = tmp_path / "leak.py"
    calls = ['{"a": 1}', "np.zeros(3)", '"an id"', 'ValueError("a cell")', 'Ended("r")']
    lines = ["import numpy as np", "from fedmed.privacy.release import Ended, Gate", "gate = Gate(None)"]
    file.write_text("\n".join([*lines, *(f"gate.release({call})" for call in calls)]) + "\n")
    command = [sys.executable, "-m", "mypy", "--config-file", str(ROOT / "pyproject.toml"), str(file)]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert ended.returncode == 1, ended.stderr
    refused = [line.split(":")[1] for line in ended.stdout.splitlines() if "[arg-type]" in line]
    assert refused == ["4", "5", "6", "7"], ended.stdout


def test_a_ledger_that_refuses_lets_nothing_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError("disk")

    ledger = object.__new__(Ledger)
    for name in ("commit", "head", "outside"):
        monkeypatch.setattr(Ledger, name, fail)
    with pytest.raises(OSError, match="disk"):
        Gate(ledger).release(Ended("r"))
