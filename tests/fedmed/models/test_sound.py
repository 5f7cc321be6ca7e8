"""HeAR's way of sound: the spectrogram against slow references, and a tiny encoder of its architecture."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers as t
from transformers import audio_utils

from fedmed.compose import compose
from fedmed.config import RunConfig
from fedmed.data.readers import read_site
from fedmed.data.sounds import RATE, SAMPLES
from fedmed.embed import embed
from fedmed.embeddings import Embeddings
from fedmed.errors import ConfigError, DataError, ModelError
from fedmed.models.activations import ActivationCache
from fedmed.models.build import build
from fedmed.models.sound import BANDS, SIZE, STEP, WINDOW, mel_filters, spectrogram
from tests.conftest import sha256
from tests.recordings import hum, recordings


def hear(folder: Path, **changes: object) -> Path:
    """A tiny encoder as google/hear-pytorch is one."""
    torch.manual_seed(0)
    settings = {
        "image_size": [*SIZE], "num_channels": 1, "patch_size": 16, "hidden_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 2, "intermediate_size": 64, "pooler_output_size": 24, "pooler_act": "linear",
        "hidden_act": "gelu_fast", "layer_norm_eps": 1e-6,
    }  # fmt: skip
    t.ViTModel(t.ViTConfig(**settings | changes)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return hear(tmp_path_factory.mktemp("hear"))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    recordings(tmp_path / "data" / "a")
    return tmp_path / "data"


def run(encoder: Path, data: Path, *more: str) -> RunConfig:
    return compose(
        [
            "task=sound", f"task.path={data}", "task.positive=[cough]", "task.negative=[breath]",
            "task.declared_sizes={a: 6}", "model=hear", "model.hub=null", f"model.path={encoder}",
            f"model.sha256={sha256(encoder / 'model.safetensors')}", "tracking=none", *more,
        ]
    )  # fmt: skip


def slow(clip: np.ndarray) -> np.ndarray:
    """Frame by frame and band by band, in float64, by the formulas of Google's audio_utils.py."""
    clip = clip.astype(np.float64)
    clip = clip - clip.min()
    clip = 2 * clip / (clip.max() + 1e-8) - 1
    clip = np.concatenate([clip, np.zeros(400)])
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(400) / 400)
    filters = audio_utils.mel_filter_bank(
        201, 128, 0.0, 8000.0, 16_000, norm=None, mel_scale="htk", triangularize_in_mel_space=True
    )
    found = np.zeros((200, 128))
    smooth = None
    for frame in range(200):
        part = clip[160 * frame : 160 * frame + 400] * hann
        angles = -2j * np.pi * np.outer(np.arange(201), np.arange(400)) / 400
        energy = (np.abs(np.exp(angles) @ part) ** 2) @ filters
        smooth = energy if smooth is None else 0.96 * smooth + 0.04 * energy
        found[frame] = np.sqrt(energy / (1e-8 + smooth) ** 0.8 + 2) - np.sqrt(2)
    # Bilinear, of 200 rows 192: half a cell is at half a cell.
    places = (np.arange(192) + 0.5) * 200 / 192 - 0.5
    low = np.floor(places).astype(int)
    share = (places - low)[:, None]
    return (1 - share) * found[low] + share * found[np.minimum(low + 1, 199)]


def test_the_spectrogram_is_that_of_its_formulas() -> None:
    assert (WINDOW, STEP, BANDS, SIZE) == (400, 160, 128, (192, 128))
    draws = np.random.default_rng(0)
    clips = [
        draws.normal(0, 0.1, SAMPLES),
        hum(440, RATE, seconds=2),
        np.concatenate([draws.normal(0, 0.3, RATE), np.zeros(RATE)]),
        np.zeros(SAMPLES),
        np.eye(1, SAMPLES, 7000)[0],
    ]
    clips = [clip.astype(np.float32) for clip in clips]
    found = spectrogram(torch.from_numpy(np.stack(clips))).numpy()
    assert found.shape == (5, *SIZE)
    for clip, one in zip(clips, found, strict=True):
        expected = slow(clip)
        assert np.abs(one - expected).max() <= 2e-3 * max(1.0, np.abs(expected).max())
        # Each by itself, to the last bit.
        assert np.array_equal(spectrogram(torch.from_numpy(clip)[None])[0].numpy(), one)


