"""The exceptions that fedmed raises on purpose: each message names the value, what was expected, the next step."""

import difflib
import os
from collections.abc import Iterable


class FedmedError(Exception):
    """Something a person can mend. Printed as one line; the command ends with `exit_code`."""

    exit_code = 2

    @property
    def lines(self) -> tuple[str, ...]:
        """What a command prints, one error a line."""
        return (str(self),)


class ConfigError(FedmedError):
    """A setting is unknown, out of range, or does not fit another one."""


class DataError(FedmedError):
    """A data set cannot be used as declared. The message never holds a value of a record."""


class ModelError(FedmedError):
    """A model or adapter cannot be loaded or does not fit the task."""


class PrivacyError(FedmedError):
    """A privacy claim could not be made for what was asked; nothing was run."""


class RunError(FedmedError):
    """A run that had started could not go on."""

    exit_code = 1


class Interrupted(FedmedError):
    """A person stopped a run. The message names the folder from which it can go on."""

    exit_code = 130


def require(ok: bool, name: str, value: object, expected: str) -> None:
    """Raise `ConfigError` naming the setting, its value and the expectation, unless `ok`.

    >>> require(False, "privacy.max_grad_norm", -1.0, "> 0")
    Traceback (most recent call last):
    fedmed.errors.ConfigError: privacy.max_grad_norm=-1.0: expected > 0
    """
    if not ok:
        raise ConfigError(f"{name}={'null' if value is None else value}: expected {expected}")


def internal(error: BaseException) -> str:
    """An unexpected exception as one line: its type and its place, without its text, which may hold data."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    place = f"{trace.tb_frame.f_code.co_filename}:{trace.tb_lineno}" if trace else "?"
    # The system's own words for an error number, e.g. "No space left on device".
    words = f" ({os.strerror(error.errno)})" if isinstance(error, OSError) and error.errno else ""
    return f"internal: {type(error).__name__}{words} at {place}; set FEDMED_DEBUG=1 for the traceback"


def nearest(wrong: str, valid: Iterable[str]) -> str:
    """A hint for an unknown name: the closest valid one, else all of them.

    >>> nearest("fedadm", ["fedavg", "fedadam"])
    "did you mean 'fedadam'?"
    """
    options = sorted(valid)
    close = difflib.get_close_matches(wrong, options, n=1, cutoff=0.5)
    if not close:
        # A dotted key is often right in its last word and wrong in its path.
        tails = {option.rpartition(".")[2]: option for option in options}
        tail = difflib.get_close_matches(wrong.rpartition(".")[2], tails, n=1, cutoff=0.7)
        close = [tails[tail[0]]] if tail else []
    if close:
        return f"did you mean '{close[0]}'?"
    return f"valid: {', '.join(options)}" if len(options) <= 20 else "see: fedmed run --help"
