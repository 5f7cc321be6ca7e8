"""Encoder folders: found, checked against their pinned digest, loaded offline, safetensors only."""

import hashlib
import importlib
import importlib.util
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedmed.errors import ModelError
from fedmed.model import ImageModelConfig, SoundModelConfig, TextModelConfig
from fedmed.models.pins import LOCAL, located
from fedmed.models.preprocess import PROCESSOR, Preprocessor
from fedmed.pretrained import PretrainedConfig

TOKENIZER_FILES = ("tokenizer.json", "vocab.txt", "vocab.json", "tokenizer.model", "spiece.model")


@dataclass(frozen=True)
class ImageFamily:
    """An architecture for images.

    Attributes:
        encoder: its class in transformers; of what holds two towers, the one for images.
        processor: the processor that its authors prepare images with.
        class_token: whether the first token stands for the whole image.
        pooler: whether its pooled output is what its authors publish as the embedding.
        fixed: whether it takes images of another size only when told to interpolate its positions.
        module: where its class is.
        head_only: whether it stays as it is.
    """

    encoder: str
    processor: str
    class_token: bool = True
    pooler: bool = True
    fixed: bool = False
    module: str = "transformers"
    head_only: bool = False


_SIGLIP = ImageFamily("SiglipVisionModel", "SiglipImageProcessor", class_token=False, fixed=True)
_CLIP = ImageFamily("CLIPVisionModel", "CLIPImageProcessor", fixed=True)
# By the model_type of config.json.
IMAGE_FAMILIES = {
    "vit": ImageFamily("ViTModel", "ViTImageProcessor", pooler=False, fixed=True),
    "dinov2": ImageFamily("Dinov2Model", "BitImageProcessor"),
    "dinov2_with_registers": ImageFamily("Dinov2WithRegistersModel", "BitImageProcessor"),
    "dinov3_vit": ImageFamily("DINOv3ViTModel", "DINOv3ViTImageProcessor"),
    "siglip": _SIGLIP,
    "siglip_vision_model": _SIGLIP,
    "clip": _CLIP,
    "clip_vision_model": _CLIP,
    "convnext": ImageFamily("ConvNextModel", "ConvNextImageProcessor", class_token=False),
    "convnextv2": ImageFamily("ConvNextV2Model", "ConvNextImageProcessor", class_token=False),
    "lite_phantom": ImageFamily(
        "LitePhantomModel",
        "ViTImageProcessor",
        class_token=False,
        module="fedmed.models.lite_phantom",
        head_only=True,
    ),
}
# What holds a tower for images and one for text, whose outputs can be compared.
IMAGE_TEXT = {"clip": "CLIPModel", "siglip": "SiglipModel"}
# Weights that a checkpoint need not have: their output is not used.
UNUSED = ("pooler.", "mask_token")


def locate(config: PretrainedConfig) -> Path:
    """The folder of the encoder.

    Raises:
        ModelError: the package is not installed, the commit is not in the cache, the folder is missing, or a file in
            it is missing, damaged, of a model for something else, of a preprocessing that is not known, or would
            have other weights loaded than the pinned ones.
    """
    folder = _folder(config)
    if not folder.is_dir():
        raise ModelError(f"model.path={folder}: no such folder")
    for name in ("config.json", "model.safetensors"):
        if not (folder / name).is_file():
            raise ModelError(f"model.path={folder}: no {name} in it{_instead(folder)}")
    kind = _kind(folder)
    _check_alone(folder)
    if isinstance(config, ImageModelConfig):
        _check_image(folder, kind)
        _preprocessor(config, folder)
    elif isinstance(config, TextModelConfig):
        _check_text(folder, kind)
    elif isinstance(config, SoundModelConfig) and kind != "vit":
        raise ModelError(
            f"model.path={folder}: a '{kind}' model is no encoder of sounds that is known; expected HeAR, a 'vit'"
        )
    return folder


