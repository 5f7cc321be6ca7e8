"""The root command: finds the commands, and turns every failure into one line and an exit code."""

import os
import sys
from importlib.metadata import entry_points

import typer

from fedmed.errors import FedmedError

HELP = """Federated fine-tuning of medical foundation models with patient-level differential privacy.

\b
Examples:
  fedmed run experiment=demo
  fedmed plan privacy.epsilon=1
  fedmed task describe patients.csv --site-column hospital --label outcome
"""


def build_app() -> typer.Typer:
    """The whole command, with what the coordinator's and the sites' side add by entry points."""
    # Typer's own tracebacks print local variables, which may hold data.
    app = typer.Typer(help=HELP, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None)
    from fedmed.cli.task import app as task

    app.add_typer(task, name="task")
    for entry in sorted(entry_points(group="fedmed.commands"), key=lambda entry: entry.name):
        entry.load()(app)
    return app


def main() -> None:
    """Run a command. Exit codes: 0 done, 1 failed, 2 a wrong setting or input, 130 interrupted."""
    for name, value in (
        ("HF_HUB_OFFLINE", "1"),
        ("FLWR_TELEMETRY_ENABLED", "0"),
        ("TOKENIZERS_PARALLELISM", "false"),
    ):
        os.environ.setdefault(name, value)
    try:
        build_app()(standalone_mode=True)
    except FedmedError as error:
        _fail(str(error), error.exit_code)
    except KeyboardInterrupt:
        _fail("interrupted; finished rounds are kept: continue with fedmed run resume=<run folder>", 130)
    except BrokenPipeError:
        # The reader (head, less) is gone; there is nobody left to tell.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except Exception as error:
        if os.environ.get("FEDMED_DEBUG"):
            raise
        # The text of a foreign exception may hold data; its type and place do not.
        trace = error.__traceback__
        while trace is not None and trace.tb_next is not None:
            trace = trace.tb_next
        place = f"{trace.tb_frame.f_code.co_filename}:{trace.tb_lineno}" if trace else "?"
        _fail(f"internal: {type(error).__name__} at {place}; set FEDMED_DEBUG=1 for the traceback", 1)


def _fail(message: str, code: int) -> None:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(code)
