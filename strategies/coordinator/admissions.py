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
    """A site that may take part, or might once: the key by which it is known, in PEM; times in seconds since 1970."""

    name: str
    public_key: str
    admitted_at: float
    expelled_at: float | None = None


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
        return {entry.name: entry for entry in self._all() if entry.expelled_at is None}

    def _all(self) -> list[Admission]:
        try:
            return [from_dict(Admission, entry) for entry in json.loads(self._path.read_text())]
        except FileNotFoundError:
            return []
        except (ValueError, AttributeError, TypeError, ConfigError):
            raise ConfigError(f"{self._path}: damaged; restore it from a backup") from None

    def admit(self, file: Path, name: str | None = None) -> str:
        """Admit the site whose public key is in a file, and return its name. Again is the same as once.

        Args:
            name: in place of the one in the file.

        Raises:
            ConfigError: the file holds no site's key, the name or the key is another site's, or the key was expelled.
        """
        name, key = read_public(file, name)
        with self._changed() as entries:
            for entry in entries:
                if entry.expelled_at is not None:
                    # The SuperLink takes no key twice.
                    if entry.public_key == key:
                        raise ConfigError(
                            f"site '{name}': its key was expelled, as '{entry.name}', which is for good; "
                            "expected the key of a new site folder"
                        )
                elif (entry.name == name) != (entry.public_key == key):
                    what = "another key" if entry.name == name else f"the same key as '{entry.name}'"
                    raise ConfigError(
                        f"site '{name}': admitted with {what}; first run: fedmed coordinator expel '{entry.name}'"
                    )
            if not any(entry.public_key == key for entry in entries):
                entries.append(Admission(name=name, public_key=key, admitted_at=round(time.time(), 3)))
        return name

    def expel(self, name: str) -> None:
        """Admit a site no longer: its key is refused for good.

        Raises:
            ConfigError: there is no such site.
        """
        with self._changed() as entries:
            standing = [entry.name for entry in entries if entry.expelled_at is None]
            if name not in standing:
                raise ConfigError(
                    f"site '{name}': not admitted; {nearest(name, standing) if standing else 'no site is'}"
                )
            for index, entry in enumerate(entries):
                if entry.name == name and entry.expelled_at is None:
                    entries[index] = dataclasses.replace(entry, expelled_at=round(time.time(), 3))

    @contextlib.contextmanager
    def _changed(self) -> Iterator[list[Admission]]:
        """All entries, to be changed by one process at a time; written when nothing was raised."""
        handle = os.open(self._path.with_name("admitted.lock"), os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            entries = self._all()
            yield entries
            write_json(self._path, [dataclasses.asdict(entry) for entry in entries])
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
    # Imported here: it brings Flower.
    from fedmed.flower.line import LinkDown, LinkError

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
        if identity in known:
            continue
        try:
            registry.register(name, admitted[name].public_key.encode())
            said.append(f"site '{name}' is admitted")
        except LinkDown:
            raise
        # One that it does not take must not keep the others out.
        except (LinkError, ConfigError) as error:
            said.append(f"site '{name}' is not admitted by the SuperLink: {error}")
    return said


def _plain(pem: bytes) -> bytes:
    """A key as it is compared: without line breaks."""
    return b"".join(pem.split())
