"""The table of actions: DICOM PS3.15 Table E.1-1, read from `confidentiality.csv`.

CONFIDENTIALITY.md names the edition, the source, and how the conditional actions are decided.
"""

import csv
import importlib.resources
from collections.abc import Mapping
from functools import cache
from typing import Literal, get_args

EDITION = "2026d"

Action = Literal["D", "Z", "X", "K", "C", "U"]
"""Dummy value, zero length, removed, kept, cleaned, replaced by a consistent UID."""

Option = Literal["retain_uids", "retain_longitudinal_modified_dates"]
"""The columns of the table that this implementation supports beside the basic profile."""

# "X unless Z or D is needed to stay valid": whether it is needed depends on the type of the attribute in
# the file's IOD. The last alternative is valid for every type, and no alternative keeps the value.
CONDITIONAL: Mapping[str, Action] = {
    "Z/D": "D",
    "X/Z": "Z",
    "X/D": "D",
    "X/Z/D": "D",
    "X/Z/U*": "U",
}

PRIVATE = "PRIVATE"


def resolve(code: str) -> Action:
    """The one action that is done for a code of the table.

    >>> resolve("X"), resolve("X/Z/D"), resolve("X/Z/U*")
    ('X', 'D', 'U')

    Raises:
        ValueError: a code that the standard does not define.
    """
    if code in get_args(Action):
        return code  # type: ignore[return-value]
    if code in CONDITIONAL:
        return CONDITIONAL[code]
    raise ValueError(f"action={code}: expected one of {', '.join((*get_args(Action), *CONDITIONAL))}")


@cache
def table() -> Mapping[str, Mapping[str, str]]:
    """Table E.1-1: tag (8 upper-case hexadecimal digits, `X` for any digit; or `PRIVATE`) to its columns."""
    text = importlib.resources.files(__package__).joinpath("confidentiality.csv").read_text("utf-8")
    lines = (line for line in text.splitlines() if not line.startswith("#"))
    return {row["tag"]: row for row in csv.DictReader(lines)}


@cache
def actions(option: Option | None = None) -> Mapping[int, Action]:
    """Tag to action, of the basic profile or of one option's column (which overrides it).

    Private attributes and the repeating groups 50xx and 60xx are not in it: they are removed whole.
    """
    return {
        int(tag, 16): resolve(code)
        for tag, row in table().items()
        if "X" not in tag and tag != PRIVATE and (code := row[option or "basic"])
    }
