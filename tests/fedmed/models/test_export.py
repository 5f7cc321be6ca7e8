"""What a run leaves can be used by people who do not have fedmed."""

import json
import re
import subprocess
import sys
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
from fedmed.privacy.plan import make_plan
from strategies.summary import exact_result, summarise

READER = """
import json, re, sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("fedmed", "strategies", "clients", "configs"):
            raise ImportError(name)

sys.meta_path.insert(0, Refuse())
base, folder = sys.argv[1:3]
card = open(folder + "/MODEL_CARD.md").read()
exec(re.search(r"```python\\n(.*?)```", card, re.S)[1])
texts = json.load(sys.stdin)
print(json.dumps(scores(base, folder + "/adapter", texts).tolist()))
"""


@pytest.mark.parametrize(("adapter", "pooling"), [("lora", "mean"), ("ffa_lora", "cls")])
def test_plain_transformers_and_peft_reproduce_the_scores(
    adapter: str, pooling: str, hf_overrides: list[str], bert_folder: Path, tmp_path: Path
) -> None:
    """The snippet in the card, run as it stands by a process that cannot import fedmed, agrees to 1e-5."""
    config = compose(
        [*hf_overrides, "tracking=none", f"adapter={adapter}", "adapter.last_blocks=2", "model.components=8",
         "model.synthetic_sentences=40", f"model.pooling={pooling}", "seed=3"]
    )  # fmt: skip
    model = build(config.task, config.model, config.adapter)
    assert isinstance(model, TextClassifier)
    rng = np.random.default_rng(0)
    arrays = {n: v + rng.normal(0, 0.05, v.shape).astype(np.float32) for n, v in model.initialise(3).items()}
    model.initialise(99)
    export(model, arrays, config, tmp_path / "adapter")
    write_card(_summary(config.task.declared_sizes, config), config, tmp_path / "MODEL_CARD.md")
    texts = read_site(config.task, "Switzerland", seed=0).texts[:20]
    with torch.no_grad():
        expected = model(**model.tokenize(texts)).numpy()
    out = subprocess.run(
        [sys.executable, "-c", READER, str(bert_folder), str(tmp_path)],
        input=json.dumps(texts), capture_output=True, text=True, check=False, cwd=tmp_path,
    )  # fmt: skip
    assert out.returncode == 0, out.stderr
    assert np.abs(np.array(json.loads(out.stdout)) - expected).max() < 1e-5
    assert expected.std() > 0.01
    files = {path.name for path in (tmp_path / "adapter").iterdir()}
    assert files == {"adapter_model.safetensors", "adapter_config.json", "head.safetensors", "adapter.json"}
    # The path of this machine's base model is nobody else's business.
    assert str(bert_folder) not in (tmp_path / "adapter" / "adapter_config.json").read_text()


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
