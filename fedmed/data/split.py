"""Which patients are held out. The choice must not depend on the records (privacy.md, rule 9)."""

import contextlib
import hashlib
import hmac
import os
import secrets
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fedmed.errors import DataError
from fedmed.task import TaskConfig

KEY_BYTES = 32


def hash_split(patient_ids: list[str], *, fraction: float, key: bytes) -> NDArray[np.bool_]:
    """Hold a patient out where the keyed hash of the id falls below `fraction`.

    Each patient's side depends on that patient's id and the site's key alone, so that adding or removing
    another patient moves nobody.

    Returns:
        (patients,) bool.
    """
    draws = [hmac.digest(key, patient_id.encode(), hashlib.sha256)[:8] for patient_id in patient_ids]
    return np.array([int.from_bytes(draw) / 2**64 < fraction for draw in draws], dtype=bool)


def pseudonym(key: bytes, patient_id: str) -> bytes:
    """16 bytes that only the holder of the key can make of a patient's id, and nobody can read back."""
    return hmac.digest(key, b"fedmed patient\0" + patient_id.encode(), "sha256")[:16]


def shuffle_split(patients: int, *, fraction: float, seed: int) -> NDArray[np.bool_]:
    """Hold out the first `fraction` of the patients after a seeded shuffle: public benchmarks only."""
    test = np.zeros(patients, dtype=bool)
    test[np.random.default_rng(seed).permutation(patients)[: round(fraction * patients)]] = True
    return test


def held_out(
    task: TaskConfig, site: str, names: list[str], *, seed: int, key: bytes | None
) -> NDArray[np.bool_]:
    """(patients,) bool: which of a site's patients, by their ids, the task's split holds out.

    Args:
        seed: of a `split: shuffle`.
        key: of a `split: hash`; None: that of `site_key`.
    """
    if task.split == "shuffle":
        return shuffle_split(len(names), fraction=task.test_fraction, seed=seed)
    return hash_split(names, fraction=task.test_fraction, key=site_key(site) if key is None else key)


def fedmed_home() -> Path:
    """Where sites keep their keys and caches: `$FEDMED_HOME`, else ~/.fedmed."""
    return Path(os.environ.get("FEDMED_HOME") or Path.home() / ".fedmed")


def site_key(site: str) -> bytes:
    """The secret key of a (simulated) site, made on first use, readable by its owner alone.

    Processes that ask at once get the same key: the first complete file wins.

    Raises:
        DataError: the key cannot be kept or read, or its file is damaged.
    """
    path = fedmed_home() / "sites" / hashlib.sha256(site.encode()).hexdigest()[:16] / "key"
    try:
        if not path.exists():
            _make_key(path)
        key = path.read_bytes()
    except OSError as error:
        raise DataError(
            f"site '{site}': its key cannot be kept in {path} ({error.strerror}); set FEDMED_HOME"
        ) from None
    if len(key) != KEY_BYTES:
        # An empty key would make the split predictable; another one would move patients to the other side.
        raise DataError(f"site '{site}': {path} is damaged; restore it from a backup")
    return key


def _make_key(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    draft = path.with_name(f"key.{os.getpid()}.{secrets.token_hex(4)}")
    try:
        with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(secrets.token_bytes(KEY_BYTES))
            file.flush()
            os.fsync(file.fileno())
        # Unlike a rename, a link never replaces: where another process was first, its key is the site's.
        with contextlib.suppress(FileExistsError):
            os.link(draft, path)
    finally:
        draft.unlink(missing_ok=True)
