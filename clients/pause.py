"""Whether a site takes new runs: a file in its folder says that it does not."""

from pathlib import Path

from fedmed.errors import FedmedError

PAUSED = "paused"


class Paused(FedmedError):
    """The site takes no new run for now. Raised before data is opened."""

    def __init__(self) -> None:
        super().__init__("the site is paused")


def is_paused(folder: Path) -> bool:
    """Whether the site in a folder takes no new run."""
    return (folder / PAUSED).exists()


def set_paused(folder: Path, paused: bool) -> None:
    """Refuse new runs from the next message on, or take them again."""
    if paused:
        (folder / PAUSED).touch(mode=0o600)
    else:
        (folder / PAUSED).unlink(missing_ok=True)
