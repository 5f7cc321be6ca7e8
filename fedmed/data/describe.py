"""Proposes a table's declaration from its records, for a person to edit.

A proposal is a function of the records (privacy.md, rule 9): a run on one says NOT PRIVATE until somebody has
put public knowledge in its place and set `declare: declared`.
"""

import dataclasses
import math
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

import numpy as np
import pandas as pd
import yaml  # type: ignore[import-untyped, unused-ignore]

from fedmed import strict_yaml
from fedmed.data.table import blank_cells, has_header, numbers_in, read_csv
from fedmed.errors import DataError, nearest
from fedmed.task import TableTaskConfig

MAX_CATEGORIES = 20
MAX_SITES = 100
# A longer text is prose, however often it stands in the column.
MAX_CATEGORY_LENGTH = 60
# A column with this share of numbers is numeric; its other cells quarantine their records.
NUMERIC_SHARE = 0.95

# How tables write no and yes, as (negative, positive) in small letters.
_PAIRS = (
    ("0", "1"), ("0.0", "1.0"), ("no", "yes"), ("n", "y"), ("false", "true"), ("f", "t"),
    ("negative", "positive"), ("neg", "pos"), ("absent", "present"),
)  # fmt: skip
_IDENTIFIER = re.compile(r"(^|[\W_])(id|uid|uuid|guid|pid|mrn|identifier|index)$|[a-z]I[dD]$", re.ASCII)

HEADER = """\
# Proposed by `fedmed task describe` from the records of the table: every line below is a function of them.
# Before a run on it may be called private, a person reviews each line and replaces what was read here:
#   low, high       from clinical knowledge (what can be measured), not the range that this file shows
#   categories      what the form or the coding scheme allows, not what happened to occur;
#                   the first is the reference of the others
#   declared_sizes  a public figure for each site (a registry, a publication), not this count
#   phrase, blank   how a record reads as a sentence; cutoffs and cutoff_words put a number into words
# and then writes `declare: declared`. Until then every run on it says NOT PRIVATE.
# `path` is relative to the folder in which fedmed is started.
"""


@dataclass(frozen=True, kw_only=True)
class Proposal:
    """A declaration, and what a person should know before editing it.

    Attributes:
        declaration: keys of `TableTaskConfig`; holds sites, categories and ranges of the records.
        left_out: column -> why it is not declared; holds no cell.
        remarks: holds no cell.
    """

    declaration: dict[str, Any]
    left_out: dict[str, str] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)


def propose(
    path: str, *, site_column: str | None, label: str | None, patient_column: str | None
) -> dict[str, Any]:
    """The declaration of `examine`."""
    proposal = examine(path, site_column=site_column, label=label, patient_column=patient_column)
    return proposal.declaration


def examine(
    path: str,
    *,
    site_column: str | None,
    label: str | None,
    patient_column: str | None,
    positive: Sequence[str] = (),
    negative: Sequence[str] = (),
) -> Proposal:
    """Read a table and propose its declaration.

    Args:
        positive: the label's values that mean the outcome. Where only one of `positive` and `negative` is
            given, the other is the rest; where none is, both are guessed.

    Raises:
        DataError: no such file or column, no column named, or values that nobody could guess the meaning of.
    """
    table, _ = read_csv(path)
    site_column = _role(table, "site", site_column)
    label = _role(table, "label", label)
    roles = [site_column, label]
    if patient_column is not None:
        roles.append(_role(table, "patient", patient_column))
    if len(set(roles)) < len(roles):
        raise DataError("site, label and patient column: expected different columns")
    positive, negative = _outcome(label, table[label], positive, negative)
    columns, left_out, remarks = _survey(table.drop(columns=roles))
    usable = table[label].isin([*positive, *negative]) & table[site_column].notna()
    if patient_column is not None:
        usable &= ~blank_cells(table[patient_column])
    if not usable.any():
        raise DataError("no record has a site, a label and, where one is named, a patient id")
    declaration = {
        "path": path,
        "declare": "from_data",
        "site_column": site_column,
        "label": label,
        "positive": positive,
        "negative": negative,
        "patient_column": patient_column,
        "declared_sizes": _sizes(table[usable], site_column, patient_column),
        "columns": columns,
    }
    if patient_column is None:
        remarks.append("no patient column: the unit of privacy is the record, not the patient")
    if not usable.all():
        remarks.append(f"{int((~usable).sum())} record(s) have no site, no declared label or no patient id")
    classes = table[usable].groupby(site_column)[label].agg(lambda labels: labels.isin(positive).nunique())
    if (classes == 1).any():
        remarks.append(f"{int((classes == 1).sum())} site(s) have records of one class only")
    return Proposal(declaration=declaration, left_out=left_out, remarks=remarks)


