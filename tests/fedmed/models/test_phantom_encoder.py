"""The encoder that the package carries: the one that its setting pins, and better than its shape alone."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from torch import nn
from transformers import AutoConfig, AutoModel

import fedmed
from fedmed.compose import compose
from fedmed.data.readers import read_site
from fedmed.dicom.synthetic.phantoms import make_phantoms
from fedmed.models.build import build
from tests.clients.sites import run
from tests.evidence import figure
from tests.stores import hospital, settings

FOLDER = Path(fedmed.__file__).parent / "models" / "phantom_encoder"
# In no demo, no choice of a setting and no other test.
SEED = 20_263


def test_the_setting_pins_the_file() -> None:
    model = compose(["model=phantom", "task=dicom", "task.path=nowhere", "adapter=head"]).model
    weights = FOLDER / "model.safetensors"
    assert model.package == "fedmed:models/phantom_encoder"
    assert hashlib.sha256(weights.read_bytes()).hexdigest() == model.sha256
    # What a person reads tells the same file.
    assert model.sha256 in (FOLDER / "MODEL.md").read_text()


def test_the_folder_is_small_and_whole() -> None:
    names = {path.name for path in FOLDER.iterdir() if path.is_file()}
    assert {"config.json", "model.safetensors", "preprocessor_config.json", "MODEL.md"} <= names
    assert sum((FOLDER / name).stat().st_size for name in names) < 8_000_000
    assert json.loads((FOLDER / "preprocessor_config.json").read_text())["size"] == {
        "height": 64,
        "width": 64,
    }


def encoders() -> tuple[nn.Module, nn.Module]:
    """The one that is shipped, and its shape with random weights."""
    torch.manual_seed(0)
    untrained = AutoModel.from_config(AutoConfig.from_pretrained(FOLDER, local_files_only=True))
    return AutoModel.from_pretrained(FOLDER, local_files_only=True).eval(), untrained.eval()


def test_plain_transformers_loads_it_with_every_weight_and_no_statistic_of_a_batch() -> None:
    loaded, info = AutoModel.from_pretrained(FOLDER, local_files_only=True, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    assert 1_000_000 < sum(p.numel() for p in loaded.parameters()) < 2_000_000
    assert not [m for m in loaded.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]


def test_a_site_s_features_are_those_of_plain_transformers(tmp_path: Path) -> None:
    hospital(tmp_path / "a", patients=40, most=2)
    config = compose(settings(tmp_path, "model=phantom", "adapter=head", "task.image_size=64"))
    data = read_site(config.task, "a", seed=0)
    found = build(config.task, config.model, config.adapter).prepare(data)["features"]
    pixels = torch.from_numpy(data.images).sub(0.5).div(0.25).expand(-1, 3, -1, -1)
    with torch.no_grad():
        plain = encoders()[0](pixels).pooler_output
    assert found.shape == (len(data.labels), 192)
    torch.testing.assert_close(found, nn.functional.normalize(plain), atol=1e-5, rtol=0)


@pytest.mark.usefixtures("no_report")
@pytest.mark.parametrize("adapter", ["head", "lora"])
def test_a_private_run_starts_from_it(tmp_path: Path, adapter: str) -> None:
    for seed, site in enumerate("ab"):
        hospital(tmp_path / "data" / site, patients=30, name=site, seed=seed)
    summary, said = run(
        settings(
            tmp_path / "data", "model=phantom", f"adapter={adapter}", "task.image_size=64", "rounds=1",
            f"run_dir={tmp_path / 'run'}",
        )
    )  # fmt: skip
    assert summary["privacy"]["consortium"]["one_site"]["epsilon"] > 0
    assert "fedmed:models/phantom_encoder" in said
    card = (tmp_path / "run" / "MODEL_CARD.md").read_text()
    assert "phantom_encoder" in card


def auc(encoder: nn.Module, images: np.ndarray, labels: np.ndarray) -> float:
    """Of a logistic regression on the features of 100 patients, on 200 others."""
    pixels = torch.from_numpy(images).float().div(255).sub(0.5).div(0.25)[:, None].expand(-1, 3, -1, -1)
    with torch.no_grad():
        rows = torch.cat([encoder(part).pooler_output for part in pixels.split(50)]).numpy()
    rows = (rows - rows[:100].mean(0)) / (rows[:100].std(0) + 1e-6)
    model = LogisticRegression(C=0.01, max_iter=1000).fit(rows[:100], labels[:100])
    return float(roc_auc_score(labels[100:], model.decision_function(rows[100:])))


def test_its_features_tell_findings_far_better_than_an_untrained_encoder_s() -> None:
    labels = np.random.default_rng(SEED).integers(0, 2, 300)
    images = make_phantoms(labels, np.ones(300, np.int64), seed=SEED).images
    trained, untrained = (auc(encoder, images, labels) for encoder in encoders())
    figure("phantom encoder, AUC of a linear probe on 100 phantoms", f"{trained:.3f}")
    figure("the same, untrained", f"{untrained:.3f}")
    assert trained > 0.9
    assert trained > untrained + 0.25
