"""Which patients are held out. The choice must not depend on the records (privacy.md, rule 9)."""

import hashlib
import hmac
import os
import secrets
from pathlib import Path

import numpy as np
from numpy.typing import NDArray


def hash_split(patient_ids: list[str], *, fraction: float, key: bytes) -> NDArray[np.bool_]:
    """Hold a patient out where the keyed hash of the id falls below `fraction`.

    Each patient's side depends on that patient's id and the site's key alone, so that adding or removing
    another patient moves nobody.

    Returns:
        (patients,) bool.
    """
    draws = [hmac.digest(key, patient_id.encode(), hashlib.sha256)[:8] for patient_id in patient_ids]
    return np.array([int.from_bytes(draw) / 2**64 < fraction for draw in draws], dtype=bool)


def shuffle_split(patients: int, *, fraction: float, seed: int) -> NDArray[np.bool_]:
    """Hold out the first `fraction` of the patients after a seeded shuffle: public benchmarks only."""
    test = np.zeros(patients, dtype=bool)
    test[np.random.default_rng(seed).permutation(patients)[: round(fraction * patients)]] = True
    return test


def fedmed_home() -> Path:
    """Where sites keep their keys and caches: `$FEDMED_HOME`, else ~/.fedmed."""
    return Path(os.environ.get("FEDMED_HOME", Path.home() / ".fedmed"))


def site_key(site: str) -> bytes:
    """The secret key of a (simulated) site, made on first use, readable by its owner alone.

    Processes that ask at once get the same key: the first complete file wins.
    """
    folder = fedmed_home() / "sites" / hashlib.sha256(site.encode()).hexdigest()[:16]
    path = folder / "key"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        draft = folder / f"key.{os.getpid()}.{secrets.token_hex(4)}"
        with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(secrets.token_bytes(32))
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(draft, path)
        except FileExistsError:
            # Another process was first; its key is the site's.
            return path.read_bytes()
        finally:
            draft.unlink()
    return path.read_bytes()