def fill(task: TableTaskConfig, *, declared: Collection[str] = ()) -> TableTaskConfig:
    """The task with what is not declared read from its table: `task.declare=from_data`, NOT PRIVATE.

    `columns` and `declared_sizes` are filled where they are empty, `positive` and `negative` where they are
    the defaults and not among `declared`, the fields that somebody has set.

    Raises:
        DataError: as `examine`.
    """
    defaults = {f.name: f.default_factory for f in dataclasses.fields(task) if callable(f.default_factory)}
    wanted = {name for name in ("columns", "declared_sizes") if not getattr(task, name)}
    outcome = {"positive", "negative"} - set(declared)
    wanted |= {name for name in outcome if list(getattr(task, name)) == defaults[name]()}
    if not wanted:
        return task
    proposal = examine(
        task.path or "",
        site_column=task.site_column,
        label=task.label,
        patient_column=task.patient_column,
        positive=() if "positive" in wanted else task.positive,
        negative=() if "negative" in wanted else task.negative,
    )
    return dataclasses.replace(task, **{name: proposal.declaration[name] for name in wanted})


def to_yaml(declaration: dict[str, Any]) -> str:
    """The declaration as a file for `task.declaration=FILE`, under a header that tells what to review."""
    return HEADER + yaml.dump(
        declaration, Dumper=strict_yaml.Dumper, sort_keys=False, allow_unicode=True, width=110
    )


def _role(table: pd.DataFrame, role: str, name: str | None) -> str:
    if name is not None and name in table.columns:
        return name
    asked = f"{role} column '{name}': the table has none" if name else f"no {role} column named"
    if not has_header(table):
        # What stands in the first line may be a record.
        hint = "is the first line of the file its header?"
    elif name:
        hint = nearest(name, table.columns)
    else:
        hint = f"choose with --{role}{'' if role == 'label' else '-column'} from: {', '.join(table.columns)}"
    raise DataError(f"{asked}; {hint}")


def _survey(table: pd.DataFrame) -> tuple[dict[str, Any], dict[str, str], list[str]]:
    """The columns that can be declared, why others cannot, and remarks."""
    columns, left_out, remarks = {}, {}, []
    for name in table.columns:
        column, said = _column(name, table[name])
        if column is None:
            left_out[name] = said
            continue
        columns[name] = column
        if said:
            remarks.append(f"{name}: {said}")
    if not columns:
        raise DataError("no column can be declared beside the site, the label and the patient's id")
    return columns, left_out, remarks


def _outcome(
    label: str, cells: pd.Series, positive: Sequence[str], negative: Sequence[str]
) -> tuple[list[str], list[str]]:
    """The label's values on either side: as given, the rest of them, or a guess."""
    texts = _texts(cells)
    if positive and negative:
        return list(positive), list(negative)
    if not positive and not negative:
        return _guess(label, texts)
    given = list(positive or negative)
    option = "positive" if positive else "negative"
    for value in given:
        if value not in texts:
            raise DataError(f"{option}={value}: no record has it in the label column '{label}'")
    rest = [text for text in texts if text not in given]
    if not 1 <= len(rest) <= MAX_CATEGORIES:
        raise DataError(
            f"{option}: label column '{label}' has {len(rest)} other values; expected 1 to {MAX_CATEGORIES}"
        )
    return (given, rest) if positive else (rest, given)


def _guess(label: str, texts: list[str]) -> tuple[list[str], list[str]]:
    """The pair that holds all the values, in each spelling that occurs."""
    lowered = {text: text.casefold() for text in texts}
    for negative, positive in _PAIRS:
        if texts and set(lowered.values()) <= {negative, positive}:
            sides = [[t for t in texts if lowered[t] == side] or [side] for side in (positive, negative)]
            return sides[0], sides[1]
    raise DataError(
        f"label column '{label}': {len(texts)} distinct value(s), no known pair (0/1, no/yes, false/true); "
        "name those that mean the outcome: --positive VALUE, or task.positive=[VALUE]"
    )


