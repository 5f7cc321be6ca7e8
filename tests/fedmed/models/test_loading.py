"""Folders of encoders: where they are found, and what is refused, with the next step."""

import importlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers as t
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

import fedmed.models.loading
from fedmed.errors import ModelError
from fedmed.model import ImageModelConfig, TextModelConfig
from fedmed.models.loading import IMAGE_FAMILIES, check_digest, load_image_encoder, load_text_encoder, locate
from fedmed.models.preprocess import DEFAULTS
from tests.conftest import sha256
from tests.fedmed.models.encoders import image_encoder

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both towers, a preprocessing and, as such checkpoints have it, a tokenizer's file."""
    folder = image_encoder(tmp_path_factory.mktemp("clip"), "clip")
    (folder / "vocab.json").write_text("{}")
    return folder


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return image_encoder(tmp_path_factory.mktemp("vit"), "vit")


def image(folder: Path, **changes: object) -> ImageModelConfig:
    digest = sha256(folder / "model.safetensors") if (folder / "model.safetensors").exists() else "0" * 64
    return ImageModelConfig(**{"path": str(folder), "sha256": digest, **changes})


def text(folder: Path) -> TextModelConfig:
    return TextModelConfig(path=str(folder), sha256=sha256(folder / "model.safetensors"))


def test_every_family_is_a_class_of_this_transformers_or_of_fedmed() -> None:
    assert len(IMAGE_FAMILIES) == 11
    for family in IMAGE_FAMILIES.values():
        assert family.module == "transformers" or family.module.startswith("fedmed.")
        assert issubclass(getattr(importlib.import_module(family.module), family.encoder), torch.nn.Module)
        assert family.processor in DEFAULTS


def test_of_two_towers_the_one_for_images_is_loaded(clip: Path) -> None:
    encoder, preprocessor = load_image_encoder(image(clip))
    assert not encoder.training
    assert preprocessor.size(300, 300) == (16, 16)
    saved = load_file(clip / "model.safetensors")
    vision = {
        name.removeprefix("vision_model."): v for name, v in saved.items() if name.startswith("vision_model.")
    }
    assert len(vision) > 40
    assert len(saved) > len(vision)
    own = dict(encoder.named_parameters())
    assert own.keys() == vision.keys()
    assert all(torch.equal(own[name], values) for name, values in vision.items())


def test_the_wrong_option_is_answered_with_the_right_one(clip: Path, vit: Path, bert_folder: Path) -> None:
    for config, message in (
        (image(bert_folder), r"a 'bert' model is no image encoder that is known; for text: model=hf$"),
        (text(vit), r"no tokenizer in it; a 'vit' model does not read text; for images: model=hf_image$"),
        (text(clip), r"a 'clip' model gives no features of text alone; for images: model=hf_image$"),
    ):
        with pytest.raises(ModelError, match=message):
            locate(config)


