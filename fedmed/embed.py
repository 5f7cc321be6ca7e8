"""A site's records through a pretrained model, each alone."""

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fedmed.data.dataset import SiteDataset
from fedmed.data.readers import read_site
from fedmed.embeddings import FORMAT, Embeddings, described
from fedmed.errors import ConfigError, DataError
from fedmed.model import ImageModelConfig, ModelConfig, SoundModelConfig, TextModelConfig
from fedmed.pretrained import PretrainedConfig
from fedmed.task import ImageTaskConfig, SoundTaskConfig, TaskConfig

if TYPE_CHECKING:
    from fedmed.models.activations import ActivationCache

Floats = NDArray[np.float32]
# A pretrained encoder of what a kind of task holds.
EXAMPLES = {"table": "minilm", "image": "phantom", "sound": "hear"}
# Called with the passes through the encoder that are done, and those there are.
Progress = Callable[[int, int], None]


def embed(
    task: TaskConfig,
    model: ModelConfig,
    site: str,
    *,
    seed: int = 0,
    key: bytes | None = None,
    prompts: list[str] | None = None,
    cache: "ActivationCache | None" = None,
    device: str = "cpu",
    progress: Progress | None = None,
) -> Embeddings:
    """Embed a site's records, each alone, so that no bit of a row depends on another record.

    Without prompts a row is what a classifier's head would read of the record: of text the encoder's plain pooled
    output (not centred, not whitened), of images its pooled output, averaged over slices, of norm
    `model.feature_norm`; of sounds, on which nothing is trained, its pooled output, averaged over clips. With prompts a
    row is the record's projection into the space of images and text, of norm 1, as are the prompts'.

    Args:
        seed, key: of the split, as in `fedmed.data.readers.read_site`.
        prompts: texts for the text tower of a model of images and text.
        cache: where what was computed before is looked for, and kept.
        device: as `fedmed.devices.device_of` takes it.

    Raises:
        ConfigError: there is no such device; or the model has no pretrained features, or does not read the task's
            records.
        DataError: the site has no usable record, or its data cannot be read.
        ModelError: the model cannot be loaded, is not the pinned one, or has no tower for text.
    """
    check(task, model, prompts)
    data = read_site(task, site, seed=seed, key=key, maybe_empty=True)
    if not len(data.labels):
        reasons = "; ".join(f"{count} x {reason}" for reason, count in data.manifest.quarantined.items())
        raise DataError(
            f"site '{site}' has no usable record to embed ({reasons or 'no record at all'}); see the task's settings"
        )
    rows, texts, how = _computed(task, model, data, prompts or [], cache, device, progress)
    about = {
        "format": FORMAT,
        "data": described(data),
        "split": {"kind": task.split, "seed": seed if task.split == "shuffle" else None},
        "model": {"name": model.name, "sha256": getattr(model, "sha256", "")} | how,
        "prompts": prompts or [],
        "shape": list(rows.shape),
        "dtype": "float32",
        "versions": {name: version(name) for name in ("fedmed", "numpy", "torch", "transformers")},
    }
    return Embeddings(
        rows=rows, patients=data.patients, labels=data.labels, test=data.test, texts=texts, about=about
    )


def check(task: TaskConfig, model: ModelConfig, prompts: list[str] | None = None) -> None:
    """Whether the model has features to embed the task's records with; torch is not loaded for it.

    Raises:
        ConfigError: it has not.
    """
    if not model.pretrained:
        raise ConfigError(
            f"model={model.name}: starts from nothing and has no pretrained features; "
            f"expected a pretrained encoder, e.g. model={EXAMPLES[task.kind]}"
        )
    if model.reads != task.kind:
        raise ConfigError(f"model={model.name}: reads {model.reads}s; the task's records are {task.kind}s")
    if prompts and not isinstance(model, ImageModelConfig):
        raise ConfigError(
            f"--texts: model={model.name} has no tower for images; expected a model of both, e.g. CLIP or SigLIP"
        )


def _computed(
    task: TaskConfig,
    model: ModelConfig,
    data: SiteDataset,
    prompts: list[str],
    cache: "ActivationCache | None",
    device: str,
    progress: Progress | None,
) -> tuple[Floats, Floats, dict[str, Any]]:
    """Rows, prompts, and how they were made: the digest of all that they depend on besides weights and records."""
    from fedmed.config import AdapterConfig
    from fedmed.devices import device_of
    from fedmed.models.build import build
    from fedmed.models.image_text import ImageTextEncoder
    from fedmed.models.sound import SoundEncoder
    from fedmed.training import one_thread

    one_thread()
    none = np.zeros((0, 0), dtype=np.float32)
    if prompts:
        assert isinstance(model, ImageModelConfig)
        assert isinstance(task, ImageTaskConfig)
        both = ImageTextEncoder(task, model, device=device_of(device))
        # Before the records: a prompt that is too long is said at once.
        texts = both.texts(prompts).numpy()
        with _counted(both.model.vision_model, len(data.labels) * data.images.shape[1], progress):
            rows = both.images(data, cache=cache)
        return rows.numpy(), texts, _how(task, model, both.depends)
    if isinstance(model, SoundModelConfig):
        assert isinstance(task, SoundTaskConfig)
        heard = SoundEncoder(task, model, device=device_of(device))
        with _counted(heard.encoder, len(data.labels) * task.clips, progress):
            rows = heard.sounds(data, cache=cache)
        return rows.numpy(), none.reshape(0, rows.shape[1]), _how(task, model, heard.depends)
    if isinstance(model, TextModelConfig):
        model = dataclasses.replace(model, synthetic_sentences=0, components=0, feature_norm=1.0)
    network: Any = build(task, model, AdapterConfig(kind="head"), device=device_of(device))
    passes = len(data.labels) * (data.images.shape[1] if len(data.images) else 1)
    with _counted(network.encoder, passes, progress):
        rows = network.prepare(data, cache=cache, alone=True)["features"].numpy()
    return rows, none.reshape(0, rows.shape[1]), _how(task, model, network._depends)


def _how(task: TaskConfig, model: ModelConfig, depends: dict[str, Any]) -> dict[str, Any]:
    from fedmed.models.loading import tokenizer_digest

    assert isinstance(model, PretrainedConfig)
    depends = dict(depends)
    if isinstance(model, TextModelConfig):
        depends |= {"max_tokens": model.max_tokens, "tokenizer": tokenizer_digest(model)}
    elif isinstance(task, SoundTaskConfig):
        depends |= {"clips": task.clips}
    else:
        depends |= {name: getattr(task, name) for name in ("image_size", "slices")}
        if depends.get("space"):
            depends["tokenizer"] = tokenizer_digest(model)
    text = json.dumps(depends, sort_keys=True)
    return {
        "space": depends.get("space", "pooled"),
        "preprocessing_sha256": hashlib.sha256(text.encode()).hexdigest(),
    }


@contextlib.contextmanager
def _counted(encoder: Any, passes: int, progress: Progress | None) -> Iterator[None]:
    """Tell `progress` of each pass through the encoder; of what is read from a cache there is none."""
    done = 0

    def one(*_: object) -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(min(done, passes), passes)

    hook = encoder.register_forward_hook(one)
    try:
        yield
    finally:
        hook.remove()
