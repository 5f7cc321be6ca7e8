"""Tables: one row a record, federated by a column, read as declared.

The declaration (ranges, categories, sizes) is public and written by a person; nothing about it is read
from the records (privacy.md, rule 9). A cell that the declaration does not allow quarantines its record
with a reason code; no message holds a cell's value.
"""

import hashlib
import importlib.resources
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from fedmed.config import ColumnConfig, TableTaskConfig
from fedmed.data.dataset import Manifest, SiteDataset
from fedmed.data.split import hash_split, shuffle_split, site_key
from fedmed.errors import DataError, nearest

READER = "table/1"


def locate(path: str) -> Path:
    """The file that a `task.path` names; `pkg://package/file` is inside an installed package."""
    if path.startswith("pkg://"):
        package, _, name = path.removeprefix("pkg://").partition("/")
        return Path(str(importlib.resources.files(package).joinpath(name)))
    return Path(path).expanduser()


def read_csv(path: str) -> tuple[pd.DataFrame, str]:
    """All cells as text (blank: missing) and the file's sha256.

    Raises:
        DataError: no such file, not readable, empty, or not a table.
    """
    file = locate(path)
    if not file.is_file():
        raise DataError(f"task.path={path}: no such file")
    try:
        content = file.read_bytes()
        table = pd.read_csv(file, dtype=str, skipinitialspace=True, encoding="utf-8-sig")
    except PermissionError:
        raise DataError(f"task.path={path}: no permission to read it") from None
    except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError):
        # The parser's own message quotes cells.
        raise DataError(f"task.path={path}: not a comma-separated table in UTF-8 with a header line") from None
    if table.empty:
        raise DataError(f"task.path={path}: a header and no record")
    return table, hashlib.sha256(content).hexdigest()


@dataclass(frozen=True)
class _Column:
    """One column, parsed: scaled values, phrases, and which records it makes unusable."""

    values: NDArray[np.float32]
    phrases: list[str]
    blank: NDArray[np.bool_]
    refused: NDArray[np.bool_]


def read_site(task: TableTaskConfig, site: str, *, seed: int) -> SiteDataset:
    """The records of one site.

    Args:
        seed: of a `split: shuffle` (public benchmarks); a `hash` split uses the site's own key.

    Raises:
        DataError: a declared column is missing, or the site has no usable record to train or to test on.
    """
    table, digest = read_csv(task.path or "")
    _check_columns(task, table)
    rows = table[table[task.site_column] == site].reset_index(drop=True)
    reasons: Counter[str] = Counter()
    usable = np.ones(len(rows), dtype=bool)

    def refuse(mask: NDArray[np.bool_], reason: str) -> None:
        reasons[reason] += int((mask & usable).sum())
        usable[mask] = False

    labels = rows[task.label].str.strip()
    refuse(labels.isna().to_numpy(), "label-blank")
    refuse(~labels.isin([*task.positive, *task.negative]).to_numpy(), "label-not-declared")
    if task.patient_column:
        refuse(rows[task.patient_column].isna().to_numpy(), "patient-id-missing")
    columns = {name: _parse(name, column, rows[name]) for name, column in task.columns.items()}
    for name, parsed in columns.items():
        refuse(parsed.refused, f"{name}: {_refusal(task.columns[name])}")
        if task.blanks == "drop":
            refuse(parsed.blank, f"{name}: blank")
    reasons = Counter({reason: count for reason, count in reasons.items() if count})
    if not usable.any():
        listed = "; ".join(f"{count} x {reason}" for reason, count in reasons.items()) or "no row names it"
        raise DataError(f"site '{site}' has no usable record ({listed}); check task.site_column and the declaration")

    keep = np.flatnonzero(usable)
    ids = rows[task.patient_column].iloc[keep].tolist() if task.patient_column else [str(row) for row in keep]
    names = list(dict.fromkeys(ids))
    codes = {name: code for code, name in enumerate(names)}
    patients = np.array([codes[name] for name in ids], dtype=np.int64)
    if task.split == "hash":
        held_out = hash_split(names, fraction=task.test_fraction, key=site_key(site))
    else:
        held_out = shuffle_split(len(names), fraction=task.test_fraction, seed=seed)
    positive = labels.iloc[keep].isin(task.positive).to_numpy()
    test = held_out[patients]
    warnings = [f"{part} part has one class" for part, mask in (("training", ~test), ("test", test))
                if mask.any() and len(set(positive[mask])) == 1]  # fmt: skip
    for part, mask in (("training", ~test), ("test", test)):
        if not mask.any():
            raise DataError(f"site '{site}' has no {part} record; it has {len(names)} usable {task.unit}s in all")
    return SiteDataset(
        site=site,
        features=_features(task, columns, keep),
        texts=[task.separator.join(filter(None, words)) + "."
               for words in zip(*([c.phrases[i] for i in keep] for c in columns.values()), strict=True)],  # fmt: skip
        labels=positive.astype(np.float32),
        patients=patients,
        test=test,
        manifest=Manifest(
            content_sha256=digest,
            reader=READER,
            records=len(keep),
            patients=len(names),
            positives=int(positive.sum()),
            quarantined=dict(reasons),
            warnings=warnings,
        ),
    )