def _folder(config: PretrainedConfig) -> Path:
    if config.package is not None:
        package, _, subfolder = config.package.partition(":")
        spec = importlib.util.find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            raise ModelError(
                f"model.package={config.package}: '{package}' is not installed; run: pip install 'fedmed[demo]'"
            )
        return Path(spec.submodule_search_locations[0]) / subfolder
    if config.hub is None:
        return Path(config.path or "").expanduser()
    if pulled := located(config.hub, config.revision):
        return pulled
    if config.hub.startswith(LOCAL):
        raise ModelError(
            f"model.hub={config.hub}: not here at {config.revision}; how it is made: fedmed models show {config.hub}; "
            "or run: fedmed models import FILE.tar"
        )
    from huggingface_hub import constants, try_to_load_from_cache

    found = try_to_load_from_cache(
        config.hub, "config.json", cache_dir=constants.HF_HUB_CACHE, revision=config.revision
    )
    if not isinstance(found, str):
        raise ModelError(
            f"model.hub={config.hub}: commit {config.revision} was not pulled and is not in the cache "
            f"{constants.HF_HUB_CACHE}, and a run downloads nothing; run: fedmed models pull {config.hub} --revision "
            f"{config.revision}, or: fedmed models import FILE.tar"
        )
    return Path(found).parent


def _instead(folder: Path) -> str:
    """What there is in place of model.safetensors, and what to do about it."""
    shards = sorted(path.name for path in folder.glob("model-*-of-*.safetensors"))
    if shards:
        return (
            f"; its weights are in {len(shards)} files, which one digest does not pin: load it with transformers and "
            "write it again with save_pretrained(FOLDER, max_shard_size='100GB')"
        )
    found = sorted(p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".ckpt", ".h5"))
    return f"; {found[0]} is not read: convert it to safetensors" if found else ""


def _check_alone(folder: Path) -> None:
    """Refuse what would have transformers load other weights than those whose digest is pinned, or more."""
    if (folder / "adapter_config.json").exists():
        raise ModelError(
            f"model.path={folder}: an adapter_config.json in it, which would change the pinned weights; remove it, or "
            "merge the adapter with PEFT and write the folder again with save_pretrained"
        )
    named: list[object] = []
    json.loads(
        (folder / "config.json").read_text(),
        object_hook=lambda values: named.append(values.get("transformers_weights")),
    )
    if any(name is not None for name in named):
        raise ModelError(
            f"model.path={folder}: transformers_weights in its config.json, which names other weights than the pinned "
            "model.safetensors; remove that key"
        )


def _check_text(folder: Path, kind: str) -> None:
    image = kind in IMAGE_FAMILIES or (folder / PROCESSOR).is_file()
    hint = "; for images: model=hf_image" if image else ""
    # Without its files transformers makes up a tokenizer that knows no word.
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise ModelError(
            f"model.path={folder}: no tokenizer in it; a '{kind}' model does not read text{hint}"
        )
    if kind in IMAGE_FAMILIES:
        raise ModelError(f"model.path={folder}: a '{kind}' model gives no features of text alone{hint}")


def _check_image(folder: Path, kind: str) -> None:
    if kind not in IMAGE_FAMILIES:
        text = any((folder / name).is_file() for name in TOKENIZER_FILES)
        raise ModelError(
            f"model.path={folder}: a '{kind}' model is no image encoder that is known; "
            + ("for text: model=hf" if text else f"expected one of {', '.join(IMAGE_FAMILIES)}")
        )
    if not (folder / PROCESSOR).is_file():
        raise ModelError(
            f"model.path={folder}: no {PROCESSOR} in it: how its images are prepared is not known"
        )


def check_digest(config: PretrainedConfig, folder: Path) -> None:
    """Raise `ModelError` unless model.safetensors has the pinned sha256."""
    with (folder / "model.safetensors").open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != config.sha256:
        raise ModelError(
            f"model.sha256={config.sha256[:12]}…: {folder / 'model.safetensors'} has {digest}; "
            "pin that digest only if you trust where the file came from"
        )


def preprocessor_of(config: ImageModelConfig) -> Preprocessor:
    """How the encoder's images are prepared. Torch is not loaded for it.

    Raises:
        ModelError: see `locate`.
    """
    return _preprocessor(config, locate(config))


def _preprocessor(config: ImageModelConfig, folder: Path) -> Preprocessor:
    default = IMAGE_FAMILIES[_kind(folder)].processor
    return Preprocessor.read(folder / PROCESSOR, image_size=config.image_size, default=default)


