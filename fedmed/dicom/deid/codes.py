"""Coded entries: which are terms of the standard, and which a hospital made up."""

from collections.abc import Mapping
from functools import cache
from typing import Any, NamedTuple


class Code(NamedTuple):
    """One coded entry of PS3.16's context groups."""

    value: str
    scheme: str
    meaning: str


@cache
def _meanings() -> Mapping[tuple[str, str], str]:
    # Large, and needed by the files that hold coded entries only.
    from pydicom.sr._concepts_dict import concepts

    every: Any = concepts
    return {
        (scheme, value): meaning
        for scheme, keywords in every.items()
        for values in keywords.values()
        for value, (meaning, _) in values.items()
    }


@cache
def _snomed() -> Mapping[str, str]:
    """Retired SNOMED-RT style identifiers, which older files have, to SNOMED CT's."""
    from pydicom.sr._snomed_dict import mapping

    return mapping["SRT"]


def known(value: str, scheme: str) -> Code | None:
    """The term with this value in the standard's context groups; None for any other code.

    >>> known("113100", "DCM").meaning
    'Basic Application Confidentiality Profile'
    >>> known("DR-SMITH", "99HOSPITAL") is None
    True
    """
    meaning = _meanings().get((scheme, value))
    if meaning is None and scheme in ("SRT", "SNM3", "99SDM"):
        meaning = _meanings().get(("SCT", _snomed().get(value, "")))
    return None if meaning is None else Code(value, scheme, meaning)
