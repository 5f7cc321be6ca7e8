"""Settings: frozen, checked by themselves, equal after JSON, closed to unknown keys and wrong types."""

import dataclasses
import inspect
import json
import math
import re
import typing
from typing import Any

import pytest

from fedmed import config as module
from fedmed import model as model_module
from fedmed import task as task_module
from fedmed.config import (
    MAX_STEPS,
    OPTIONS,
    AdapterConfig,
    FederationConfig,
    PrivacyConfig,
    RunConfig,
    StrategyConfig,
    TrackingConfig,
    TrainingConfig,
    parse,
    run_config_from_dict,
)
from fedmed.errors import ConfigError
from fedmed.model import (
    CnnModelConfig,
    ImageModelConfig,
    SoundModelConfig,
    TabularModelConfig,
    TextModelConfig,
)
from fedmed.pretrained import ModelAbout, PretrainedConfig
from fedmed.records import Instruction, instruction_record, to_bytes
from fedmed.schema import from_dict, to_dict, type_in_words
from fedmed.task import ColumnConfig, ImageTaskConfig, SoundTaskConfig, TableTaskConfig
from tests.timing import best

NUMERIC = {"low": 0.0, "high": 1.0}
# The least that each class can be built from, and the name that its messages begin with.
LEAST: dict[type, tuple[str, dict[str, Any]]] = {
    ColumnConfig: ("task.columns.age", NUMERIC),
    TableTaskConfig: ("task", {"path": "a.csv"}),
    ImageTaskConfig: ("task", {"kind": "image", "path": "ingested", "public_benchmark": True}),
    SoundTaskConfig: ("task", {"kind": "sound", "path": "recordings", "public_benchmark": True}),
    CnnModelConfig: ("model", {}),
    PretrainedConfig: ("model", {"path": "folder", "sha256": "0" * 64}),
    TextModelConfig: ("model", {"path": "folder", "sha256": "0" * 64}),
    ImageModelConfig: ("model", {"path": "folder", "sha256": "0" * 64}),
    ModelAbout: ("model.about", {}),
    SoundModelConfig: ("model", {"path": "folder", "sha256": "0" * 64}),
    TabularModelConfig: ("model", {"kind": "tabular"}),
    AdapterConfig: ("adapter", {}),
    PrivacyConfig: ("privacy", {}),
    StrategyConfig: ("strategy", {}),
    FederationConfig: ("federation", {}),
    TrackingConfig: ("tracking", {}),
    TrainingConfig: ("training", {}),
}
FIELDS = [(cls, field) for cls in LEAST for field in dataclasses.fields(cls)]


def ids(cases: list[Any]) -> list[str]:
    return [f"{cls.__name__}.{rest[0].name if rest else ''}" for cls, *rest in cases]


def built(cls: type, **changes: Any) -> Any:
    """The least instance, with changes; kinds that other settings need are chosen with them."""
    where, least = LEAST[cls]
    return from_dict(cls, least | changes, where=where)


def run_config(**changes: Any) -> RunConfig:
    values: dict[str, Any] = {
        "task": built(TableTaskConfig, declared_sizes={"a": 100}, columns={"age": NUMERIC}),
        "model": built(TabularModelConfig), "adapter": AdapterConfig(), "privacy": PrivacyConfig(),
        "strategy": StrategyConfig(), "federation": FederationConfig(), "tracking": TrackingConfig(),
    }  # fmt: skip
    return RunConfig(**(values | changes))


def test_every_class_of_the_module_is_in_this_file() -> None:
    """A class that is added without tests fails here."""
    found = [pair for part in (module, task_module, model_module) for pair in inspect.getmembers(part)]
    classes = {cls for _, cls in found if dataclasses.is_dataclass(cls)} | {ModelAbout}
    assert classes == {*LEAST, RunConfig}
    assert {cls for kinds in OPTIONS.values() for cls in kinds.values()} <= set(LEAST)


@pytest.mark.parametrize(("cls", "field"), FIELDS, ids=ids(FIELDS))
def test_a_setting_cannot_be_changed(cls: type, field: Any) -> None:
    instance = built(cls)
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(instance, field.name, getattr(instance, field.name))