def sites_in(task: TableTaskConfig) -> Counter[str]:
    """Rows per value of the site column; blank ones under ''."""
    table, _ = read_csv(task.path or "")
    _check_columns(task, table)
    return Counter(table[task.site_column].fillna("").tolist())


def feature_names(task: TableTaskConfig) -> list[str]:
    """The names of `SiteDataset.features`' columns, in order."""
    names = []
    for name, column in task.columns.items():
        names += [name] if column.kind == "numeric" else [f"{name}={value}" for value in column.categories]
        if task.blanks == "indicator":
            names.append(f"{name} blank")
    return names


def synthetic_sentences(task: TableTaskConfig, count: int) -> list[str]:
    """Sentences drawn from the declaration alone: a public constant, the same at every site.

    Each column is drawn uniformly from its range or categories; one that declares a phrase for blanks is
    blank with probability 0.2.
    """
    draws = np.random.default_rng(0)
    sentences = []
    for _ in range(count):
        words = []
        for name, column in task.columns.items():
            blank = draws.random() < 0.2
            if column.kind == "numeric":
                assert column.low is not None and column.high is not None
                words.append(_numeric_phrase(name, column, draws.uniform(column.low, column.high)))
            else:
                category = column.categories[int(draws.integers(len(column.categories)))]
                words.append(_category_phrase(name, column, category))
            if blank and column.blank:
                words[-1] = column.blank
        sentences.append(task.separator.join(filter(None, words)) + ".")
    return sentences


def _check_columns(task: TableTaskConfig, table: pd.DataFrame) -> None:
    present = list(table.columns)
    roles = {"task.site_column": task.site_column, "task.label": task.label, "task.patient_column": task.patient_column}
    for key, name in roles.items():
        if name is not None and name not in present:
            raise DataError(f"{key}={name}: the table has no such column; {nearest(name, present)}")
    for name in task.columns:
        if name not in present:
            raise DataError(f"task.columns.{name}: the table has no such column; {nearest(name, present)}")
    if not task.columns:
        raise DataError("task.columns: none declared; propose them with: fedmed task describe FILE")


def _parse(name: str, column: ColumnConfig, cells: pd.Series) -> _Column:
    text = cells.str.strip()
    blank = (text.isna() | text.isin(["", *column.missing])).to_numpy(dtype=bool)
    if column.kind == "numeric":
        assert column.low is not None and column.high is not None
        numbers = pd.to_numeric(text.where(~blank), errors="coerce").to_numpy(dtype=np.float64)
        refused = ~blank & ~np.isfinite(numbers)
        clipped = np.clip(np.where(np.isfinite(numbers), numbers, column.low), column.low, column.high)
        scaled = 2 * (clipped - column.low) / (column.high - column.low) - 1
        values = np.where(blank, 0.0, scaled)[:, None].astype(np.float32)
        phrases = [column.blank if b else _numeric_phrase(name, column, v) for b, v in zip(blank, clipped, strict=True)]
    else:
        refused = ~blank & ~text.isin(column.categories).to_numpy(dtype=bool)
        values = np.stack([(text == value).to_numpy(dtype=np.float32) for value in column.categories], axis=1)
        phrases = [column.blank if b else _category_phrase(name, column, str(v)) for b, v in zip(blank, text, strict=True)]
    return _Column(values, phrases, blank, refused)


def _refusal(column: ColumnConfig) -> str:
    return "not a number" if column.kind == "numeric" else "category not declared"


def _features(
    task: TableTaskConfig, columns: dict[str, _Column], keep: NDArray[np.int64]
) -> NDArray[np.float32]:
    parts = []
    for parsed in columns.values():
        parts.append(parsed.values[keep])
        if task.blanks == "indicator":
            parts.append(parsed.blank[keep, None].astype(np.float32))
    # Half: a record's features then have a norm near 1, the default clipping norm.
    return (0.5 * np.concatenate(parts, axis=1)).astype(np.float32)


def _numeric_phrase(name: str, column: ColumnConfig, value: float) -> str:
    word = column.cutoff_words[int(np.searchsorted(column.cutoffs, value, side="right"))] if column.cutoff_words else ""
    return (column.phrase or f"{name} {{value}}").format(value=f"{value:.{column.decimals}f}", word=word)


def _category_phrase(name: str, column: ColumnConfig, category: str) -> str:
    return column.words.get(category, (column.phrase or f"{name} {{value}}").format(value=category, word=category))
