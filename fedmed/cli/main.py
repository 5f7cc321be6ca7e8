"""The root command: finds the commands, and turns every failure into one line and an exit code."""

import atexit
import gc
import os
import re
import sys
from importlib.metadata import entry_points

import click
import typer

from fedmed.errors import FedmedError, internal

HELP = """Federated fine-tuning of medical foundation models with patient-level differential privacy.

\b
Examples:
  fedmed run experiment=demo
  fedmed plan privacy.epsilon=1
  fedmed task describe patients.csv --site-column hospital --label outcome
  fedmed models list
  fedmed site init sites/mercy --name mercy
  fedmed privacy report --site sites/mercy
"""

LONGEST = 1000

# Nothing is downloaded and nothing is reported, unless the environment says otherwise.
QUIET = {"HF_HUB_OFFLINE": "1", "FLWR_TELEMETRY_ENABLED": "0", "TOKENIZERS_PARALLELISM": "false"}
# Those of them that the environment did not set: `fedmed models pull` goes online unless a person forbade it.
defaulted: set[str] = set()


def build_app() -> typer.Typer:
    """The whole command, with what the coordinator's and the sites' side add by entry points."""
    # Typer 0.20 would show its marks as `\[required]`: it escapes them for rich, which does not print this help.
    typer.core.HAS_RICH = False
    # Typer's own tracebacks print local variables, which may hold data.
    app = typer.Typer(help=HELP, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None)
    from fedmed.cli.embed import EMBED_HELP, embed
    from fedmed.cli.models import app as models
    from fedmed.cli.privacy import app as privacy
    from fedmed.cli.task import app as task

    app.add_typer(task, name="task")
    app.add_typer(models, name="models")
    app.add_typer(privacy, name="privacy")
    app.command("embed", help=EMBED_HELP)(embed)
    for entry in sorted(entry_points(group="fedmed.commands"), key=lambda entry: entry.name):
        entry.load()(app)
    return app


def main() -> None:
    """Run a command. Exit codes: 0 done, 1 failed, 2 a wrong setting or input, 130 interrupted."""
    defaulted.update(QUIET.keys() - os.environ.keys())
    os.environ.update({name: QUIET[name] for name in defaulted})
    # The last search for garbage, among all that torch has made, would take a second.
    atexit.register(gc.freeze)
    try:
        # Standalone, click would print three lines for a wrong option.
        code = typer.main.get_command(build_app()).main(prog_name="fedmed", standalone_mode=False)
        if code == 130:
            # What Typer makes of Ctrl-C. A run that can go on raises `Interrupted` instead.
            _fail("interrupted; nothing was kept", code=130)
        sys.exit(code or 0)
    except FedmedError as error:
        _fail(*error.lines, code=error.exit_code)
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        sys.exit(2)
    except click.ClickException as error:
        context = getattr(error, "ctx", None)
        # Typer and click both append their suggestion.
        message = re.sub(r"( Did you mean [^?]*\?)\1", r"\1", error.format_message())
        _fail(f"{message} See: {context.command_path if context else 'fedmed'} --help", code=2)
    except (KeyboardInterrupt, click.Abort):
        _fail("interrupted; nothing was kept", code=130)
    except BrokenPipeError:
        # The reader (head, less) is gone; there is nobody left to tell.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except Exception as error:
        if os.environ.get("FEDMED_DEBUG"):
            raise
        _fail(internal(error), code=1)


def _fail(*messages: str, code: int) -> None:
    """End with one line a message, whatever a value in it holds: line breaks, escape codes, a megabyte."""
    for message in messages:
        line = re.sub(r"[\x00-\x1f\x7f-\x9f]+", " ", message)
        if len(line) > LONGEST:
            line = f"{line[: LONGEST // 2]} … {line[-LONGEST // 2 :]}"
        print(f"error: {line}", file=sys.stderr)
    sys.exit(code)