def test_a_run_cannot_be_changed() -> None:
    config = run_config()
    for field in dataclasses.fields(RunConfig):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(config, field.name, None)


# One value of each JSON type; a field takes those of its own type alone.
SAMPLES = {
    "bool": True,
    "int": 1,
    "float": 0.5,
    "str": "x",
    "list": [object()],
    "dict": {"a": object()},
    "null": None,
}


def fitting(hint: Any) -> set[str]:
    """The samples that a field of this type may take."""
    args = typing.get_args(hint)
    if type(None) in args:
        return {"null"} | fitting(args[0])
    if hint is float:
        return {"int", "float"}
    name = {int: "int", bool: "bool", str: "str"}.get(hint)
    return {name} if name else set()


@pytest.mark.parametrize(("cls", "field"), FIELDS, ids=ids(FIELDS))
def test_a_value_of_another_type_is_refused_by_name(cls: type, field: Any) -> None:
    """Also an element of a list or mapping: the samples hold what no setting takes."""
    hint = typing.get_type_hints(cls)[field.name]
    refused = 0
    for name in SAMPLES.keys() - fitting(hint):
        if name == "dict" and (hint == dict[str, Any] or dataclasses.is_dataclass(hint)):
            continue
        with pytest.raises(ConfigError, match=rf"^{re.escape(LEAST[cls][0])}\.{field.name}\b.*: expected "):
            built(cls, **{field.name: SAMPLES[name]})
        refused += 1
    assert refused >= 4


@pytest.mark.parametrize(("cls", "field"), FIELDS, ids=ids(FIELDS))
def test_no_number_is_infinite_or_nan(cls: type, field: Any) -> None:
    """JSON holds neither, and `value <= 0` is false of NaN."""
    hint = str(field.type)
    if "float" not in hint:
        return
    for number in (math.nan, math.inf, -math.inf):
        value = [number] if hint.startswith("list") else number
        with pytest.raises(ConfigError, match=field.name):
            built(cls, **{field.name: value})


