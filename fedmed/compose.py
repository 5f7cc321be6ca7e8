"""From overrides on a command line to checked `RunConfig`s, through Hydra, without its tracebacks."""

import contextlib
import copy
import dataclasses
import functools
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from hydra import compose as hydra_compose
from hydra import initialize_config_module
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fedmed.config import OPTIONS, RunConfig, run_config_from_dict
from fedmed.data.declaration import read_declaration
from fedmed.errors import ConfigError, nearest
from fedmed.schema import to_dict, type_in_words

GROUPS = (*OPTIONS, "experiment")

# Option files name the schema they fill by these: configs/model/minilm.yaml starts with `_text`.
_SCHEMAS: dict[str, dict[str, type]] = {
    group: {f"_{cls}": kinds[cls] for cls in kinds} for group, kinds in OPTIONS.items()
}


def _thawed(node: DictConfig) -> DictConfig:
    """The node without the read-only flag that a frozen dataclass gives it, at every level."""
    node._set_flag("readonly", None)
    for key in node:
        child = node._get_node(key)
        if isinstance(child, DictConfig) and not child._is_none() and not child._is_missing():
            _thawed(child)
    return node


@functools.cache
def _register() -> None:
    store = ConfigStore.instance()
    store.store(name="_run", node=_thawed(OmegaConf.structured(RunConfig)))
    for group, schemas in _SCHEMAS.items():
        for name, cls in schemas.items():
            store.store(group=group, name=name, node=_thawed(OmegaConf.structured(cls)))


@contextlib.contextmanager
def _hydra() -> Iterator[None]:
    _register()
    GlobalHydra.instance().clear()
    try:
        with initialize_config_module("configs", version_base="1.3", job_name="fedmed"):
            yield
    finally:
        GlobalHydra.instance().clear()


@functools.cache
def options(group: str) -> tuple[str, ...]:
    """The valid options of a group: `options("model")` names every file under configs/model/. Hydra looks through all
    of configs/ for it: once a process is enough."""
    loader = GlobalHydra.instance().config_loader()
    return tuple(name for name in loader.get_group_options(group) if not name.startswith("_"))


def compose(overrides: Sequence[str]) -> RunConfig:
    """The run that these overrides describe.

    Args:
        overrides: as typed, e.g. `["model=minilm", "privacy.epsilon=1"]`; with `resume=DIR` the
            configuration comes from that folder and only `rounds` may stand beside it.

    Raises:
        ConfigError: an unknown or malformed key or value; the message names the nearest valid one.
    """
    jobs = expand(overrides)
    if len(jobs) != 1:
        raise ConfigError(
            f"{len(jobs)} runs described by a list of values; sweep over them with: fedmed run -m"
        )
    parsed = _parse(jobs[0])
    resumed = [override for override in parsed if override.key_or_group == "resume"]
    if resumed and resumed[-1].value() is not None:
        others = [override for override in parsed if override.key_or_group != "resume"]
        return _resumed(str(resumed[-1].value()), others)
    with _hydra():
        return _compose(jobs[0])


def compose_sweep(overrides: Sequence[str]) -> list[tuple[list[str], RunConfig]]:
    """Every job of a sweep, all composed and checked before the first may start."""
    for override in _parse(overrides):
        if override.key_or_group in ("run_dir", "resume"):
            raise ConfigError(
                f"'{override.input_line}': not in a sweep, whose runs are new, in sweeps/<time>/<n>"
            )
    with _hydra():
        return [(job, _compose(job)) for job in expand(overrides)]


def expand(overrides: Sequence[str]) -> list[list[str]]:
    """The cartesian product of comma-separated values, `choice(…)` and `range(…)`, in Hydra's grammar.

    >>> expand(["seed=0,1", "rounds=3"])
    [['seed=0', 'rounds=3'], ['seed=1', 'rounds=3']]
    """
    jobs: list[list[str]] = [[]]
    for override in _parse(overrides):
        if override.is_sweep_override():
            key = override.get_key_element()
            values = [f"{key}={value}" for value in override.sweep_string_iterator()]
        else:
            values = [str(override.input_line)]
        jobs = [[*job, value] for job in jobs for value in values]
    return jobs


def _parse(overrides: Sequence[str]) -> list[Override]:
    parsed = []
    parser = OverridesParser.create()
    for text in overrides:
        try:
            override = parser.parse_override(text)
        # Python itself refuses a number of 5,000 digits, or brackets a thousand deep.
        except (HydraException, ValueError, RecursionError):
            raise ConfigError(f"'{text}': {_malformed(text)}") from None
        key = override.key_or_group
        if override.is_delete():
            raise ConfigError(f"'{text}': a setting cannot be deleted; set it instead, e.g. {key}=…")
        if override.package is not None:
            raise ConfigError(f"'{text}': no package can be chosen; expected {key}=…")
        if not key:
            raise ConfigError(f"'{text}': {_malformed('')}")
        parsed.append(override)
    return parsed


def _malformed(text: str) -> str:
    key, equals, value = text.partition("=")
    if not equals or not value.strip() or not re.fullmatch(r"[+]*[\w./-]+", key, re.ASCII):
        return "expected key=value, e.g. rounds=20 or model=minilm"
    quoted = value.replace("\\", "\\\\").replace('"', '\\"')
    return f"the value cannot be read; as text, in a shell: '{key}=\"{quoted}\"'"


