"""A folder of secrets: made whole or not at all, for its owner's eyes alone."""

import contextlib
import os
import secrets
import shlex
import shutil
import stat
from collections.abc import Iterable, Mapping
from pathlib import Path

from fedmed.atomic import sync_folder
from fedmed.errors import FedmedError


def make(path: Path, contents: Mapping[str, bytes], *, error: type[FedmedError]) -> None:
    """Write files into a new or an empty folder: all of them or, whatever interrupts, none.

    The folder is 0700, its files 0600; they appear in the order of `contents`, so that a folder with the last is whole.

    Raises:
        error: something else is there, or there is no folder to make it in.
        OSError: it cannot be written.
    """
    if path.is_dir():
        if any(path.iterdir()):
            raise error(f"{path}: holds other files; expected a new or an empty folder")
    elif path.exists() or path.is_symlink():
        raise error(f"{path}: is no folder; expected a new or an empty one")
    elif not path.absolute().parent.is_dir():
        raise error(
            f"{path}: no folder '{path.parent}' to make it in; run: mkdir -p {shlex.quote(str(path.parent))}"
        )
    inside = path.is_dir()
    draft = (path if inside else path.absolute().parent) / f".draft-{secrets.token_hex(8)}"
    made: list[Path] = []
    done = False
    try:
        os.mkdir(draft, 0o700)
        for name, content in contents.items():
            _write(draft / name, content)
        sync_folder(draft)
        if inside:
            # It may be a mount, or the shell's own folder, which a rename could not replace.
            _move_in(draft, path, contents, made)
        else:
            # Fails where another process has filled the place meanwhile.
            os.rename(draft, path)
            made.append(path)
            sync_folder(path.absolute().parent)
        done = True
    finally:
        if not done:
            for place in made:
                _remove(place)
        shutil.rmtree(draft, ignore_errors=True)


def check_modes(path: Path, names: Iterable[str], *, error: type[FedmedError]) -> None:
    """Refuse a folder that others than its owner can read or change, or one of its files.

    Raises:
        error: with the command that mends it.
        OSError: it cannot be looked at.
    """
    commands = []
    for place, mode in [(path, "700"), *((path / name, "600") for name in names)]:
        with contextlib.suppress(FileNotFoundError):
            if stat.S_IMODE(place.stat().st_mode) & 0o077:
                commands.append(f"chmod {mode} {shlex.quote(str(place))}")
    if commands:
        raise error(f"{path}: others may read or change it; run: {' && '.join(commands)}")


def _remove(place: Path) -> None:
    if place.is_dir():
        shutil.rmtree(place, ignore_errors=True)
    else:
        place.unlink(missing_ok=True)


def _move_in(draft: Path, path: Path, names: Iterable[str], made: list[Path]) -> None:
    os.chmod(path, 0o700)
    for name in names:
        # Unlike a rename, a link never replaces what another process has made meanwhile.
        os.link(draft / name, path / name)
        made.append(path / name)
    # Here and not when all is done: what interrupts it still undoes the rest.
    shutil.rmtree(draft)
    sync_folder(path)


def _write(path: Path, content: bytes) -> None:
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