RANGES: list[tuple[type, str, list[Any], list[Any]]] = [
    (TableTaskConfig, "kind", [], ["text", ""]),
    (TableTaskConfig, "path", [], ["", None]),
    (TableTaskConfig, "test_fraction", [0.01, 0.99], [0.0, 1.0, -0.1, 1.5]),
    (TableTaskConfig, "blanks", ["drop"], ["", "Drop", "keep"]),
    (TableTaskConfig, "declare", ["from_data"], ["data"]),
    (TableTaskConfig, "split", ["hash"], ["random", "shuffle"]),
    (TableTaskConfig, "declared_sizes", [{}, {"a": 1}, {"a": 10**9}], [{"a": 0}, {"a": -3}, {"a": 10**9 + 1}]),
    (TableTaskConfig, "positive", [["2", "3"]], [[], ["0"], ["1", "0"]]),
    (ImageTaskConfig, "kind", [], ["table", ""]),
    (ImageTaskConfig, "path", [], ["", None]),
    (ImageTaskConfig, "positive", [["2", "3"]], [[], ["0"], ["1", "0"]]),
    (ImageTaskConfig, "modalities", [["CR"]], [[], ["CR", ""]]),
    (ImageTaskConfig, "image_size", [16, 1024], [15, 1025]),
    (ImageTaskConfig, "slices", [1, 64], [0, 65]),
    (ImageTaskConfig, "declared_sizes", [{}, {"a": 1}], [{"a": 0}, {"../b": 3}, {"..": 3}, {"": 3}]),
    (ImageTaskConfig, "images_per_patient", [None, 1, 10_000], [0, 10_001]),
    (ImageTaskConfig, "declared_images", [{}, {"a": 1}], [{"a": 0}, {"a": 10**9 + 1}]),
    (ImageTaskConfig, "unit", ["image"], ["record", ""]),
    (ImageTaskConfig, "declare", ["declared"], ["from_data"]),
    (ImageTaskConfig, "test_fraction", [0.01, 0.99], [0.0, 1.0]),
    (ImageTaskConfig, "split", ["shuffle"], ["random"]),
    (SoundTaskConfig, "kind", [], ["table", ""]),
    (SoundTaskConfig, "path", [], ["", None]),
    (SoundTaskConfig, "positive", [["2", "3"]], [[], ["0"], ["1", "0"]]),
    (SoundTaskConfig, "clips", [1, 64], [0, 65]),
    (SoundTaskConfig, "declared_sizes", [{}, {"a": 1}], [{"a": 0}, {"../b": 3}, {"": 3}]),
    (SoundTaskConfig, "test_fraction", [0.01, 0.99], [0.0, 1.0]),
    (SoundTaskConfig, "split", ["shuffle"], ["random"]),
    (CnnModelConfig, "kind", [], ["tabular"]),
    (TextModelConfig, "kind", [], ["tabular"]),
    (PretrainedConfig, "path", [], ["", None]),
    (TextModelConfig, "feature_norm", [0.1], [0.0, -1.0]),
    (PretrainedConfig, "sha256", ["a" * 64], ["", "a" * 63, "A" * 64]),
    (TextModelConfig, "pooling", ["cls"], ["max"]),
    (TextModelConfig, "max_tokens", [4, 8192], [3, 8193, -1]),
    (TextModelConfig, "synthetic_sentences", [0, 100_000], [-1, 100_001]),
    (TextModelConfig, "components", [0], [-1, 1]),
    (TextModelConfig, "whitening", [0.0, 1.0], [-0.1, 1.1]),
    (PretrainedConfig, "revision", [], ["a" * 40]),
    (PretrainedConfig, "lora_targets", ["q_proj|v_proj", r"self_attn\.(q|v)_proj"], ["(", "(a+)+", "a*", "x" * 201]),
    (PretrainedConfig, "activations", ["fp32", "fp16", "bf16"], ["", "fp8", "FP16"]),
    (SoundModelConfig, "kind", [], ["image"]),
    (ImageModelConfig, "kind", [], ["text"]),
    (ImageModelConfig, "image_size", [0, 16, 2048], [15, 2049, -1]),
    (ImageModelConfig, "pooling", ["cls", "mean", "pooler"], ["max", ""]),
    (ImageModelConfig, "feature_norm", [0.1], [0.0, -1.0]),
    (TabularModelConfig, "kind", [], ["text"]),
    (TabularModelConfig, "hidden", [0, 65_536], [-1, 65_537]),
    (AdapterConfig, "kind", ["head", "lora", "ffa_lora", "full"], ["Lora"]),
    (AdapterConfig, "rank", [1, 1024], [0, 1025]),
    (AdapterConfig, "alpha", [0.1], [0.0, -1.0]),
    (AdapterConfig, "last_blocks", [1], [0]),
    (PrivacyConfig, "kind", ["off"], ["none"]),
    (PrivacyConfig, "epsilon", [0.001, 100], [0.0, -1, 0.0009, 101]),
    (PrivacyConfig, "delta", [None, 1e-12, 0.1], [0.0, 1e-13, 0.2, 1.0, -1e-5]),
    (PrivacyConfig, "max_grad_norm", [1e-3], [0.0, -1.0]),
    (PrivacyConfig, "records_per_patient", [1, 20], [0]),
    (PrivacyConfig, "min_declared_size", [1], [0]),
    (PrivacyConfig, "metrics", ["private", "none"], ["", "noisy"]),
    (PrivacyConfig, "metrics_epsilon", [0.01, 100], [0.0, -1.0, 101]),
    (PrivacyConfig, "metrics_bins", [2, 20], [0, 1, 21]),
    (PrivacyConfig, "metrics_prevalence", [0.01, 0.99], [0.0, 1.0]),
    (StrategyConfig, "kind", ["fedyogi"], ["fedsgd"]),
    (StrategyConfig, "learning_rate", [0.1], [0.0, -1.0]),
    (StrategyConfig, "momentum", [0.0, 0.99], [1.0, -0.1]),
    (StrategyConfig, "beta_1", [0.0, 0.99], [1.0, -0.1]),
    (StrategyConfig, "beta_2", [0.0, 0.99], [1.0, -0.1]),
    (StrategyConfig, "tau", [1e-9], [0.0]),
    (StrategyConfig, "proximal_mu", [0.0], [-0.1]),
    (StrategyConfig, "average_last", [1, 5], [0]),
    (StrategyConfig, "norm_bound", [0.0], [-0.1]),
    (FederationConfig, "kind", [], ["ray"]),
    (FederationConfig, "workers", [0, 1], [-1]),
    (FederationConfig, "device", ["auto", "cpu", "cuda", "cuda:1"], ["gpu", "", "cuda:", "cuda:-1", "cpu:0"]),
    (FederationConfig, "quorum", [0.01, 1.0], [0.0, 1.01]),
    (FederationConfig, "timeout", [0.1], [0.0, -1.0]),
    (FederationConfig, "approval_timeout", [0.0, 1.0], [-1.0]),
    (FederationConfig, "sites", [None, "sites"], [""]),
    (FederationConfig, "coordinator", [None, "consortium"], [""]),
    (TrackingConfig, "kind", ["none"], ["wandb"]),
    (TrackingConfig, "uri", ["http://a"], [""]),
    (TrackingConfig, "experiment", ["a"], [""]),
    (TrainingConfig, "steps_per_round", [1], [0]),
    (TrainingConfig, "sample_rate", [0.01, 1.0], [0.0, 1.01]),
    (TrainingConfig, "optimizer", ["adam"], ["Adam", "adamw"]),
    (TrainingConfig, "learning_rate", [None, 0.1], [0.0, -1.0]),
    (TrainingConfig, "momentum", [0.0, 0.99], [1.0, -0.1]),
    (TrainingConfig, "weight_decay", [0.0], [-0.1]),
    (TrainingConfig, "physical_batch_size", [1], [0]),
    (TrainingConfig, "precision", ["bf16"], ["fp16", "BF16", ""]),
    (ColumnConfig, "kind", [], ["text"]),
    (ColumnConfig, "low", [0.5, -3], [None, 1.0, 2.0]),
    (ColumnConfig, "high", [0.5], [None, 0.0, -1.0]),
    (ColumnConfig, "decimals", [0, 10], [-1, 11]),
    (
        ColumnConfig, "phrase", ["{value} and {word}", "{{x}}"],
        ["{x}", "{", "{0}", "{value:9999999999}", "{value.__class__}", "{value!r}", "{value:{word}}"],
    ),
    (ColumnConfig, "cutoff_words", [[]], [["a", "b"]]),
]  # fmt: skip


