"""Keyed hashes that stand in for identifiers."""

import hmac


def keyed_hash(key: bytes, kind: str, text: str) -> str:
    """32 hex digits that only the holder of the key can make, and nobody can read back.

    For `patient` it is `fedmed.data.split.pseudonym`: a person has one pseudonym in tables and in images.
    """
    return hmac.digest(key, f"fedmed {kind}\0{text}".encode(), "sha256")[:16].hex()
