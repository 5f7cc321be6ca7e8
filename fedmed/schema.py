"""Between plain mappings and frozen dataclasses: strict, key by key and type by type."""

import dataclasses
import math
import types
import typing
from typing import Any

from fedmed.errors import ConfigError, nearest, require


def from_dict(cls: type, values: dict[str, Any], *, where: str = "") -> Any:
    """An instance of the dataclass `cls` from a plain mapping, checked key by key and type by type."""
    hints = typing.get_type_hints(cls)
    names = {f.name for f in dataclasses.fields(cls)}
    prefix = f"{where}." if where else ""
    for key in values:
        if key not in names:
            raise ConfigError(f"{prefix}{key}: unknown key; {nearest(str(key), names)}")
    try:
        return cls(**{key: _convert(hints[key], value, f"{prefix}{key}") for key, value in values.items()})
    except TypeError as error:
        raise ConfigError(f"{where}: {error}") from None
    except ConfigError as error:
        # A column's own checks do not know its name.
        raise ConfigError(str(error).replace("task.columns.*", where)) from None


def check_finite(config: Any, where: str) -> None:
    """Refuse infinity and NaN, which JSON cannot hold and comparisons let pass."""
    for name in (f.name for f in dataclasses.fields(config)):
        value = getattr(config, name)
        for number in value if isinstance(value, list) else [value]:
            ok = not isinstance(number, float) or math.isfinite(number)
            require(ok, f"{where}.{name}", number, "a finite number")


def _convert(hint: Any, value: Any, where: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        return None if value is None else _convert(next(a for a in args if a is not type(None)), value, where)
    if origin is list and isinstance(value, list):
        return [_convert(args[0], item, where) for item in value]
    if origin is dict and isinstance(value, dict):
        return {str(key): _convert(args[1], item, f"{where}.{key}") for key, item in value.items()}
    if dataclasses.is_dataclass(hint) and isinstance(hint, type) and isinstance(value, dict):
        return from_dict(hint, value, where=where)
    if hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if isinstance(hint, type) and origin is None and type(value) is hint:
        return value
    raise ConfigError(f"{where}={value!r}: expected {type_in_words(hint)}")


def type_in_words(hint: Any) -> str:
    """What may stand in a field of this type, for a message.

    >>> type_in_words(int | None)
    'a whole number or null'
    """
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return f"{type_in_words(args[0])} or null"
    if dataclasses.is_dataclass(hint) or origin is dict:
        return "a mapping, e.g. {a: 1}" if origin else "its settings one by one, as KEY.SETTING=VALUE"
    if origin is list:
        return f"a list, e.g. [a, b], each {type_in_words(args[0])}"
    return {int: "a whole number", float: "a number", bool: "true or false", str: "text"}.get(hint, str(hint))


def to_dict(config: Any) -> dict[str, Any]:
    """The plain mapping from which `parse` builds an equal dataclass."""
    return dataclasses.asdict(config)
