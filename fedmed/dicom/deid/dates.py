"""Dates moved by a patient's secret number of days (PS3.15 E.3.6, Modified Dates)."""

import hmac
import re
from datetime import date, timedelta

# Into the past only, so that no moved date lies in the future; never by 0.
MAX_DAYS = 3652

_TIME = r"(?:[01]\d|2[0-3])(?:[0-5]\d(?:(?:[0-5]\d|60)(?:\.\d{1,6})?)?)?"
_TM = re.compile(rf"{_TIME}|{_TIME}-(?:{_TIME})?|-{_TIME}", re.ASCII)
_DA = re.compile(r"(\d{4})(\d\d)(\d\d)|(\d{4})\.(\d\d)\.(\d\d)", re.ASCII)
_DT = re.compile(rf"(\d{{4}})(?:(\d\d)(?:(\d\d)({_TIME})?)?)?([+-]\d{{4}})?", re.ASCII)


def days_earlier(key: bytes, patient_id: str) -> int:
    """How many days a patient's dates move into the past: 1 to `MAX_DAYS`, the same in all of a patient's files."""
    digest = hmac.digest(key, b"fedmed dates\0" + patient_id.encode(), "sha256")
    return 1 + int.from_bytes(digest[:8], "big") % MAX_DAYS


def shift(text: str, vr: str, days: int) -> str | None:
    """`text` (one value of VR DA, DT or TM, or a range of them) `days` earlier; None where it is malformed.

    Times of day stay, so that intervals stay. A date that is known to the year or month only moves from
    the first day of it, and stays that coarse. A DT keeps its offset from UTC: without it intervals between
    two values would change.

    >>> shift("20240301", "DA", 1), shift("20240301-20240401", "DA", 1), shift("2024", "DT", 1)
    ('20240229', '20240229-20240331', '2023')
    >>> shift("1 March", "DA", 1) is None
    True
    """
    text = text.strip(" \0")
    if vr == "TM":
        return text if _TM.fullmatch(text) else None
    one = _date if vr == "DA" else _date_time
    if (single := one(text, days)) is not None:
        return single
    # "-" also begins an offset from UTC: each place where the range may be split is tried.
    for place in (found.start() for found in re.finditer("-", text)):
        ends = [one(end, days) if end else "" for end in (text[:place], text[place + 1 :])]
        if None not in ends and any(ends):
            return "-".join(end for end in ends if end is not None)
    return None


def _earlier(year: str, month: str, day: str, days: int) -> str | None:
    try:
        moved = date(int(year), int(month), int(day)) - timedelta(days=days)
    except (ValueError, OverflowError):
        return None
    return f"{moved.year:04d}{moved.month:02d}{moved.day:02d}"


def _date(text: str, days: int) -> str | None:
    found = _DA.fullmatch(text)
    if not found:
        return None
    year, month, day = found.groups()[:3] if found[1] else found.groups()[3:]
    return _earlier(year, month, day, days)


def _date_time(text: str, days: int) -> str | None:
    found = _DT.fullmatch(text)
    if not found:
        return None
    year, month, day, time, offset = found.groups()
    moved = _earlier(year, month or "01", day or "01", days)
    if moved is None:
        return None
    return moved[: 8 if day else 6 if month else 4] + (time or "") + (offset or "")
