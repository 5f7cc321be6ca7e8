"""Tables: one row a record, federated by a column, read as declared.

The declaration (ranges, categories, sizes) is public and written by a person; nothing about it is read
from the records (privacy.md, rule 9). A cell that the declaration does not allow quarantines its record
with a reason code; no message holds a cell's value.
"""

import hashlib
import importlib.resources
import io
import re
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from fedmed.data.dataset import Manifest, SiteDataset, check_parts
from fedmed.data.sentences import bounds, category_phrase, numeric_phrase, sentence, synthetic_sentences
from fedmed.data.split import held_out, pseudonym
from fedmed.errors import DataError, nearest
from fedmed.task import ColumnConfig, TableTaskConfig

READER = "table/2"

# What programs write for "no value".
BLANK_WORDS = frozenset({"na", "n/a", "#n/a", "<na>", "nan", "null", "none"})
# The indicator of a blank cell: as wide as a numeric column's range from -1 to 1.
BLANK = 2.0


def locate(path: str) -> Path:
    """The file that a `task.path` names; `pkg://package/file` is inside an installed package."""
    if not path.startswith("pkg://"):
        return Path(path).expanduser()
    package, _, name = path.removeprefix("pkg://").partition("/")
    try:
        return Path(str(importlib.resources.files(package).joinpath(name)))
    except (ImportError, TypeError, ValueError):
        raise DataError(f"task.path={path}: no installed package '{package}'") from None


def version_of(task: TableTaskConfig, site: str) -> tuple[int, ...]:
    """What changes when the file is written or replaced: its inode, size and time.

    Raises:
        DataError: no such file.
    """
    del site
    try:
        status = locate(task.path or "").stat()
    except OSError:
        raise DataError(f"task.path={task.path}: no such file") from None
    return status.st_ino, status.st_size, status.st_mtime_ns


def read_csv(path: str) -> tuple[pd.DataFrame, str]:
    """All cells as text without surrounding blanks (an empty one: missing) and the file's sha256.

    A column without a name (an index that a program wrote) is left out.

    Raises:
        DataError: no such file, not readable, empty, or not a table.
    """
    try:
        file = locate(path)
        if file.exists() and not file.is_file():
            raise DataError(f"task.path={path}: a folder or a device; expected a CSV file")
        content = file.read_bytes()
    except FileNotFoundError:
        raise DataError(f"task.path={path}: no such file") from None
    except PermissionError:
        raise DataError(f"task.path={path}: no permission to read it") from None
    except (OSError, RuntimeError, ValueError):
        raise DataError(f"task.path={path}: cannot be read") from None
    table = _parse_csv(path, content)
    if len(table.columns) == 1 and (found := next((c for c in ";\t|" if c in table.columns[0]), None)):
        raise DataError(f"task.path={path}: its header is separated by {found!r}; expected commas")
    twice = table.columns[table.columns.duplicated()]
    if len(twice):
        raise DataError(f"task.path={path}: {len(twice)} column name(s) stand twice in the header")
    if table.empty:
        raise DataError(f"task.path={path}: a header and no record")
    return table, hashlib.sha256(content).hexdigest()


def _parse_csv(path: str, content: bytes) -> pd.DataFrame:
    # Without header=None, pandas renames a repeated column and takes surplus cells for row names.
    options: dict[str, Any] = {
        "header": None,
        "dtype": str,
        "keep_default_na": False,
        "skipinitialspace": True,
    }
    try:
        cells = pd.read_csv(io.BytesIO(content), encoding="utf-8-sig", **options)
    except pd.errors.EmptyDataError:
        raise DataError(f"task.path={path}: an empty file; expected a header line and records") from None
    except UnicodeDecodeError:
        raise DataError(f"task.path={path}: not text in UTF-8; save the table as CSV in UTF-8") from None
    except pd.errors.ParserError as error:
        # The parser's message is not shown: it may quote a cell. Its line number may be.
        line = re.search(r"fields in line (\d+)", str(error))
        expected = f"line {line[1]} has more cells than the header" if line else "a quote is never closed"
        raise DataError(f"task.path={path}: not a comma-separated table: {expected}") from None
    cells = cells.apply(lambda column: column.str.strip())
    table = cells.iloc[1:].mask(cells.iloc[1:] == "").reset_index(drop=True)
    table.columns = pd.Index(cells.iloc[0].tolist())
    return table.loc[:, table.columns != ""]


