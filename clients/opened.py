"""Sites' folders that this process has opened: each once, and anew when somebody has changed it."""

import logging
from pathlib import Path

from clients.folder import FILES, LEDGER, SiteFolder
from clients.guard import Guard
from fedmed.devices import device_of, in_words
from fedmed.errors import FedmedError
from fedmed.privacy.ledger import Ledger

log = logging.getLogger("fedmed.site")

State = tuple[tuple[int, ...] | None, ...]
_open: dict[str, tuple[State, Guard]] = {}


def open_guard(path: str) -> Guard:
    """The guard of a site's folder. A changed site.yaml or key, or another ledger, counts from the next call on.

    Models and prepared data are kept elsewhere: they stay.

    Raises:
        SiteError, PolicyError, LedgerError: the folder cannot be used.
        ConfigError: the accelerator that site.yaml names is not there.
    """
    folder = Path(path)
    # Read first: what changes while the folder is opened makes the next call open it again.
    state = _state(folder)
    known = _open.get(path)
    if known is not None and known[0] == state:
        return known[1]
    try:
        site = SiteFolder.open(folder)
        device = device_of(site.policy.device)
        guard = Guard(site, Ledger(site.path / LEDGER, site))
    except FedmedError as error:
        # No data has been opened: this is of files and settings, and says what to do about them.
        for line in error.lines:
            log.error("%s", line)
        raise
    log.info("networks compute on: %s", in_words(device))
    close_guard(path)
    _open[path] = state, guard
    return guard


def close_guard(path: str) -> None:
    """Close the ledger of a folder that was opened here, if it was."""
    _, guard = _open.pop(path, (None, None))
    if guard is not None:
        guard.ledger.close()


def _state(folder: Path) -> State:
    """What differs once a file was written, replaced, or opened to others. The ledger is written to all the time:
    of it, which file it is counts."""
    found: list[tuple[int, ...] | None] = []
    for place in (folder, *(folder / name for name in FILES)):
        try:
            status = place.stat()
        except OSError:
            found.append(None)
            continue
        which = status.st_dev, status.st_ino, status.st_mode
        written = status.st_size, status.st_mtime_ns, status.st_ctime_ns
        found.append(which if place in (folder, folder / LEDGER) else which + written)
    return tuple(found)