@pytest.mark.parametrize(
    ("cls", "name", "good", "bad"), RANGES, ids=[f"{c.__name__}.{n}" for c, n, *_ in RANGES]
)
def test_a_value_out_of_range_is_refused_with_its_name_and_what_was_expected(
    cls: type, name: str, good: list[Any], bad: list[Any]
) -> None:
    for value in good:
        assert getattr(built(cls, **{name: value}), name) == value
    for value in bad:
        with pytest.raises(ConfigError, match=rf"^{LEAST[cls][0]}[./a-z_]*\b{name}.*: expected ") as caught:
            built(cls, **{name: value})
        assert "\n" not in str(caught.value)


def test_every_setting_with_a_range_is_in_the_table() -> None:
    """What is free: texts, names, switches and what the table refuses when it is read."""
    free = {
        "title", "declaration", "site_column", "label", "negative", "patient_column", "columns", "separator",
        "public_benchmark", "targets", "embeddings", "noise_multiplier", "seeded", "categories", "missing", "words",
        "cutoffs", "blank", "package", "hub", "about",
    }  # fmt: skip
    assert {(cls, name) for cls, name, *_ in RANGES} == {
        (cls, field.name)
        for cls, field in FIELDS
        # What a class inherits is in the table once; what is written about a model is free.
        if field.name not in free and field.name in cls.__annotations__ and cls is not ModelAbout
    }


def test_sites_with_a_folder_say_themselves_where_networks_compute() -> None:
    for own in ({"sites": "sites"}, {"kind": "consortium"}):
        assert FederationConfig(device="auto", **own).ledgers
        with pytest.raises(
            ConfigError, match=r"^federation\.device=cpu: expected auto; sites .* in their site\.yaml$"
        ):
            FederationConfig(device="cpu", **own)


