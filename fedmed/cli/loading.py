"""Loading what takes seconds to load."""

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def loading(name: str | None = None) -> Iterator[None]:
    """Around imports of large packages: nobody looks for garbage among what they make, which took a fifth of the time.

    What was made is left out of all later searches; processes that are forked then share its memory.

    Args:
        name: what a person is told to wait for.
    """
    if name:
        print(f"loading {name} …", file=sys.stderr, flush=True)
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