def blank_cells(cells: pd.Series, *, declared: Collection[str] = ()) -> NDArray[np.bool_]:
    """Which cells are empty or say so in one of `BLANK_WORDS`, unless that word is a declared value."""
    words = cells.str.casefold().isin(BLANK_WORDS) & ~cells.isin(list(declared))
    return (cells.isna() | words).to_numpy(dtype=bool)


@dataclass(frozen=True)
class _Column:
    """One column, parsed: scaled values, phrases, and which records it makes unusable.

    A cell is `blank` where it is `empty` or one of the column's `missing`.
    """

    values: NDArray[np.float32]
    phrases: list[str]
    empty: NDArray[np.bool_]
    blank: NDArray[np.bool_]
    refused: NDArray[np.bool_]


def read_site(
    task: TableTaskConfig, site: str, *, seed: int, key: bytes | None = None, maybe_empty: bool = False
) -> SiteDataset:
    """The records of one site.

    Args:
        seed: of a `split: shuffle` (public benchmarks); a `hash` split uses the site's own key.
        key: of a `split: hash`, where the site keeps its key in a folder of its own; None: that of `site_key`.
        maybe_empty: read a site without a usable record, or with none in one part, like any other. Where the reply is
            private it must not tell: a declaration that leaves one patient's records would ask for that patient.

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

    labels = rows[task.label]
    refuse(blank_cells(labels, declared=[*task.positive, *task.negative]), "label-blank")
    refuse(~labels.isin([*task.positive, *task.negative]).to_numpy(), "label-not-declared")
    if task.patient_column:
        refuse(blank_cells(rows[task.patient_column]), "patient-id-missing")
    columns = {name: _parse(name, column, rows[name]) for name, column in task.columns.items()}
    for name, parsed in columns.items():
        refuse(parsed.refused, f"{name}: {_refusal(task.columns[name])}")
        if task.blanks == "drop":
            refuse(parsed.empty, f"{name}: blank")
    reasons = Counter({reason: count for reason, count in reasons.items() if count})
    if not (usable.any() or maybe_empty):
        listed = "; ".join(f"{count} x {reason}" for reason, count in reasons.items()) or "no row names it"
        raise DataError(
            f"site '{site}' has no usable record ({listed}); check task.site_column and the declaration"
        )

    keep = np.flatnonzero(usable)
    ids = (rows[task.patient_column] if task.patient_column else _record_ids(rows)).iloc[keep].tolist()
    names = list(dict.fromkeys(ids))
    codes = {name: code for code, name in enumerate(names)}
    patients = np.array([codes[name] for name in ids], dtype=np.int64)
    positive = labels.iloc[keep].isin(task.positive).to_numpy(dtype=bool).astype(np.float32)
    test = held_out(task, site, names, seed=seed, key=key)[patients]
    units = f"{len(names)} usable {task.unit}s"
    warnings = check_parts(site, positive, test, units=units, maybe_empty=maybe_empty)
    return SiteDataset(
        site=site,
        features=_features(task, columns, keep),
        texts=[sentence(task, (column.phrases[row] for column in columns.values())) for row in keep],
        labels=positive,
        patients=patients,
        test=test,
        pseudonyms=tuple(pseudonym(key, name) for name in names) if key and task.patient_column else (),
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


def check_site(task: TableTaskConfig, site: str, *, seed: int) -> Manifest:
    """What `read_site` says of the data, or refuses."""
    return read_site(task, site, seed=seed).manifest


def made_up(task: TableTaskConfig, records: int) -> dict[str, Any]:
    """Features and sentences of no patient: to time a step with."""
    shape = (records, len(feature_names(task)))
    features = np.random.default_rng(0).uniform(-0.5, 0.5, size=shape).astype(np.float32)
    return {"features": features, "texts": synthetic_sentences(task, records)}


def _record_ids(rows: pd.DataFrame) -> pd.Series:
    """An id for each record from its own cells, so that removing another record moves nobody.

    A row's number would do so. Equal records are numbered: which of them goes makes no difference.
    """
    texts = rows.fillna("").agg("\x1f".join, axis=1) if len(rows) else pd.Series(dtype=str)
    return texts + "\x1f" + texts.groupby(texts).cumcount().astype(str)


def sites_in(task: TableTaskConfig) -> Counter[str]:
    """Rows per value of the site column; blank ones under ''."""
    table, _ = read_csv(task.path or "")
    _check_columns(task, table)
    return Counter(table[task.site_column].fillna("").tolist())


def feature_names(task: TableTaskConfig) -> list[str]:
    """The names of `SiteDataset.features`' columns, in order."""
    names = []
    for name, column in task.columns.items():
        names += (
            [name] if column.kind == "numeric" else [f"{name}={value}" for value in column.categories[1:]]
        )
        if _has_indicator(task, column):
            names.append(f"{name} blank")
    return names