def _compose(overrides: list[str]) -> RunConfig:
    chosen: dict[str, str] = {}
    values = []
    for override in _parse(overrides):
        key = override.key_or_group
        if key not in GROUPS:
            values.append(override)
        elif key == "experiment" and override.value() is None:
            chosen.pop(key, None)
        else:
            chosen[key] = _option(key, override.value())
    # A copy, since values are set in it.
    composed = copy.deepcopy(_composed(*(f"{key}={option}" for key, option in chosen.items())))
    declared = _merge_declaration(composed, values)
    for override in values:
        _apply(composed, override)
    try:
        built = OmegaConf.to_object(composed)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{error.full_key or 'settings'}: {_first_line(error)}") from None
    if not isinstance(built, RunConfig):
        raise ConfigError("configs/config.yaml does not build a RunConfig")
    # Holds to its type what OmegaConf lets pass; and what was composed here can be resumed later.
    built = run_config_from_dict(to_dict(built))
    return _filled(built, declared | {override.key_or_group.removeprefix("task.") for override in values})


@functools.lru_cache(maxsize=64)
def _composed(*groups: str) -> DictConfig:
    """The options that were chosen. The jobs of a sweep share most of them, and Hydra takes its time."""
    try:
        return hydra_compose("config", overrides=list(groups))
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(f"{' '.join(groups)}: {_first_line(error)}") from None


def _merge_declaration(composed: DictConfig, values: list[Override]) -> set[str]:
    """Put the keys of the file `task.declaration` into the task, each in place of what stood there.

    Returns:
        The names of these keys.
    """
    named = [override.value() for override in values if override.key_or_group == "task.declaration"]
    path = named[-1] if named else composed.task.get("declaration")
    task_schema = OmegaConf.get_type(composed.task)
    if not isinstance(path, str) or task_schema is None or "declaration" not in composed.task:
        # What is no file's name is refused where the other values are.
        return set()
    read = read_declaration(path, task_schema)
    for key, value in read.items():
        try:
            OmegaConf.update(composed.task, key, value, merge=False)
        except OmegaConfBaseException:
            expected = _type_name(composed.task, key)
            raise ConfigError(f"task.declaration={path}: {key}: expected {expected}") from None
    return set(read)


def _filled(config: RunConfig, declared: set[str]) -> RunConfig:
    """Under `task.declare=from_data`, the run with what nobody declared read from the table."""
    if getattr(config.task, "declare", None) != "from_data":
        return config
    # Imported here: it brings pandas.
    from fedmed.data.describe import fill

    return dataclasses.replace(config, task=fill(config.task, declared=declared))


def _option(group: str, asked: object) -> str:
    option, valid = "null" if asked is None else str(asked), options(group)
    if option not in valid:
        raise ConfigError(f"{group}={option}: no such {group}; {nearest(option, valid)}")
    return option


def _apply(composed: DictConfig, override: Override) -> None:
    """Set one value where its key exists, or add it where the parent is a mapping of free keys."""
    key, text = override.key_or_group, override.input_line
    parent_key, _, leaf = key.rpartition(".")
    parent = OmegaConf.select(composed, parent_key) if parent_key else composed
    known = isinstance(parent, DictConfig) and (leaf in parent or _free_keys(parent))
    if not known:
        raise ConfigError(f"'{text}': no setting '{key}'; {nearest(key, [*_keys(composed), *GROUPS])}")
    hint = _type_name(parent, leaf)
    # OmegaConf takes 3 for true, and ??? for no value.
    truth = hint == type_in_words(bool)
    if override.value() == "???" or (truth and not isinstance(override.value(), bool)):
        raise ConfigError(f"'{text}': expected {hint}")
    try:
        # A mapping of free keys is replaced whole: its keys are the sites of the run, the columns of a table.
        free = _free_keys(parent) or (
            isinstance(parent._get_node(leaf), DictConfig) and _free_keys(parent[leaf])
        )
        OmegaConf.update(composed, key, override.value(), merge=not free, force_add=free)
    except OmegaConfBaseException:
        raise ConfigError(f"'{text}': expected {hint}") from None


def _free_keys(node: DictConfig) -> bool:
    return OmegaConf.get_type(node) is dict


def _type_name(parent: DictConfig, leaf: str) -> str:
    cls = OmegaConf.get_type(parent)
    if dataclasses.is_dataclass(cls):
        return type_in_words(next(field.type for field in dataclasses.fields(cls) if field.name == leaf))
    return type_in_words(parent._metadata.element_type)


def _keys(node: DictConfig, prefix: str = "") -> Iterator[str]:
    for key in map(str, node):
        child = node._get_node(key)
        yield f"{prefix}{key}"
        if isinstance(child, DictConfig) and not child._is_none() and not child._is_missing():
            yield from _keys(child, f"{prefix}{key}.")


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]


def _resumed(folder: str, others: list[Override]) -> RunConfig:
    path = Path(folder) / "config.json"
    try:
        values = json.loads(path.read_text())
    except OSError:
        raise ConfigError(
            f"resume={folder}: no config.json in it; expected the folder of an earlier run"
        ) from None
    except ValueError:
        values = None
    if not isinstance(values, dict):
        raise ConfigError(f"resume={folder}: its config.json is damaged")
    for override in others:
        if override.key_or_group != "rounds":
            raise ConfigError(f"'{override.input_line}': with resume only rounds may change")
        values["rounds"] = override.value()
    try:
        return dataclasses.replace(run_config_from_dict(values), resume=folder, run_dir=folder)
    except ConfigError as error:
        raise ConfigError(f"resume={folder}: {error}") from None