def _kind(folder: Path) -> str:
    """The model_type of config.json."""
    try:
        return str(json.loads((folder / "config.json").read_text()).get("model_type", "unknown"))
    except (ValueError, AttributeError):
        raise ModelError(f"model.path={folder}: its config.json is damaged") from None


def load_text_encoder(config: TextModelConfig) -> tuple[Any, Any]:
    """The encoder in eval mode and its tokenizer.

    Raises:
        ModelError: see `locate` and `check_digest`; or transformers cannot read the folder.
    """
    folder = locate(config)
    check_digest(config, folder)
    from transformers import AutoModel

    return _load(AutoModel, folder), _tokenizer(folder)


def load_image_encoder(config: ImageModelConfig) -> tuple[Any, Preprocessor]:
    """The encoder in eval mode, of two towers that for images, and how its images are prepared.

    Raises:
        ModelError: see `locate` and `check_digest`; or transformers cannot read the folder.
    """
    folder = locate(config)
    check_digest(config, folder)
    family = IMAGE_FAMILIES[_kind(folder)]
    cls = getattr(importlib.import_module(family.module), family.encoder)
    return _load(cls, folder), _preprocessor(config, folder)


def load_sound_encoder(config: SoundModelConfig, size: tuple[int, int]) -> Any:
    """The encoder in eval mode, of pictures of this size with one channel.

    Raises:
        ModelError: see `locate` and `check_digest`; or transformers cannot read the folder, or its pictures are others.
    """
    folder = locate(config)
    settings = json.loads((folder / "config.json").read_text())
    found = settings.get("image_size"), settings.get("num_channels")
    if found != ([*size], 1):
        raise ModelError(
            f"model.path={folder}: reads pictures of size {found[0]} with {found[1]} channels; expected {[*size]} and "
            "1, as HeAR does"
        )
    check_digest(config, folder)
    from transformers import ViTModel

    # Its pooled output is the embedding.
    return _load(ViTModel, folder, unused=("mask_token",))


def _load(cls: Any, folder: Path, *, unused: tuple[str, ...] = UNUSED) -> Any:
    from transformers.utils import logging

    logging.disable_progress_bar()
    # Its table of what was and was not loaded: what matters of it is an error below.
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        encoder, report = cls.from_pretrained(
            folder,
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
            dtype="float32",
            output_loading_info=True,
        )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise ModelError(
            f"model.path={folder}: transformers cannot load it ({type(error).__name__})"
        ) from None
    finally:
        logging.set_verbosity(before)
    # Transformers draws them at random, differently in each process.
    missing = sorted(name for name in report["missing_keys"] if not any(part in name for part in unused))
    if missing:
        raise ModelError(
            f"model.path={folder}: model.safetensors lacks {len(missing)} of the weights that its config.json names, "
            f"e.g. {missing[0]}"
        )
    return encoder.eval()


def load_image_text(config: ImageModelConfig) -> tuple[Any, Any, Preprocessor]:
    """Both towers of a model of images and text in eval mode, its tokenizer, and how its images are prepared.

    Raises:
        ModelError: see `locate` and `check_digest`; or the folder does not hold both towers and a tokenizer.
    """
    folder = locate(config)
    kind = _kind(folder)
    if kind not in IMAGE_TEXT:
        raise ModelError(
            f"model.path={folder}: a '{kind}' model has no tower for text; expected one of {', '.join(IMAGE_TEXT)}"
        )
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise ModelError(f"model.path={folder}: no tokenizer in it; its tower for text cannot be used")
    check_digest(config, folder)
    import transformers

    model = _load(getattr(transformers, IMAGE_TEXT[kind]), folder)
    return model, _tokenizer(folder), _preprocessor(config, folder)


def settings_digest(encoder: Any) -> str:
    """The sha256 of a loaded encoder's settings: what besides its weights its output depends on."""
    return hashlib.sha256(encoder.config.to_json_string().encode()).hexdigest()


def tokenizer_digest(config: PretrainedConfig) -> str:
    """The sha256 of the folder's tokenizer files, by name: what the weights' digest does not pin."""
    digest = hashlib.sha256()
    for path in sorted(locate(config).iterdir()):
        if path.name in TOKENIZER_FILES or "token" in path.name:
            digest.update(f"{path.name}\0{hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return digest.hexdigest()


def _tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError):
        raise ModelError(f"model.path={folder}: transformers cannot load its tokenizer") from None
