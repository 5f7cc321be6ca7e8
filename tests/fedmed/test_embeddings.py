"""Embeddings against transformers' own, record by record; the folder and what it refuses."""

import dataclasses
import json
import os
import stat
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as t

from fedmed.compose import compose
from fedmed.config import RunConfig
from fedmed.data.dataset import SiteDataset
from fedmed.data.readers import read_site
from fedmed.embed import embed
from fedmed.embeddings import ABOUT, INDEX, ROWS, TEXTS, Embeddings
from fedmed.errors import ConfigError, DataError, ModelError
from fedmed.models.activations import ActivationCache
from fedmed.models.preprocess import PROCESSOR, Preprocessor
from tests.conftest import sha256
from tests.fedmed.models.encoders import image_encoder, image_overrides
from tests.stores import hospital

PROMPTS = ["a clear lung", "an opacity", "a bright spot in a lung"]
BOTH = ("clip", "siglip")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    hospital(folder / "a", patients=8)
    return folder


@pytest.fixture(scope="module", params=BOTH)
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with both towers and a tokenizer of its own words."""
    folder = image_encoder(tmp_path_factory.mktemp(request.param), request.param)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *dict.fromkeys(" ".join(PROMPTS).split())]
    (folder / "vocab.txt").write_text("\n".join(words))
    t.BertTokenizerFast(vocab=str(folder / "vocab.txt")).save_pretrained(folder)
    return folder


def image_run(folder: Path, data: Path, *more: str) -> RunConfig:
    return compose(image_overrides(folder, folder.name.rstrip("0123456789"), data, *more))


def both_run(folder: Path, data: Path) -> RunConfig:
    return compose(image_overrides(folder, "clip", data, "model.pooling=pooler"))


def made(run: RunConfig, **more: Any) -> Embeddings:
    return embed(run.task, run.model, "a", **more)


def records_of(run: RunConfig) -> SiteDataset:
    # A test's site draws its own key: of few patients none may be held out.
    return read_site(run.task, "a", seed=0, maybe_empty=True)


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return image_encoder(tmp_path_factory.mktemp("vit"), "vit")


def test_an_image_s_row_is_the_pooled_output_of_that_image_alone(vit: Path, data: Path) -> None:
    run = image_run(vit, data, "task.slices=2", "model.feature_norm=3")
    found = made(run)
    records = records_of(run)
    encoder, prepare = t.ViTModel.from_pretrained(vit).eval(), Preprocessor.read(vit / PROCESSOR)
    assert len(records.images) == len(found.rows) == 15
    for image, row in zip(torch.from_numpy(records.images), found.rows, strict=True):
        with torch.no_grad():
            slices = [encoder(pixel_values=prepare(one[None, None])).last_hidden_state[:, 0] for one in image]
        mean = torch.stack(slices).mean(0)[0]
        np.testing.assert_allclose(row, (3 * mean / mean.norm()).numpy(), atol=1e-5)
    np.testing.assert_array_equal(found.labels, records.labels)
    np.testing.assert_array_equal(found.patients, records.patients)


def test_a_text_s_row_is_the_plain_pooled_output(hf_overrides: list[str], bert_folder: Path) -> None:
    # A classifier of this model centres and whitens; embeddings do not.
    whitened = ["model.synthetic_sentences=50", "model.components=8", "model.feature_norm=7"]
    run = compose([*hf_overrides, *whitened, "tracking=none"])
    found = embed(run.task, run.model, "Switzerland")
    texts = read_site(run.task, "Switzerland", seed=0).texts
    tokenizer = t.AutoTokenizer.from_pretrained(bert_folder)
    encoder = t.BertModel.from_pretrained(bert_folder).eval()
    assert len(texts) == len(found.rows) > 50
    for text, row in zip(texts[::10], found.rows[::10], strict=True):
        inputs = tokenizer(text, truncation=True, max_length=32, return_tensors="pt")
        with torch.no_grad():
            expected = encoder(**inputs).last_hidden_state.mean(1)[0]
        np.testing.assert_allclose(row, expected.numpy(), atol=1e-5)


def test_images_and_prompts_are_where_transformers_puts_them(both: Path, data: Path) -> None:
    run = both_run(both, data)
    found = made(run, prompts=PROMPTS)
    model = t.AutoModel.from_pretrained(both).eval()
    siglip = model.config.model_type == "siglip"
    tokenizer = t.AutoTokenizer.from_pretrained(both)
    padding = {"padding": "max_length", "max_length": 8} if siglip else {"padding": True}
    inputs = tokenizer(PROMPTS, return_tensors="pt", **padding)
    if siglip:
        # Its own tokenizer gives no mask.
        inputs.pop("attention_mask")
    inputs.pop("token_type_ids", None)
    images = torch.from_numpy(records_of(run).images)
    pixels = Preprocessor.read(both / PROCESSOR)(images)
    with torch.no_grad():
        image = model.get_image_features(pixel_values=pixels).pooler_output
        text = model.get_text_features(**inputs).pooler_output
        # Both towers together, as zero-shot classification runs them.
        logits = model(pixel_values=pixels, **inputs).logits_per_image
        cosine = (logits - (model.logit_bias if siglip else 0)) / model.logit_scale.exp()
    np.testing.assert_allclose(found.rows, torch.nn.functional.normalize(image).numpy(), atol=1e-5)
    np.testing.assert_allclose(found.texts, torch.nn.functional.normalize(text).numpy(), atol=1e-5)
    np.testing.assert_allclose(found.similarity(), cosine.numpy(), atol=1e-5)
    # Neither all images nor all prompts are the same to these weights.
    assert np.ptp(found.similarity(), axis=0).min() > 1e-4
    assert np.ptp(found.similarity(), axis=1).min() > 1e-4


def test_a_row_does_not_depend_on_other_records(vit: Path, tmp_path: Path) -> None:
    hospital(tmp_path / "more" / "a", patients=8)
    hospital(tmp_path / "few" / "a", patients=3)
    more, few = (made(image_run(vit, tmp_path / name)) for name in ("more", "few"))
    assert 0 < len(few.rows) < len(more.rows)
    np.testing.assert_array_equal(few.rows, more.rows[: len(few.rows)])


def test_what_is_opened_is_what_was_saved(both: Path, data: Path, tmp_path: Path) -> None:
    run = both_run(both, data)
    saved = made(run, prompts=PROMPTS)
    saved.save(tmp_path / "out")
    found = Embeddings.open(tmp_path / "out")
    assert isinstance(found.rows, np.memmap)
    for name in ("rows", "texts", "labels", "patients", "test"):
        np.testing.assert_array_equal(getattr(found, name), getattr(saved, name))
    found.check(records_of(run))
    assert found.about["prompts"] == PROMPTS
    assert found.about["model"]["sha256"] == sha256(both / "model.safetensors")
    manifest = records_of(run).manifest
    assert found.about["data"]["content_sha256"] == manifest.content_sha256
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "out").iterdir()}
    assert modes == dict.fromkeys((ROWS, INDEX, TEXTS, ABOUT), 0o600)
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o700


@pytest.fixture
def saved(vit: Path, data: Path, tmp_path: Path) -> Path:
    made(image_run(vit, data)).save(tmp_path / "out")
    return tmp_path / "out"


@pytest.mark.parametrize("name", [ROWS, INDEX])
@pytest.mark.parametrize("damage", ["flip", "shorten", "lengthen", "remove"])
def test_a_file_that_is_not_the_one_that_was_written_is_refused(saved: Path, name: str, damage: str) -> None:
    content = (saved / name).read_bytes()
    changed = {
        "flip": content[:-2] + bytes([content[-2] ^ 1]) + content[-1:],
        "shorten": content[:-4],
        "lengthen": content + b"\0",
        "remove": b"",
    }[damage]
    (saved / name).write_bytes(changed)
    if damage == "remove":
        (saved / name).unlink()
    with pytest.raises(DataError, match="embed the data again"):
        Embeddings.open(saved)


@pytest.mark.parametrize(
    "change",
    [
        {"format": "other"}, {"shape": [1, 1]}, {"files": {}}, {"files": {"../x": {}}}, {"prompts": ["a"]},
        {"data": None, "files": None},
    ],
)  # fmt: skip
def test_a_manifest_that_does_not_fit_is_refused(saved: Path, change: dict[str, Any]) -> None:
    about = json.loads((saved / ABOUT).read_text())
    (saved / ABOUT).write_text(json.dumps(about | change))
    with pytest.raises(DataError, match="embed the data again"):
        Embeddings.open(saved)


def test_another_dataset_is_refused(saved: Path, vit: Path, data: Path, tmp_path: Path) -> None:
    found = Embeddings.open(saved)
    hospital(tmp_path / "other" / "a", patients=8, seed=1)
    run = image_run(vit, tmp_path / "other")
    with pytest.raises(DataError, match="content_sha256, records_sha256 differ"):
        found.check(records_of(run))
    # The same content, read with the classes the other way round.
    turned = image_run(vit, data, "task.positive=[clear]", "task.negative=[opacity]")
    with pytest.raises(DataError, match="records_sha256 differ"):
        found.check(records_of(turned))


def test_a_model_without_what_was_asked_for_is_refused(
    vit: Path, data: Path, hf_overrides: list[str], both: Path
) -> None:
    small = compose(["model=logistic", "tracking=none"])
    with pytest.raises(ConfigError, match="starts from nothing and has no pretrained features"):
        embed(small.task, small.model, "Cleveland")
    text, image = compose([*hf_overrides, "tracking=none"]), image_run(vit, data)
    with pytest.raises(ConfigError, match="no tower for images"):
        embed(text.task, text.model, "Cleveland", prompts=PROMPTS)
    with pytest.raises(ConfigError, match="reads images; the task's records are tables"):
        embed(text.task, image.model, "Cleveland")
    with pytest.raises(ModelError, match="a 'vit' model has no tower for text"):
        made(image, prompts=PROMPTS)
    with pytest.raises(ConfigError, match=r"prompt 2 has \d+ tokens; expected at most 8"):
        made(both_run(both, data), prompts=["a lung", "lung " * 20])
    with pytest.raises(DataError, match="embed them with --texts FILE"):
        made(image).similarity()


def test_nothing_is_left_of_what_did_not_end(
    vit: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = made(image_run(vit, data))

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(os, "rename", stop)
        with pytest.raises(KeyboardInterrupt):
            whole.save(tmp_path / "here" / "out")
    assert list((tmp_path / "here").iterdir()) == []
    (tmp_path / "here" / "out").mkdir()
    whole.save(tmp_path / "here" / "out")
    with pytest.raises(DataError, match="is there already"):
        whole.save(tmp_path / "here" / "out")
    assert [path.name for path in (tmp_path / "here").iterdir()] == ["out"]


def test_what_was_computed_before_is_read(both: Path, data: Path, tmp_path: Path) -> None:
    cache, passes = ActivationCache(tmp_path / "cache", 10**9), []
    run = both_run(both, data)

    def count(done: int, total: int) -> None:
        passes.append((done, total))

    first = made(run, cache=cache, progress=count)
    shared = made(run, prompts=PROMPTS, cache=cache, progress=count)
    records = len(first.rows)
    # The first pass of a classifier is over before its hook is set.
    assert passes == 2 * [(done + 1, records) for done in range(records)]
    again = made(run, cache=cache, progress=count), made(run, prompts=PROMPTS, cache=cache, progress=count)
    assert len(passes) == 2 * records
    np.testing.assert_array_equal(again[0].rows, first.rows)
    np.testing.assert_array_equal(again[1].rows, shared.rows)
    # CLIP projects; SigLIP's pooled output is where its texts are already.
    assert (first.rows.shape == shared.rows.shape) == (both.name.startswith("siglip"))


def test_the_digest_of_how_a_row_was_made_tells_ways_apart(vit: Path, data: Path) -> None:
    run = image_run(vit, data)
    ways = [
        run.model,
        dataclasses.replace(run.model, pooling="mean"),
        dataclasses.replace(run.model, image_size=24),
    ]
    found = [embed(run.task, model, "a").about["model"]["preprocessing_sha256"] for model in ways]
    assert len(set(found)) == len(ways)
