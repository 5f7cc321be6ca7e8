"""Which sites are admitted: kept in the coordinator's folder, and told to the SuperLink whenever it runs."""

import contextlib
import dataclasses
import fcntl
import json
import os
import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from fedmed.atomic import write_json
from fedmed.errors import ConfigError, nearest, require
from fedmed.schema import from_dict
from strategies.coordinator.certificates import public_key

ADMITTED = "admitted.json"
TITLE = re.compile(r"^# fedmed site: (.*)$", re.MULTILINE)


@dataclass(frozen=True, kw_only=True)
class Admission:
    """A site that may take part: the key by which it is known, in PEM."""

    public_key: str
    # Unix time.
    admitted_at: float


class Registry(Protocol):
    """The part of `fedmed.flower.control.Control` that is needed here."""

    def register(self, name: str, public_key: bytes) -> int:
        """Let a site in."""
        ...

    def unregister(self, node: int) -> None:
        """Let it in no more."""
        ...

    def nodes(self) -> list[Any]:
        """Those that were ever let in."""
        ...


class Admissions:
    """The admitted sites of the coordinator in a folder."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / ADMITTED

    def read(self) -> dict[str, Admission]:
        """Every admitted site by its name.

        Raises:
            ConfigError: the file is damaged.
        """
        try:
            values = json.loads(self._path.read_text())
            return {name: from_dict(Admission, entry, where=name) for name, entry in values.items()}
        except FileNotFoundError:
            return {}
        except (ValueError, AttributeError, TypeError, ConfigError):
            raise ConfigError(f"{self._path}: damaged; restore it from a backup") from None

    def admit(self, file: Path, name: str | None = None) -> str:
        """Admit the site whose public key is in a file, and return its name. Again is the same as once.

        Args:
            name: in place of the one in the file.

        Raises:
            ConfigError: the file holds no site's key, or the name or the key is another site's.
        """
        name, key = read_public(file, name)
        with self._changed() as sites:
            for other, admission in sites.items():
                if (other == name) != (admission.public_key == key):
                    what = "another key" if other == name else f"the same key as '{other}'"
                    raise ConfigError(
                        f"site '{name}': admitted with {what}; first run: fedmed coordinator expel '{other}'"
                    )
            sites.setdefault(name, Admission(public_key=key, admitted_at=round(time.time(), 3)))
        return name

    def expel(self, name: str) -> None:
        """Admit a site no longer.

        Raises:
            ConfigError: there is no such site.
        """
        with self._changed() as sites:
            if name not in sites:
                raise ConfigError(
                    f"site '{name}': not admitted; {nearest(name, sites) if sites else 'no site is'}"
                )
            del sites[name]

    @contextlib.contextmanager
    def _changed(self) -> Iterator[dict[str, Admission]]:
        """The sites, to be changed by one process at a time; written when nothing was raised."""
        handle = os.open(self._path.with_name("admitted.lock"), os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            sites = self.read()
            yield sites
            write_json(self._path, {name: dataclasses.asdict(entry) for name, entry in sites.items()})
        finally:
            os.close(handle)


def read_public(file: Path, name: str | None = None) -> tuple[str, str]:
    """The name and the public key in a file that `fedmed site init` wrote.

    Raises:
        ConfigError: it holds something else.
    """
    try:
        content = file.read_bytes()
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read ({error.strerror})") from None
    if b"PRIVATE KEY" in content:
        raise ConfigError(f"{file}: a private key, which must not leave its site; ask the site for NAME.pub")
    key = public_key(content, str(file)).decode()
    title = TITLE.search(content.decode("utf-8", "replace"))
    name = name or (title.group(1).strip() if title else "")
    if not name:
        raise ConfigError(f"{file}: names no site; add --name NAME, the name that the site gave itself")
    require(len(name) <= 100 and name.isprintable(), "name", repr(name), "1 to 100 printable characters")
    return name, key


def reconcile(admitted: Mapping[str, Admission], registry: Registry) -> list[str]:
    """Make a SuperLink know the admitted sites and no other.

    Returns:
        What changed, in words.
    """
    known = {
        (node.name, _plain(node.public_key)): node
        for node in registry.nodes()
        if node.status != "unregistered"
    }
    wanted = {(name, _plain(entry.public_key.encode())): name for name, entry in admitted.items()}
    said = []
    # First those that go: a new key may come under an old name.
    for (name, _), node in known.items():
        if (name, _) not in wanted:
            registry.unregister(node.node)
            said.append(f"site '{name}' is expelled")
    for identity, name in wanted.items():
        if identity not in known:
            registry.register(name, admitted[name].public_key.encode())
            said.append(f"site '{name}' is admitted")
    return said


def _plain(pem: bytes) -> bytes:
    """A key as it is compared: without line breaks."""
    return b"".join(pem.split())
