"""The process of `fedmed site start`: one a folder, ended by a signal after the message that it is at."""

import contextlib
import fcntl
import logging
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from clients.coordinator import admission, admission_name, trusted
from clients.folder import SiteError, SiteFolder
from clients.health import Health, served
from clients.logs import log_to
from fedmed.atomic import write_bytes, write_json

if TYPE_CHECKING:
    from fedmed.flower.site_link import SiteLink

log = logging.getLogger("fedmed.site")

# In a site's folder: held by its daemon, and where that one is asked how it is.
LOCK, PLACE, NODE = "daemon.lock", "daemon.json", "node"
# A look at whether a daemon runs holds the lock for an instant.
LOCK_SECONDS = 2.0


def start(folder: Path, *, insecure: bool, log_file: Path | None) -> None:
    """Serve the coordinator of a site until a signal ends it.

    Raises:
        SiteError, ConfigError, LedgerError: the folder cannot be used, another daemon uses it, or its coordinator is
            not to be trusted as it is.
    """
    # What it writes is its owner's alone.
    os.umask(0o077)
    site = SiteFolder.open(folder)
    address, _ = trusted(folder, site.policy.coordinator, insecure=insecure)
    with locked(folder):
        _write_admission(site)
        log_to(log_file)
        # Heavy: after everything that may be wrong at once.
        from clients.client_app import app
        from clients.daemon import Daemon
        from clients.opened import open_guard

        open_guard(str(folder))
        health = Health(site.policy.name, folder, address)
        daemon = Daemon(folder, lambda: _dial(health, insecure=insecure), app, health)
        with served(health.values, site.policy.health_port) as port, _signals(daemon.stop):
            write_json(folder / PLACE, {"pid": os.getpid(), "health": port, "insecure": insecure})
            log.info("site '%s' serves %s; health on port %d", site.policy.name, address, port)
            try:
                daemon.run()
            finally:
                (folder / PLACE).unlink(missing_ok=True)


def _dial(health: Health, *, insecure: bool) -> "SiteLink":
    """A link by the folder's files as they are now: a coordinator may move or change its authority while sites run."""
    from fedmed.flower.site_link import SiteLink

    site = SiteFolder.open(health.folder)
    health.coordinator, ca = trusted(site.path, site.policy.coordinator, insecure=insecure)
    return SiteLink(health.coordinator, key=site.identity, ca=ca, node_file=site.path / NODE)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Be the only daemon of a folder while entered; the system gives the lock back whatever ends the process.

    Raises:
        SiteError: another one runs.
    """
    handle = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        end = time.monotonic() + LOCK_SECONDS
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > end:
                    raise SiteError(
                        f"{folder}: a daemon runs already; see: fedmed site status {folder}"
                    ) from None
                time.sleep(0.1)
        yield
    finally:
        os.close(handle)


def is_running(folder: Path) -> bool:
    """Whether a daemon holds the folder."""
    try:
        handle = os.open(folder / LOCK, os.O_RDWR)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return False
    except BlockingIOError:
        return True
    finally:
        os.close(handle)


def _write_admission(site: SiteFolder) -> None:
    """What the coordinator admits the site with, where an older folder lacks it."""
    place = site.path / admission_name(site.policy.name)
    if not place.exists():
        write_bytes(place, admission(site.policy.name, site.public_key))


@contextlib.contextmanager
def _signals(stop: Any) -> Iterator[None]:
    """Have SIGTERM and Ctrl-C end the present message and then the process; a second one ends it at once."""
    numbers = (signal.SIGTERM, signal.SIGINT)

    def ask(number: int, frame: FrameType | None) -> None:
        del number, frame
        stop()
        # The ledger is whole at any instant, so that nothing is lost but the work of this round.
        for each in numbers:
            signal.signal(each, signal.SIG_DFL)

    before = {number: signal.signal(number, ask) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