def test_another_architecture_or_no_preprocessing_is_refused(vit: Path, tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        shutil.copy(vit / name, tmp_path)
    with pytest.raises(ModelError, match=r"no preprocessor_config\.json in it: how its images are prepared"):
        locate(image(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "swin"}')
    with pytest.raises(
        ModelError, match="a 'swin' model is no image encoder that is known; expected one of vit, dino"
    ):
        locate(image(tmp_path))


def test_a_preprocessing_that_is_not_known_is_refused_before_torch_is_loaded(
    vit: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "other"
    shutil.copytree(vit, folder)
    (folder / "preprocessor_config.json").write_text('{"image_processor_type": "SwinImageProcessor"}')
    with pytest.raises(
        ModelError, match="image_processor_type=SwinImageProcessor: expected one of ViTImageProcessor"
    ):
        locate(image(folder))
    code = "import sys, fedmed.models.loading; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_weights_in_shards_are_refused_with_what_to_do(vit: Path, tmp_path: Path) -> None:
    encoder = t.ViTModel.from_pretrained(vit)
    encoder.save_pretrained(tmp_path, max_shard_size="20KB")
    shutil.copy(vit / "preprocessor_config.json", tmp_path)
    assert (tmp_path / "model.safetensors.index.json").exists()
    with pytest.raises(
        ModelError, match=r"its weights are in \d+ files, which one digest does not pin: .*max_shard"
    ):
        locate(image(tmp_path))
    # As the message says.
    t.ViTModel.from_pretrained(tmp_path).save_pretrained(tmp_path, max_shard_size="100GB")
    check_digest(image(tmp_path), locate(image(tmp_path)))


def test_weights_that_are_missing_are_not_drawn_at_random(
    vit: Path, bert_folder: Path, tmp_path: Path
) -> None:
    for name, source in (("image", vit), ("text", bert_folder)):
        folder = tmp_path / name
        shutil.copytree(source, folder)
        weights = load_file(folder / "model.safetensors")
        # A pooler whose output is not used may be missing.
        kept = {n: v for n, v in weights.items() if "pooler" not in n}
        save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
        load = (
            (lambda f: load_image_encoder(image(f)))
            if name == "image"
            else (lambda f: load_text_encoder(text(f)))
        )
        load(folder)
        short = {n: v for n, v in kept.items() if not n.startswith(("layers.1.", "encoder.layer.1."))}
        assert len(short) < len(kept)
        save_file(short, folder / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(
            ModelError, match=rf"model\.safetensors lacks {len(kept) - len(short)} of the weights"
        ):
            load(folder)


def test_weights_of_another_shape_and_code_beside_them_are_refused(vit: Path, tmp_path: Path) -> None:
    folder = tmp_path / "other"
    shutil.copytree(vit, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 128}))
    with pytest.raises(ModelError, match="transformers cannot load it"):
        load_image_encoder(image(folder))
    # Code that lies beside the weights is never run.
    (folder / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoModel": "evil.Model"}}))
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    encoder, _ = load_image_encoder(image(folder))
    assert type(encoder) is t.ViTModel
    assert not (tmp_path / "ran").exists()


def test_a_hub_id_is_found_in_the_cache_alone(
    vit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cache as huggingface_hub lays it out; nothing is downloaded, and a branch's name is no pin."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    hub = image(vit, path=None, hub="org/tiny-vit", revision=COMMIT)
    with pytest.raises(
        ModelError,
        match=rf"model\.hub=org/tiny-vit: commit {COMMIT} was not pulled and is not in the cache .*pull org/tiny-vit",
    ):
        locate(hub)
    repository = tmp_path / "models--org--tiny-vit"
    (repository / "blobs").mkdir(parents=True)
    snapshot = repository / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    for number, path in enumerate(sorted(vit.iterdir())):
        shutil.copy(path, repository / "blobs" / str(number))
        (snapshot / path.name).symlink_to(repository / "blobs" / str(number))
    assert locate(hub) == snapshot
    encoder, preprocessor = load_image_encoder(hub)
    assert encoder.config.hidden_size == 32
    assert preprocessor.processor == "ViTImageProcessor"
    with pytest.raises(ModelError, match=f"commit {'f' * 40} was not pulled and is not in the cache"):
        locate(image(vit, path=None, hub="org/tiny-vit", revision="f" * 40))
    with pytest.raises(ModelError, match=r"model\.sha256=000000000000…"):
        load_image_encoder(image(vit, path=None, hub="org/tiny-vit", revision=COMMIT, sha256="0" * 64))


@pytest.mark.parametrize("where", ["adapter", "config", "tower"])
def test_nothing_beside_the_weights_names_others(where: str, vit: Path, clip: Path, tmp_path: Path) -> None:
    """The digest is that of model.safetensors; transformers would load what these files name, without a word."""
    folder = tmp_path / "model"
    shutil.copytree(clip if where == "tower" else vit, folder)
    pinned, _ = load_image_encoder(image(folder))
    others = {name: values + 1 for name, values in load_file(folder / "model.safetensors").items()}
    save_file(others, folder / "others.safetensors", metadata={"format": "pt"})
    if where == "adapter":
        from peft import LoraConfig, get_peft_model

        adapter = get_peft_model(
            t.ViTModel.from_pretrained(vit), LoraConfig(target_modules=["q_proj", "query"])
        )
        adapter.save_pretrained(folder)
    else:
        values = json.loads((folder / "config.json").read_text())
        (values["vision_config"] if where == "tower" else values)["transformers_weights"] = (
            "others.safetensors"
        )
        (folder / "config.json").write_text(json.dumps(values))
    with pytest.raises(ModelError, match=r"other weights|change the pinned weights"):
        load_image_encoder(image(folder))
    # The deliberately broken variant: without the check other weights come, under the pinned digest.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fedmed.models.loading, "_check_alone", lambda _: None)
        got, _ = load_image_encoder(image(folder))
    expected = dict(pinned.named_parameters())
    named = dict(got.named_parameters())
    assert named.keys() != expected.keys() or any(not torch.equal(named[n], p) for n, p in expected.items())
