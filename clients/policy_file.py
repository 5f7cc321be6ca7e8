"""`site.yaml`: written with every option and what it means, read strictly, with one line for each mistake."""

import json
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from clients.policy import ModelEntry, Policy
from fedmed import strict_yaml
from fedmed.errors import ConfigError, nearest

WIDTH = 100
HEADER = """\
What this site allows. Read by fedmed alone; a run that asks for more is refused before any data is opened.
Show what is in force, and which values are defaults: fedmed site policy DIR
"""


class PolicyError(ConfigError):
    """A site.yaml that cannot be used. Each of `lines` names file, key, value, and what was expected."""

    def __init__(self, lines: list[str]) -> None:
        super().__init__("; ".join(lines))
        self._lines = tuple(lines)

    @property
    def lines(self) -> tuple[str, ...]:
        """One line for each mistake."""
        return self._lines


def read_policy(path: Path) -> Policy:
    """The policy in a file.

    Raises:
        PolicyError: the file cannot be read, is no YAML, or holds an unknown key or a value that may not stand there.
    """
    try:
        values = _text_keys(strict_yaml.parse(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise PolicyError([f"{path}: cannot be read ({error.strerror})"]) from None
    except UnicodeDecodeError:
        raise PolicyError([f"{path}: not text in UTF-8"]) from None
    except yaml.YAMLError as error:
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
        line = f"line {mark.line + 1}: " if mark else ""
        raise PolicyError([f"{path}: {line}not YAML ({problem or 'an unreadable character'})"]) from None
    except RecursionError:
        raise PolicyError([f"{path}: nested too deeply"]) from None
    if not isinstance(values, dict):
        raise PolicyError([f"{path}: expected keys with values, one a line, e.g. name: A"])
    try:
        return Policy.model_validate(values)
    except ValidationError as error:
        lines = [line for item in error.errors() for line in _lines(dict(item))]
    raise PolicyError([f"{path}: {line}" for line in lines]) from None


def render(policy: Policy) -> str:
    """The text of a site.yaml that gives this policy: every option, above it what it means."""
    return "\n".join([_comment(HEADER.replace("\n", " ")), "", *_options(policy, "")]) + "\n"


def option_values(policy: Policy) -> dict[str, tuple[Any, bool]]:
    """Each option by its dotted key: its value as plain data, and whether that is the default."""
    return dict(_walk(policy, policy.model_dump(mode="json"), ""))


def _walk(section: BaseModel, values: Mapping[str, Any], prefix: str) -> list[tuple[str, tuple[Any, bool]]]:
    found: list[tuple[str, tuple[Any, bool]]] = []
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        if isinstance(value, BaseModel):
            found += _walk(value, values[name], f"{prefix}{name}.")
        else:
            same = not field.is_required() and value == field.default
            found.append((f"{prefix}{name}", (values[name], same)))
    return found


def _options(section: BaseModel, indent: str) -> list[str]:
    lines = []
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        lines.append(_comment(field.description or "", indent))
        if isinstance(value, BaseModel):
            lines += [f"{indent}{name}:", *_options(value, indent + "  ")]
        else:
            lines += [f"{indent}{name}: {plain(section.model_dump(mode='json')[name])}", ""]
    return lines


def _comment(text: str, indent: str = "") -> str:
    start = f"{indent}# "
    return textwrap.fill(text.strip(), width=WIDTH, initial_indent=start, subsequent_indent=start)


def plain(value: Any) -> str:
    """A value as it stands in site.yaml, on one line."""
    text = yaml.dump(
        value, Dumper=strict_yaml.Dumper, default_flow_style=True, width=10_000, allow_unicode=True
    )
    return str(text).removesuffix("...\n").strip()


def _text_keys(values: Any) -> Any:
    if isinstance(values, dict):
        return {str(key): _text_keys(value) for key, value in values.items()}
    return [_text_keys(value) for value in values] if isinstance(values, list) else values


def _lines(error: dict[str, Any]) -> list[str]:
    if error["type"] == "together":
        return list(error["ctx"]["lines"])
    location = tuple(error["loc"])
    key = ".".join(str(part) for part in location)
    if error["type"] == "missing":
        return [f"{key}: missing; expected {_expected(location)}"]
    value = f"{key}={_short(error['input'])}"
    if error["type"] == "extra_forbidden":
        return [f"{value}: unknown key; {nearest(key, _keys_beside(location))}"]
    # 2026 and yes are no text in YAML.
    quotes = "; put it in quotes" if error["type"] == "string_type" else ""
    return [f"{value}: expected {_expected(location)}{quotes}"]


def _short(value: Any) -> str:
    text = value if isinstance(value, str) and value else json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= 80 else f"{text[:80]}…"


def _section(location: tuple[int | str, ...]) -> type[BaseModel]:
    """The section that holds the last key of a place."""
    if location[0] == "models" and len(location) > 2:
        return ModelEntry
    if location[0] == "metrics" and len(location) > 1:
        return type(Policy.model_fields["metrics"].default)
    return Policy


def _expected(location: tuple[int | str, ...]) -> str:
    section = _section(location)
    names = [part for part in location if part in section.model_fields]
    if not names:
        return "{id: …, sha256: …}"
    field: FieldInfo = section.model_fields[str(names[-1])]
    extra = field.json_schema_extra
    return str(extra["expected"]) if isinstance(extra, dict) else "another value"


def _keys_beside(location: tuple[int | str, ...]) -> list[str]:
    """All keys that could have been meant: those of the same section, and the policy's."""
    section = _section(location)
    if section is ModelEntry:
        return [f"models.{location[1]}.{name}" for name in ModelEntry.model_fields]
    inner = type(Policy.model_fields["metrics"].default).model_fields
    return [*Policy.model_fields, *(f"metrics.{name}" for name in inner)]
