"""What takes its time and depends on arguments alone is kept for all processes of `make test`.

What dp-accounting works out about one step, and what we make of it: the same few steps are asked for again and again,
by the code and by the oracles, at up to a second each. What Hydra composes of the same few options. `make test-full`
works everything out anew.
"""

import functools
import hashlib
import inspect
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.evidence import FULL

# The folder, for the processes that a test starts too.
FOLDER = "FEDMED_TEST_KEPT"


def keep() -> None:
    """From now on this process, and its forks, look in the folder first."""
    if FULL or FOLDER not in os.environ:
        return
    import typer
    from dp_accounting.pld import privacy_loss_distribution
    from dp_accounting.rdp import rdp_privacy_accountant

    from fedmed import compose
    from fedmed.cli import main
    from fedmed.privacy import accounting

    for module, name in (
        (privacy_loss_distribution, "from_gaussian_mechanism"),
        (rdp_privacy_accountant, "_compute_rdp_poisson_subsampled_gaussian"),
        (accounting, "_epsilon_of"),
        (compose, "_composed"),
    ):
        function = getattr(module, name)
        if not hasattr(function, "kept"):
            setattr(module, name, kept(function, Path(os.environ[FOLDER])))
    # What may not change within a process is made once: the tree of commands, which each call of `main` makes anew.
    for module, name in (main, "build_app"), (typer.main, "get_command"):
        if not hasattr(getattr(module, name), "cache_info"):
            setattr(module, name, functools.cache(getattr(module, name)))


def kept(function: Callable[..., Any], folder: Path) -> Callable[..., Any]:
    """The same function, with its results in files: another process gets an object of its own."""
    signature = inspect.signature(function)
    cached = hasattr(function, "cache_info")
    function = inspect.unwrap(function)

    @functools.wraps(function)
    def asked(*arguments: Any, **options: Any) -> Any:
        bound = signature.bind(*arguments, **options)
        bound.apply_defaults()
        asked_for = pickle.dumps((function.__name__, bound.arguments))
        path = folder / hashlib.sha256(asked_for).hexdigest()
        if path.exists():
            return pickle.loads(path.read_bytes())
        made = function(*arguments, **options)
        draft = path.with_name(f"{path.name}.{os.getpid()}")
        draft.write_bytes(pickle.dumps(made))
        os.replace(draft, path)
        return made

    found = functools.cache(asked) if cached else asked
    found.kept = True  # type: ignore[attr-defined]
    return found
