"""What a run leaves can be used by people who do not have fedmed."""

import json
import re
import subprocess
import sys
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from fedmed.compose import compose
from fedmed.data.table import read_site
from fedmed.models.build import build
from fedmed.models.classifier import TextClassifier
from fedmed.models.export import export, write_card
from fedmed.models.image_classifier import ImageClassifier
from fedmed.privacy.plan import make_plan
from strategies.summary import exact_result, summarise
from tests.fedmed.models import encoders

READER = """
import json, re, sys
import torch

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("fedmed", "strategies", "clients", "configs"):
            raise ImportError(name)

sys.meta_path.insert(0, Refuse())
found = {}
for folder, base in json.load(sys.stdin).items():
    card = open(f"{folder}/MODEL_CARD.md").read()
    exec(re.search(r"```python\\n(.*?)```", card, re.S)[1])
    found[folder] = scores(base, f"{folder}/adapter", torch.load(f"{folder}/inputs.pt")).tolist()
print(json.dumps(found))
"""


def read_by_others(bases: dict[str, str], cwd: Path) -> dict[str, list[float]]:
    """The scores of each folder's snippet, as it stands, in a process that cannot import fedmed.

    One process for all of them: to import transformers takes its time.
    """
    out = subprocess.run(
        [sys.executable, "-c", READER],
        input=json.dumps(bases),
        capture_output=True,
        text=True,
        check=False,
        cwd=cwd,
    )
    assert out.returncode == 0, out.stderr
    found: dict[str, list[float]] = json.loads(out.stdout)
    assert found.keys() == bases.keys()
    return found


TEXT_CASES = {"lora": "mean", "ffa_lora": "cls"}


@dataclass(frozen=True)
class Exported:
    """Folders of adapters in one folder, the scores of each, and those that others found with it."""

    folder: Path
    expected: dict[str, np.ndarray]
    found: dict[str, list[float]]