def _texts(cells: pd.Series) -> list[str]:
    """The distinct texts of a column, in order; `none` is one of them ("no symptoms"), `nan` is not."""
    present = cells[~blank_cells(cells, declared=cells[cells.str.casefold() == "none"].unique())]
    return sorted(present.unique().tolist())


def _sizes(rows: pd.DataFrame, site_column: str, patient_column: str | None) -> dict[str, int]:
    by_site = rows.groupby(site_column)
    sizes = by_site.size() if patient_column is None else by_site[patient_column].nunique()
    if len(sizes) > MAX_SITES:
        raise DataError(
            f"--site-column={site_column}: {len(sizes)} distinct values; expected at most {MAX_SITES} sites"
        )
    return {str(site): int(size) for site, size in sizes.items()}


def _column(name: str, cells: pd.Series) -> tuple[dict[str, Any] | None, str]:
    """A column's declaration with a remark (or none), or why there is no declaration."""
    present = cells[~blank_cells(cells)]
    if _IDENTIFIER.search(name):
        return None, "an identifier, by its name"
    numbers = numbers_in(present)
    numbers = numbers[np.isfinite(numbers)]
    words = name.replace("_", " ")
    texts = _texts(cells)
    if not texts:
        return None, "no value in any record"
    phrases = {"phrase": words.replace("{", "{{").replace("}", "}}") + " {value}"}
    if len(numbers) and len(numbers) >= NUMERIC_SHARE * len(present):
        if _numbered(numbers):
            return None, "an identifier: counts the records"
        phrases |= {"blank": f"{words} not recorded"} if len(present) < len(cells) else {}
        low, high = widen(numbers.min(), numbers.max())
        other = len(present) - len(numbers)
        remark = f"{other} cell(s) are not numbers: their records are left out" if other else ""
        return {
            "kind": "numeric",
            "low": low,
            "high": high,
            "decimals": _decimals(present),
            **phrases,
        }, remark
    filled = int(cells.isin(texts).sum())
    if len(texts) > MAX_CATEGORIES or len(texts) > max(2, filled // 2):
        return None, f"free text or codes: {len(texts)} distinct texts in {filled} cells"
    if max(map(len, texts)) > MAX_CATEGORY_LENGTH:
        return None, f"free text: longer than {MAX_CATEGORY_LENGTH} letters"
    phrases |= {"blank": f"{words} not recorded"} if filled < len(cells) else {}
    return {"kind": "categorical", "categories": texts, **phrases}, ""


def _numbered(numbers: np.ndarray) -> bool:
    """Whether these count the records: each whole number once, from 0 or 1."""
    return len(numbers) > 10 and any(
        np.array_equal(np.sort(numbers), np.arange(first, first + len(numbers))) for first in (0, 1)
    )


def _decimals(cells: pd.Series) -> int:
    places = cells.str.extract(r"^[^.eE]*\.(\d*[1-9])", expand=False).str.len().max()
    return 0 if pd.isna(places) else min(int(places), 3)


def widen(low: float, high: float) -> tuple[float, float]:
    """The range moved outward to round numbers, so that it tells little about the extreme records.

    >>> widen(28, 77), widen(71, 202), widen(-2.6, 6.2), widen(5, 5)
    ((20, 80), (70, 210), (-3, 7), (0, 10))
    """
    first, last = Decimal(repr(float(low))), Decimal(repr(float(high)))
    span = last - first or abs(last) or Decimal(1)
    step = Decimal(1).scaleb(math.floor((span / 2).log10()))
    bottom, top = (
        (first / step).to_integral_value("ROUND_FLOOR"),
        (last / step).to_integral_value("ROUND_CEILING"),
    )
    if bottom == top:
        bottom, top = bottom - 5, top + 5
    return _plain(bottom * step), _plain(top * step)


def _plain(value: Decimal) -> float:
    return int(value) if value == value.to_integral_value() and abs(value) < 10**15 else float(value)