def test_noise_stands_in_place_of_epsilon() -> None:
    assert PrivacyConfig(epsilon=None, noise_multiplier=2.0).noise_multiplier == 2.0
    for noise in (0.0, 0.05, -1.0, 10_001.0):
        with pytest.raises(ConfigError, match=r"^privacy\.noise_multiplier="):
            PrivacyConfig(epsilon=None, noise_multiplier=noise)
    for epsilon, other in ((3.0, 2.0), (None, None)):
        with pytest.raises(ConfigError, match="exactly one of the two"):
            PrivacyConfig(epsilon=epsilon, noise_multiplier=other)


def test_private_metrics_are_those_of_a_private_run() -> None:
    for changes in ({"kind": "off"}, {"seeded": True}):
        with pytest.raises(ConfigError, match=r"^privacy\.metrics=private: expected exact or none with"):
            PrivacyConfig(metrics="private", **changes)
        assert PrivacyConfig(metrics="none", **changes).metrics == "none"
    open_task = built(TableTaskConfig, declare="from_data")
    with pytest.raises(ConfigError, match=r"^privacy\.metrics=private: expected exact or none: .*from_data"):
        run_config(task=open_task, privacy=PrivacyConfig(metrics="private"))
    assert run_config(privacy=PrivacyConfig(metrics="private")).private


@pytest.mark.parametrize("metrics", ["private", "none"])
def test_references_need_exact_metrics(metrics: str) -> None:
    task = built(TableTaskConfig, public_benchmark=True)
    with pytest.raises(
        ConfigError, match=rf"^reference=true: expected false with privacy\.metrics={metrics}"
    ):
        run_config(task=task, reference=True, privacy=PrivacyConfig(metrics=metrics))


def test_a_package_is_named_without_importing_another() -> None:
    """To find `a.b`, Python would import `a`: code that the run chose, not the site."""
    at = {"path": None, "sha256": "0" * 64}
    assert TextModelConfig(package="a:model", **at).package == "a:model"
    for package in ("a.b:model", "../a:model", ":model", ""):
        with pytest.raises(ConfigError, match=r"^model\.package=.*: expected PACKAGE:FOLDER"):
            TextModelConfig(package=package, **at)
    with pytest.raises(ConfigError, match=r"^model\.path=b: expected null beside model\.package=a"):
        TextModelConfig(package="a", path="b", sha256="0" * 64)


def test_an_encoder_is_in_one_place() -> None:
    digest, commit = "0" * 64, "a" * 40
    found = TextModelConfig(hub="org/name", revision=commit, sha256=digest)
    assert (found.name, found.in_words) == ("org/name", "org/name at aaaaaaaaaaaa (sha256 000000000000)")
    for places, message in (
        ({"path": "a", "hub": "b", "revision": commit}, r"^model\.path=a: expected null beside model\.hub=b"),
        (
            {"package": "a:b", "hub": "b", "revision": commit},
            r"^model\.hub=b: expected null beside model\.package",
        ),
        ({"hub": "b"}, r"^model\.revision='': expected the commit of model\.hub, 40 hex digits"),
        ({"hub": "b", "revision": "main"}, r"^model\.revision=main: expected the commit"),
        ({"hub": "../b", "revision": commit}, r"^model\.hub=\.\./b: expected an id"),
        ({"hub": "", "revision": commit}, r"^model\.hub=: expected an id"),
    ):
        with pytest.raises(ConfigError, match=message):
            ImageModelConfig(sha256=digest, **places)


def test_what_is_written_about_a_model_is_no_part_of_a_run() -> None:
    """A site is sent the same values, so that its approvals, its caches and its replies stay the same."""
    plain = built(TextModelConfig)
    told = dataclasses.replace(plain, about=ModelAbout(title="a model", gated=True))
    asked = [Instruction.of(run_config(model=model), {}, run_id="r", round=1) for model in (plain, told)]
    assert plain != told
    assert asked[0] == asked[1]
    assert to_bytes(instruction_record(asked[0])) == to_bytes(instruction_record(asked[1]))


def test_a_seeded_split_is_for_public_benchmarks() -> None:
    assert built(TableTaskConfig, split="shuffle", public_benchmark=True).split == "shuffle"


