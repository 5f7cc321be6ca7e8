"""A coordinator's folder: its options, its authority and certificates, its secrets, its runs."""

import contextlib
import datetime
import fcntl
import json
import os
import secrets
import shlex
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedmed import secret_folder
from fedmed.atomic import write_bytes, write_json
from fedmed.errors import FedmedError
from strategies.coordinator.certificates import Authority, CertificateError, server_facts
from strategies.coordinator.config import CoordinatorConfig, read_config, render

CONFIG, AUTHORITY, TRUSTED, SERVER = "coordinator.yaml", "authority.pem", "ca.pem", "server.pem"
CONTROL, EXECUTOR = "control.secret", "executor.secret"
# The options come last: a folder with a coordinator.yaml is whole.
FILES = (AUTHORITY, TRUSTED, SERVER, CONTROL, EXECUTOR, CONFIG)
SECRETS = (AUTHORITY, SERVER, CONTROL, EXECUTOR)
SECRET_BYTES = 32


class CoordinatorError(FedmedError):
    """A coordinator's folder cannot be made or used as it is."""


@dataclass(frozen=True, kw_only=True)
class CoordinatorFolder:
    """An opened coordinator: its options as they were when the folder was opened. Printing it shows no secret."""

    path: Path
    config: CoordinatorConfig
    control_secret: bytes = field(repr=False)
    executor_secret: bytes = field(repr=False)

    @classmethod
    def init(cls, path: Path, config: CoordinatorConfig) -> "CoordinatorFolder":
        """Make a coordinator with a new authority and new secrets, in a new or an empty folder.

        Either the whole of it is there afterwards, or nothing new. The folder is 0700, its files 0600.

        Raises:
            CoordinatorError: the folder holds a coordinator or other files, or cannot be written.
        """
        authority = Authority.new(config.name)
        contents = {
            AUTHORITY: authority.pem(),
            TRUSTED: authority.trusted(),
            SERVER: authority.server(config.hosts),
            CONTROL: secrets.token_bytes(SECRET_BYTES),
            EXECUTOR: secrets.token_bytes(SECRET_BYTES),
            CONFIG: render(config).encode(),
        }
        try:
            if (path / CONFIG).exists():
                raise CoordinatorError(
                    f"{path}: holds a coordinator already; start it with: {command('start', path)}"
                )
            secret_folder.make(path, {name: contents[name] for name in FILES}, error=CoordinatorError)
        except OSError as error:
            raise CoordinatorError(f"{path}: a coordinator cannot be made there ({error.strerror})") from None
        return cls.open(path)

    @classmethod
    def open(cls, path: Path) -> "CoordinatorFolder":
        """The coordinator in a folder.

        Raises:
            CoordinatorError: there is none, a file is missing or damaged, or others than the owner may read it.
            ConfigError: its coordinator.yaml cannot be used.
        """
        path = path.resolve()
        try:
            present = {name for name in FILES if (path / name).is_file()}
            if present:
                secret_folder.check_modes(path, SECRETS, error=CoordinatorError)
            missing = [name for name in FILES if name not in present]
            if present and missing:
                raise CoordinatorError(
                    f"{path}: damaged, without {' and '.join(missing)}; restore it from a backup"
                )
            if not present:
                raise CoordinatorError(
                    f"{path}: no coordinator there; make one with: {command('init', path)} --name NAME --host HOST"
                )
            held = [(path / name).read_bytes() for name in (CONTROL, EXECUTOR)]
        except OSError as error:
            raise CoordinatorError(f"{path}: cannot be read ({error.strerror})") from None
        for name, content in zip((CONTROL, EXECUTOR), held, strict=True):
            if len(content) != SECRET_BYTES:
                raise CoordinatorError(
                    f"{path / name}: damaged, expected {SECRET_BYTES} bytes; restore it from a backup"
                )
        return cls(
            path=path, config=read_config(path / CONFIG), control_secret=held[0], executor_secret=held[1]
        )

    @property
    def runs(self) -> Path:
        """The folder of its runs' folders."""
        return self.path / "runs"

    @property
    def logs(self) -> Path:
        """The folder of its logs."""
        return self.path / "logs"

    @property
    def address(self) -> str:
        """HOST:PORT by which this machine reaches its own SuperLink."""
        return f"{local_host(self.config.listen)}:{self.config.port}"

    @property
    def trusted(self) -> bytes:
        """The certificates that sites trust, in PEM."""
        return (self.path / TRUSTED).read_bytes()

    def certificate(self) -> tuple[datetime.datetime, list[str]]:
        """Until when the server's certificate is valid, and the hosts that it names."""
        try:
            return server_facts((self.path / SERVER).read_bytes())
        except CertificateError as error:
            raise CoordinatorError(
                f"{self.path / SERVER}: {error}; run: {command('rotate', self.path)}"
            ) from None

    def authority(self) -> Authority:
        """The authority with its key."""
        try:
            return Authority.parse((self.path / AUTHORITY).read_bytes())
        except CertificateError as error:
            raise CoordinatorError(f"{self.path / AUTHORITY}: {error}; restore it from a backup") from None

    def renew(self, authority: Authority) -> None:
        """Take an authority, and issue a new server certificate by it. Killed on the way, it can be done again."""
        server = authority.server(self.config.hosts)
        # In this order each state of the folder is one that sites accept.
        for name, content in ((AUTHORITY, authority.pem()), (TRUSTED, authority.trusted()), (SERVER, server)):
            _write_secret(self.path / name, content)

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Be the only process that runs this coordinator.

        Raises:
            CoordinatorError: another one does.
        """
        # Who only looks, in `running`, holds it for an instant.
        end = time.monotonic() + 1
        while (handle := self._locked()) is None:
            if time.monotonic() > end:
                raise CoordinatorError(
                    f"{self.path}: this coordinator runs already; look at it with: {command('status', self.path)}"
                )
            time.sleep(0.05)
        try:
            yield
        finally:
            os.close(handle)

    def _locked(self) -> int | None:
        handle = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            return None
        return handle

    def running(self) -> dict[str, Any] | None:
        """What the process that runs this coordinator said of itself; None when none does."""
        handle = self._locked()
        if handle is not None:
            os.close(handle)
            return None
        try:
            values: dict[str, Any] = json.loads((self.path / "running.json").read_text())
        except (OSError, ValueError):
            # It has only just begun.
            return {}
        return values

    def say_running(self, **values: Any) -> None:
        """Write what `running` reads."""
        write_json(self.path / "running.json", values)


def command(verb: str, path: Path, *more: str) -> str:
    """The command line of `fedmed coordinator VERB DIR`, for messages."""
    return shlex.join(["fedmed", "coordinator", verb, *more, str(path)])


def local_host(listen: str) -> str:
    """The host by which this machine reaches a server of its own that listens there."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(listen, listen)
    return f"[{host}]" if ":" in host else host


def hosts_missing(config: CoordinatorConfig, named: Sequence[str]) -> list[str]:
    """The hosts of the options that a certificate does not name."""
    return [host for host in config.hosts if host not in named]


def _write_secret(path: Path, content: bytes) -> None:
    before = os.umask(0o077)
    try:
        write_bytes(path, content)
    finally:
        os.umask(before)
