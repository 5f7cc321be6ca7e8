"""The file that `task.declaration` names: a table's declaration, written by a person, as YAML."""

import dataclasses
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped, unused-ignore]

from fedmed import strict_yaml
from fedmed.errors import ConfigError, nearest
from fedmed.task import ColumnConfig

# What a declaration cannot say: which class it fills, and where it is.
_NOT_HERE = ("kind", "declaration")


def read_declaration(path: str, schema: type) -> dict[str, Any]:
    """The file's keys and values, for OmegaConf, which finds nothing to interpolate in them.

    Args:
        schema: the dataclass of the task, whose fields are the valid keys.

    Raises:
        ConfigError: no such file, not YAML, an unknown key, or an entry that YAML does not read as text.
    """
    where = f"task.declaration={path}"
    read = _parse(path, where)
    valid = {field.name for field in dataclasses.fields(schema)}.difference(_NOT_HERE)
    _check_keys(read, valid, where)
    if "columns" in read:
        _check_columns(read["columns"], f"{where}: columns")
    return {key: _literal(value, f"{where}: {key}") for key, value in read.items()}


def _parse(path: str, where: str) -> dict[str, Any]:
    try:
        read = strict_yaml.parse(Path(path).expanduser().read_text("utf-8-sig"))
    except FileNotFoundError:
        raise ConfigError(f"{where}: no such file; fedmed task describe FILE proposes one") from None
    except (OSError, RuntimeError) as error:
        raise ConfigError(f"{where}: cannot be read ({getattr(error, 'strerror', error)})") from None
    except (yaml.YAMLError, ValueError, TypeError) as error:
        # The parser's message quotes the file, which may by mistake be the table itself.
        mark = getattr(error, "problem_mark", None)
        place = f" (line {mark.line + 1} or below)" if mark else ""
        raise ConfigError(f"{where}: not YAML in UTF-8, or a key stands twice{place}") from None
    if not isinstance(read, dict) or not read:
        raise ConfigError(f"{where}: expected lines of KEY: VALUE; fedmed task describe FILE proposes them")
    return read


def _check_columns(columns: Any, where: str) -> None:
    if not isinstance(columns, dict) or not all(isinstance(column, dict) for column in columns.values()):
        raise ConfigError(f"{where}: expected NAME: and below it the keys of that column, for each column")
    valid = [field.name for field in dataclasses.fields(ColumnConfig)]
    for name, column in columns.items():
        _check_keys(column, valid, f"{where}.{name}")


def _check_keys(read: dict[Any, Any], valid: Collection[str], where: str) -> None:
    for key in read:
        if key not in valid:
            raise ConfigError(f"{where}: unknown key '{key}'; {nearest(str(key), valid)}")


def _literal(value: Any, where: str) -> Any:
    if isinstance(value, dict):
        if any(isinstance(key, bool | None) for key in value):
            raise ConfigError(f"{where}: YAML reads a name as true, false or null; put it in quotes")
        return {str(key): _literal(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, list):
        # `[yes, no]` is read as true and false, and `01` as 1: neither is the cell that was meant.
        if not all(isinstance(item, str) for item in value) and not where.endswith(".cutoffs"):
            raise ConfigError(f"{where}: YAML reads an entry as something else than text; put each in quotes")
        return [_literal(item, where) for item in value]
    if isinstance(value, str):
        return re.sub(r"(\\*)\$\{", lambda match: match[1] * 2 + "\\${", value)
    return value