def test_a_category_is_declared_and_none_twice() -> None:
    assert built(ColumnConfig, kind="categorical", categories=["a", "b"]).categories == ["a", "b"]
    for categories in ([], ["a", "a"]):
        with pytest.raises(ConfigError, match="categories"):
            built(ColumnConfig, kind="categorical", categories=categories)


def test_a_columns_error_names_the_column() -> None:
    with pytest.raises(ConfigError, match=r"^task\.columns\.age\.low/high="):
        built(TableTaskConfig, columns={"age": {"low": 3.0, "high": 1.0}})
    with pytest.raises(ConfigError, match=r"^task\.columns\.age=3: expected the keys of a column"):
        built(TableTaskConfig, columns={"age": 3})


RUNS: list[tuple[dict[str, Any], str]] = [
    ({"rounds": 0}, "rounds=0: expected >= 1"),
    ({"rounds": MAX_STEPS + 1}, f"rounds={MAX_STEPS + 1}: expected at most {MAX_STEPS} with"),
    (
        {"rounds": 1000, "training": TrainingConfig(steps_per_round=MAX_STEPS // 1000 + 1)},
        "rounds=1000: expected at most 999 with training.steps_per_round=1001",
    ),
    ({"seed": -1}, "seed=-1: expected 0 <= seed"),
    ({"seed": 2**63}, "expected 0 <= seed < 2^63"),
    ({"name": ""}, "name=: expected at most 100 characters"),
    ({"name": "a/b"}, "without '/'"),
    ({"name": "a\nb"}, "expected at most 100 characters"),
    ({"name": "a" * 101}, "expected at most 100 characters"),
    ({"run_dir": ""}, "run_dir='': expected a folder"),
    ({"resume": ""}, "resume='': expected a folder"),
    ({"strategy": StrategyConfig(average_last=21)}, "strategy.average_last=21: expected at most rounds=20"),
    ({"adapter": AdapterConfig(kind="lora")}, "adapter=lora: expected head or full"),
    ({"model": AdapterConfig()}, "expected one of the options of 'model'"),
    ({"task": {"kind": "table"}}, "expected one of the options of 'task'"),
]


@pytest.mark.parametrize(("changes", "message"), RUNS, ids=[message for _, message in RUNS])
def test_a_run_is_checked_as_a_whole(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        run_config(**changes)


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("kind", ["head", "lora", "ffa_lora", "full"])
def test_every_adapter_has_a_default_learning_rate(kind: str, optimizer: str) -> None:
    config = run_config(
        model=built(TextModelConfig),
        adapter=AdapterConfig(kind=kind),
        training=TrainingConfig(optimizer=optimizer),
    )
    assert config.training.learning_rate is not None
    assert run_config_from_dict(to_dict(config)) == config


def test_a_run_is_private_only_with_unpredictable_noise_and_declared_ranges() -> None:
    assert run_config().private
    assert run_config().not_private_reason() is None
    seen = set()
    for changes in (
        {"privacy": PrivacyConfig(kind="off")},
        {"privacy": PrivacyConfig(seeded=True)},
        {"task": built(TableTaskConfig, declare="from_data")},
    ):
        config = run_config(**changes)
        assert not config.private
        seen.add(config.not_private_reason())
    assert len(seen) == 3
    assert None not in seen


def test_a_run_survives_json() -> None:
    config = run_config(run_dir="a", name="é", rounds=7)
    assert run_config_from_dict(json.loads(json.dumps(to_dict(config)))) == config


def nested(values: dict[str, Any], prefix: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """Every mapping of settings inside: not the ones whose keys are free."""
    free = {("task", "declared_sizes"), ("task", "columns"), ("task", "columns", "age", "words")}
    found = [] if prefix in free else [prefix]
    for key, value in values.items():
        if isinstance(value, dict):
            found += nested(value, (*prefix, key))
    return found


def test_an_unknown_key_is_refused_at_every_level() -> None:
    levels = nested(to_dict(run_config()))
    assert len(levels) == 10
    for path in levels:
        values = json.loads(json.dumps(to_dict(run_config())))
        inner = values
        for key in path:
            inner = inner[key]
        near = next(iter(inner))
        inner[f"{near}x"] = 1
        with pytest.raises(ConfigError) as caught:
            run_config_from_dict(values)
        assert str(caught.value) == f"{'.'.join([*path, near])}x: unknown key; did you mean '{near}'?"


DAMAGED: list[tuple[Any, str]] = [
    ([], "configuration=[]: expected a mapping"),
    ({}, "configuration without task, model"),
    ({group: 3 for group in OPTIONS}, "task=3: expected a mapping"),
    ({group: {} for group in OPTIONS}, "task.kind=None: "),
    ({group: {"kind": ["table"]} for group in OPTIONS}, "task.kind=['table']: "),
]


@pytest.mark.parametrize(("values", "message"), DAMAGED, ids=[message for _, message in DAMAGED])
def test_a_damaged_file_is_refused(values: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        run_config_from_dict(values)


def test_an_unknown_kind_is_answered_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"^strategy\.kind=fedadm: did you mean 'fedadam'\?$"):
        parse("strategy", {"kind": "fedadm"})


def test_types_have_words() -> None:
    for cls, field in FIELDS:
        words = type_in_words(typing.get_type_hints(cls)[field.name])
        assert "<class" not in words
        assert "typing" not in words


def test_a_model_reads_the_kind_of_task_that_it_is_for() -> None:
    images = built(ImageTaskConfig, declared_sizes={"a": 100})
    assert run_config(task=images, model=CnnModelConfig(), adapter=AdapterConfig(kind="full"))
    with pytest.raises(
        ConfigError, match=r"^model\.kind=tabular: expected a model that reads .*'image': image, cnn$"
    ):
        run_config(task=images)
    with pytest.raises(ConfigError, match=r"^model\.kind=cnn: expected .*'table': text, tabular$"):
        run_config(model=CnnModelConfig())
    with pytest.raises(ConfigError, match=r"^adapter=lora: expected head or full: a cnn model has no"):
        run_config(task=images, model=CnnModelConfig(), adapter=AdapterConfig(kind="lora"))


def test_the_image_is_a_unit_for_public_benchmarks_alone() -> None:
    with pytest.raises(
        ConfigError, match=r"^task\.unit=image: expected patient, unless task\.public_benchmark"
    ):
        built(ImageTaskConfig, unit="image", public_benchmark=False)


def test_declared_numbers_of_images_are_counted_in_units() -> None:
    sizes = {"declared_sizes": {"a": 100, "b": 100}, "test_fraction": 0.3, "images_per_patient": 4}
    patients = built(ImageTaskConfig, **sizes)
    images = built(ImageTaskConfig, **sizes, unit="image", declared_images={"a": 250})
    assert [patients.declared_train(site) for site in "ab"] == [70, 70]
    assert [images.declared_train(site) for site in "ab"] == [175, 280]
    assert [images.declared_held_out(site) for site in "ab"] == [75, 120]


HOSTILE = [
    r"\w?" * 60 + r"\d",
    r"(\w|)" * 30 + r"\d",
    r"(\w|\B)" * 28,
    "(?i)a",
    "(?P1)",
    "a" + "()" * 5,
    "a??",
    "(?:a)?",
]


@pytest.mark.parametrize("pattern", HOSTILE)
def test_a_pattern_that_could_keep_a_site_busy_is_refused(pattern: str) -> None:
    with pytest.raises(ConfigError, match="at most 4 groups"):
        PretrainedConfig(path="x", sha256="a" * 64, lora_targets=pattern)


GROUP = "(" + "|".join("." * n for n in range(1, 9)) + ")"


@pytest.mark.parametrize("pattern", [r"(\w|)" * 4 + r"\d", GROUP * 4 + "z"])
def test_the_worst_pattern_that_is_allowed_takes_no_time(pattern: str) -> None:
    """One that fits no name, tried in every way."""
    asked = PretrainedConfig(path="x", sha256="a" * 64, lora_targets=pattern).lora_targets

    def match() -> None:
        for name in ("attention.attention.query", "a." * 50):
            assert re.fullmatch(rf"(.*\.)?({asked})", name) is None

    assert best(match, enough=0.5) <= 0.5