def test_a_tone_lies_in_its_band() -> None:
    for hertz in (300, 1000, 4000):
        found = spectrogram(torch.from_numpy(hum(hertz, RATE, seconds=2).astype(np.float32))[None])[0]
        centres = 700 * (10 ** (np.linspace(0, 2595 * np.log10(1 + 8000 / 700), 130)[1:-1] / 2595) - 1)
        assert abs(int(found.mean(dim=0).argmax()) - int(np.abs(centres - hertz).argmin())) <= 1
    assert mel_filters().shape == (201, 128)


def test_a_recording_s_row_is_the_mean_pooled_output_of_its_clips(encoder: Path, data: Path) -> None:
    config = run(encoder, data, "task.clips=2")
    found = embed(config.task, config.model, "a")
    model = t.ViTModel.from_pretrained(encoder).eval()
    sounds = read_site(config.task, "a", seed=0).sounds
    assert found.rows.shape == (12, 24)
    for row, clips in zip(found.rows, sounds, strict=True):
        with torch.no_grad():
            pooled = model(pixel_values=spectrogram(torch.from_numpy(clips))[:, None]).pooler_output
        assert np.allclose(row, pooled.mean(dim=0).numpy(), atol=1e-5)
    assert np.abs(found.rows[0] - found.rows[1]).max() > 1e-4


def test_a_row_does_not_depend_on_other_recordings(encoder: Path, data: Path) -> None:
    config = run(encoder, data)
    every = embed(config.task, config.model, "a").rows
    index = data / "a" / "index.csv"
    lines = index.read_text().splitlines()
    index.write_text("\n".join([lines[0], *lines[4:]]) + "\n")
    assert np.array_equal(embed(config.task, config.model, "a").rows, every[3:])


def test_embeddings_are_tied_to_the_recordings(encoder: Path, data: Path, tmp_path: Path) -> None:
    config = run(encoder, data)
    embed(config.task, config.model, "a").save(tmp_path / "out")
    found = Embeddings.open(tmp_path / "out")
    found.check(read_site(config.task, "a", seed=0))
    assert found.rows.shape == (12, 24)
    assert found.about["model"]["name"] == encoder.name
    more = run(encoder, data, "task.clips=2")
    with pytest.raises(DataError, match="records_sha256 differ"):
        found.check(read_site(more.task, "a", seed=0))
    how = [embed(one.task, one.model, "a").about["model"]["preprocessing_sha256"] for one in (config, more)]
    assert how[0] != how[1]


def test_what_was_computed_before_is_read(encoder: Path, data: Path, tmp_path: Path) -> None:
    config, passes = run(encoder, data, "task.clips=2"), []
    cache = ActivationCache(tmp_path / "cache", 10**9)
    first, again = (
        embed(
            config.task,
            config.model,
            "a",
            cache=cache,
            progress=lambda done, total: passes.append((done, total)),
        )
        for _ in range(2)
    )
    assert np.array_equal(first.rows, again.rows)
    assert passes == [(done, 24) for done in range(1, 25)]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"image_size": 192}, r"reads pictures of size 192 with 1 channels; expected \[192, 128\] and 1, as HeAR does"),
        ({"num_channels": 3}, "with 3 channels"),
    ],
)  # fmt: skip
def test_another_encoder_is_refused(changes: dict[str, int], says: str, data: Path, tmp_path: Path) -> None:
    config = run(hear(tmp_path / "other", **changes), data)
    with pytest.raises(ModelError, match=says):
        embed(config.task, config.model, "a")


def test_weights_that_the_embedding_is_made_with_must_be_there(data: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = hear(tmp_path / "hear")
    weights = load_file(folder / "model.safetensors")
    del weights["pooler.dense.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = run(folder, data)
    with pytest.raises(ModelError, match=r"lacks 1 of the weights .*, e\.g\. pooler\.dense\.weight"):
        embed(config.task, config.model, "a")


def test_what_is_no_encoder_of_sounds_is_refused(data: Path, tmp_path: Path, bert_folder: Path) -> None:
    with pytest.raises(ModelError, match="a 'bert' model is no encoder of sounds"):
        embed(*parts(run(bert_folder, data)), "a")
    settings = json.loads((hear(tmp_path / "hear") / "config.json").read_text())
    assert (settings["num_channels"], settings["image_size"]) == (1, [192, 128])


def parts(config: RunConfig) -> tuple[object, object]:
    return config.task, config.model


def test_sounds_are_embedded_and_not_trained_on(encoder: Path, data: Path) -> None:
    config = run(encoder, data)
    with pytest.raises(ModelError, match="gives embeddings, and is not trained on"):
        build(config.task, config.model, config.adapter)
    with pytest.raises(ConfigError, match="reads sounds; the task's records are table"):
        embed(compose(["task=heart"]).task, config.model, "Cleveland")
