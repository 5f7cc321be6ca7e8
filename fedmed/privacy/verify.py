"""Whether a ledger is what the site wrote: every hash, every signature, every sum, and every receipt.

The chain shows an entry that was altered, removed from the middle, or moved. Cutting off the end leaves a chain
that is whole; the receipts that went out with the replies show it.
"""

import hashlib
import json
import sqlite3
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from fedmed.errors import FedmedError
from fedmed.privacy.account import Account
from fedmed.privacy.chain import START, Entry, canonical, hash_of


@dataclass(frozen=True)
class Verdict:
    """What a verification found.

    Attributes:
        entries: how many entries were checked, from the first on.
        bad: the number of the first entry that is wrong; None where all are right.
        reason: what is wrong with it.
    """

    entries: int
    bad: int | None = None
    reason: str | None = None

    @property
    def ok(self) -> bool:
        """Whether nothing was found."""
        return self.bad is None


def verify(
    path: Path,
    *,
    verifies: Callable[[bytes, bytes], bool],
    receipts: Iterable[str] = (),
    progress: Callable[[int, int], None] = lambda _done, _all: None,
) -> Verdict:
    """Check a ledger from its first entry on, without writing to it.

    Args:
        verifies: whether the site's key made this signature of these bytes.
        receipts: hashes of heads that the site has sent out, oldest first.
        progress: called with how many entries were checked, and of how many.

    Raises:
        FedmedError: the file cannot be opened.
    """
    try:
        connection = sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True)
        total = connection.execute("SELECT count(*) FROM entries").fetchone()[0]
    except sqlite3.Error as error:
        raise FedmedError(f"{path}: cannot be read as a ledger ({error}); restore it from a backup") from None
    last, account, seen, at = START, Account(), set(), 1
    try:
        rows = connection.execute("SELECT number, body, hash, signature FROM entries ORDER BY number")
        for at, (number, body, digest, signature) in enumerate(rows, 1):
            entry = Entry(number, body, digest, bytes(signature))
            reason = _wrong(entry, last, account, verifies)
            if reason:
                return Verdict(at - 1, at, reason)
            last = entry
            seen.add(entry.hash)
            progress(at, total)
        reason = _wrong_replies(connection, account)
    except sqlite3.Error as error:
        return Verdict(last.number, at, f"the file is damaged there ({error})")
    finally:
        connection.close()
    if reason:
        return Verdict(last.number, last.number, reason)
    lost = next((receipt for receipt in receipts if receipt not in seen), None)
    if lost is not None:
        return Verdict(
            last.number,
            last.number + 1,
            f"a receipt that the site sent out names entry {lost[:12]}…, which is not in the ledger: it was cut off "
            "or written anew",
        )
    return Verdict(last.number)


def _wrong(
    entry: Entry, last: Entry, account: Account, verifies: Callable[[bytes, bytes], bool]
) -> str | None:
    """What is wrong with an entry, given the one before it and what all before it add up to."""
    if entry.number != last.number + 1:
        return f"its number is {entry.number}: an entry before it was removed, or moved"
    if entry.hash != hash_of(entry.number, entry.body):
        return "it was altered: its hash is another one"
    try:
        values = json.loads(entry.body)
        if canonical(values) != entry.body:
            return "it was altered: its text is not as it was written"
        if values["previous"] != last.hash:
            return "it does not follow the entry before it: one was altered, removed or moved"
        if not verifies(entry.hash.encode(), entry.signature):
            return "its signature is not the site's"
        if last is START and values["kind"] != "site":
            return "the first entry does not name the site"
        account.check(values)
        account.apply(values)
    except (FedmedError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"it cannot stand there ({error if isinstance(error, FedmedError) else 'it is malformed'})"
    return None


def _wrong_replies(connection: sqlite3.Connection, account: Account) -> str | None:
    for nonce, content in connection.execute("SELECT attempt, content FROM replies"):
        attempt = account.attempts.get(nonce)
        if attempt is None or attempt.released != hashlib.sha256(content).hexdigest():
            return f"the stored answer of attempt {nonce} is not the one that was released"
    return None
