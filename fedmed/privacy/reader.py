"""A site's ledger for those who may not write to it: without a key, and beside a site that works."""

import sqlite3
from pathlib import Path

from fedmed.privacy.account import Account
from fedmed.privacy.chain import BUSY_SECONDS, START, LedgerError, chained, check_version


def read_account(path: Path) -> tuple[Account, str]:
    """What the entries of the ledger at `path` add up to, and the hash of the last one.

    Version and hash chain are checked, signatures are not: that takes `fedmed privacy verify`. No byte of the file
    changes, and beside a site that is not running no file appears next to it.

    Raises:
        LedgerError: there is no ledger, it is of another version, or it does not fit together.
    """
    if not path.is_file():
        raise LedgerError(f"{path}: no ledger there; expected a site's folder or its ledger.db")
    try:
        before = path.stat()
        # With a log beside it somebody writes, or died writing. Without one the file is whole, and an
        # ordinary reader would leave an empty log behind, maybe under an account that locks the site out.
        if not _log(path).exists():
            try:
                read = _read(path, "mode=ro&immutable=1")
            except (LedgerError, sqlite3.Error, ValueError, KeyError, TypeError):
                if not _changed(path, before.st_mtime_ns):
                    raise
            else:
                if not _changed(path, before.st_mtime_ns):
                    return read
        return _read(path, "mode=ro")
    except (sqlite3.OperationalError, OSError) as error:
        raise LedgerError(f"{path}: cannot be read ({error})") from None
    except (sqlite3.Error, ValueError, KeyError, TypeError):
        raise LedgerError(
            f"{path}: is damaged; run fedmed privacy verify, and restore it from a backup"
        ) from None


def _read(path: Path, how: str) -> tuple[Account, str]:
    connection = sqlite3.connect(
        f"{path.resolve().as_uri()}?{how}", uri=True, timeout=BUSY_SECONDS, isolation_level=None
    )
    try:
        check_version(connection, path=path)
        account, last = Account(), START
        for last in chained(connection, START, path=path):
            account.apply(last.values)
        if account.site is None:
            raise LedgerError(f"{path}: names no site; restore it from a backup")
        return account, last.hash
    finally:
        connection.close()


def _log(path: Path) -> Path:
    return path.with_name(f"{path.name}-wal")


def _changed(path: Path, since: int) -> bool:
    return _log(path).exists() or path.stat().st_mtime_ns != since