@pytest.fixture(scope="module")
def exported(
    hf_overrides: list[str], bert_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Exported:
    folder = tmp_path_factory.mktemp("exported")
    expected = {
        adapter: _exported_text_model(folder / adapter, adapter, pooling, hf_overrides)
        for adapter, pooling in TEXT_CASES.items()
    } | {family: _exported_image_model(folder / family, family) for family in IMAGE_CASES}
    bases = dict.fromkeys(TEXT_CASES, str(bert_folder)) | {f: f"{f}/base" for f in IMAGE_CASES}
    return Exported(folder, expected, read_by_others(bases, folder))


def test_plain_transformers_and_peft_reproduce_the_scores(exported: Exported, bert_folder: Path) -> None:
    """The snippet in the card agrees to 1e-5."""
    for adapter in TEXT_CASES:
        scores = exported.expected[adapter]
        assert np.abs(np.array(exported.found[adapter]) - scores).max() < 1e-5
        assert scores.std() > 0.01
        files = {path.name for path in (exported.folder / adapter / "adapter").iterdir()}
        assert files == {
            "adapter_model.safetensors",
            "adapter_config.json",
            "head.safetensors",
            "adapter.json",
        }
        # The path of this machine's base model is nobody else's business.
        assert (
            str(bert_folder)
            not in (exported.folder / adapter / "adapter" / "adapter_config.json").read_text()
        )


def _exported_text_model(folder: Path, adapter: str, pooling: str, hf_overrides: list[str]) -> np.ndarray:
    """Write a folder with adapter, card and texts; return the scores of these."""
    folder.mkdir()
    config = compose(
        [*hf_overrides, "tracking=none", f"adapter={adapter}", "adapter.last_blocks=2", "model.components=8",
         "model.synthetic_sentences=40", f"model.pooling={pooling}", "seed=3"]
    )  # fmt: skip
    model = build(config.task, config.model, config.adapter)
    assert isinstance(model, TextClassifier)
    rng = np.random.default_rng(0)
    arrays = {n: v + rng.normal(0, 0.05, v.shape).astype(np.float32) for n, v in model.initialise(3).items()}
    model.initialise(99)
    export(model, arrays, config, folder / "adapter")
    write_card(_summary(config.task.declared_sizes, config), config, folder / "MODEL_CARD.md")
    texts = read_site(config.task, "Switzerland", seed=0).texts[:20]
    torch.save(texts, folder / "inputs.pt")
    with torch.no_grad():
        return model(**model.tokenize(texts)).numpy()


# Each family once; every adapter, pooling, kind of preprocessing and several slices at least once.
IMAGE_CASES = {
    "vit": ("head", ["model.image_size=32"]),
    "dinov2": ("lora", ["model.pooling=mean", "task.slices=3"]),
    "dinov2_with_registers": ("ffa_lora", ["model.pooling=mean"]),
    "dinov3_vit": ("full", []),
    "siglip": ("lora", ["model.image_size=24", "model.feature_norm=2.5"]),
    "clip": ("lora", ["model.pooling=pooler"]),
    "convnext": ("lora", ["task.image_size=48"]),
    "convnextv2": ("full", ["model.pooling=mean"]),
}


def test_the_snippet_for_images_states_the_preprocessing_and_reproduces_the_scores(
    exported: Exported,
) -> None:
    """As above: from grey squares of 0 to 1 to the scores, in a process that cannot import fedmed."""
    assert IMAGE_CASES.keys() == encoders.FAMILIES.keys()
    for family in IMAGE_CASES:
        scores = exported.expected[family]
        assert np.abs(np.array(exported.found[family]) - scores).max() < 1e-5, family
        assert scores.std() > 1e-3, family


def _exported_image_model(folder: Path, family: str) -> np.ndarray:
    """Write a folder with base model, adapter, card and images; return the scores of these."""
    adapter, more = IMAGE_CASES[family]
    base = encoders.image_encoder(folder / "base", family)
    config = compose(encoders.image_overrides(base, family, "nowhere", f"adapter={adapter}", "seed=3", *more))
    model = build(config.task, config.model, config.adapter)
    assert isinstance(model, ImageClassifier)
    arrays = encoders.moved(model)
    export(model, arrays, config, folder / "adapter")
    write_card(_summary(config.task.declared_sizes, config), config, folder / "MODEL_CARD.md")
    shape = (4, config.task.slices, config.task.image_size, config.task.image_size)
    images = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    torch.save(images, folder / "inputs.pt")
    card = (folder / "MODEL_CARD.md").read_text()
    assert f"and transformers {version('transformers')}" in card
    assert "padded with black to a square, with values from 0 (black) to 1" in card
    assert model.preprocessor.processor in card
    assert f"longer side has {config.task.image_size} pixels" in card
    described = json.loads((folder / "adapter" / "adapter.json").read_text())
    assert described["transformers"] == version("transformers")
    assert described["preprocessing"]["size"] == list(model.size)
    kind = {"lora": "adapter_model", "ffa_lora": "adapter_model"}.get(adapter, "adapter")
    files = {path.name for path in (folder / "adapter").iterdir()}
    assert files == {f"{kind}.safetensors", "head.safetensors", "adapter.json"} | (
        {"adapter_config.json"} if "lora" in adapter else set()
    )
    assert not any(str(base) in path.read_text() for path in (folder / "adapter").glob("adapter_config.json"))
    with torch.no_grad():
        return model(images=model.preprocessor.cut(images)).numpy()


@pytest.mark.parametrize("overrides", [["model=logistic"], ["model=mlp"]])
def test_other_kinds_are_safetensors_and_json(overrides: list[str], tmp_path: Path) -> None:
    config = compose([*overrides, "tracking=none", "task=heart10"])
    model = build(config.task, config.model, config.adapter)
    arrays = model.initialise(0)
    export(model, arrays, config, tmp_path)
    saved = load_file(tmp_path / "adapter.safetensors")
    assert saved.keys() == arrays.keys()
    assert all(np.array_equal(saved[name], arrays[name]) for name in arrays)
    described = json.loads((tmp_path / "adapter.json").read_text())
    assert len(described["features"]) == 14
    assert described["task"]["columns"]["age"]["high"] == 90


def test_the_card_says_the_privacy_or_that_there_is_none(tmp_path: Path) -> None:
    for overrides, wanted, unwanted in (
        (["privacy.epsilon=2"], r"\| Cleveland \| 2\.00 \|", "NOT PRIVATE"),
        (["privacy=off"], r"NOT PRIVATE\*\*: privacy=off", "epsilon \\(PLD"),
        (["privacy.seeded=true"], r"NOT PRIVATE\*\*: privacy.seeded=true", "epsilon \\(PLD"),
    ):
        config = compose(["model=logistic", "tracking=none", *overrides])
        write_card(_summary(config.task.declared_sizes, config), config, tmp_path / "card.md")
        card = (tmp_path / "card.md").read_text()
        assert re.search(wanted, card)
        assert not re.search(unwanted, card)
        assert "not covered by epsilon" in card
        if config.private:
            assert "add or remove one patient with all of its records" in card
            assert "PLD" in card


def _summary(sites: dict[str, int], config) -> dict:
    return summarise(
        config, {site: make_plan(config, site) for site in sites}, test=exact_result({}), references=None, rounds=1,
        seconds={"total": 1.0, "training": 0.5}, history=[], peak_rss_mb=1.0, mlflow=None,
    )  # fmt: skip