def _check_columns(task: TableTaskConfig, table: pd.DataFrame) -> None:
    roles = {"task.site_column": task.site_column, "task.label": task.label}
    if task.patient_column is not None:
        roles["task.patient_column"] = task.patient_column
    for key, name in roles.items():
        if name not in table.columns:
            raise DataError(f"{key}={name}: the table has no such column; {_hint(name, table)}")
    for name in task.columns:
        if name not in table.columns:
            raise DataError(f"task.columns.{name}: the table has no such column; {_hint(name, table)}")
        if name in (task.label, task.patient_column):
            raise DataError(
                f"task.columns.{name}: is the label or the patient's id; a model must not read it"
            )
    if not task.columns:
        raise DataError("task.columns: none declared; propose them with: fedmed task describe FILE")


def _hint(name: str, table: pd.DataFrame) -> str:
    """The nearest column, unless the first line may be a record: then its cells must not be shown."""
    return nearest(name, table.columns) if has_header(table) else "is the first line of the file its header?"


def has_header(table: pd.DataFrame) -> bool:
    """False where a column's name is a number, or also stands in a cell below it."""
    return not any(
        pd.notna(pd.to_numeric(name, errors="coerce")) or (table[name] == name).any()
        for name in table.columns
    )


def numbers_in(cells: pd.Series) -> NDArray[np.float64]:
    """Each cell's number, NaN where it is none."""
    return pd.to_numeric(cells, errors="coerce").to_numpy(dtype=np.float64)


def _parse(name: str, column: ColumnConfig, cells: pd.Series) -> _Column:
    empty = blank_cells(cells, declared=[*column.categories, *column.missing])
    blank = empty | cells.isin(column.missing).to_numpy(dtype=bool)
    if column.kind == "numeric":
        low, high = bounds(column)
        numbers = numbers_in(cells)
        # A cell of 0.0 is as missing as one of 0.
        blank |= np.isin(numbers, numbers_in(pd.Series(column.missing, dtype=str)))
        finite = np.isfinite(numbers)
        refused = ~blank & ~finite
        clipped = np.clip(np.where(finite, numbers, low), low, high)
        values = np.where(blank, 0.0, 2 * (clipped - low) / (high - low) - 1)[:, None].astype(np.float32)
        written = [numeric_phrase(name, column, value) for value in clipped]
    else:
        refused = ~blank & ~cells.isin(column.categories).to_numpy(dtype=bool)
        # Reference coding: the first category is all zeros, as the intercept speaks for it.
        values = np.zeros((len(cells), len(column.categories) - 1), dtype=np.float32)
        for index, value in enumerate(column.categories[1:]):
            values[:, index] = (cells == value) & ~blank
        written = [category_phrase(name, column, str(cell)) for cell in cells]
    phrases = [column.blank if unknown else phrase for unknown, phrase in zip(blank, written, strict=True)]
    return _Column(values, phrases, empty, blank, refused)


def _refusal(column: ColumnConfig) -> str:
    return "not a number" if column.kind == "numeric" else "category not declared"


def _features(
    task: TableTaskConfig, columns: dict[str, _Column], keep: NDArray[np.int64]
) -> NDArray[np.float32]:
    parts = []
    for name, parsed in columns.items():
        parts.append(parsed.values[keep])
        if _has_indicator(task, task.columns[name]):
            parts.append(BLANK * parsed.blank[keep, None].astype(np.float32))
    return np.concatenate(parts, axis=1)


def _has_indicator(task: TableTaskConfig, column: ColumnConfig) -> bool:
    return task.blanks == "indicator" or bool(column.missing)
