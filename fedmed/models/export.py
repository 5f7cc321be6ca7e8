"""A finished adapter on disk: PEFT for the LoRA kinds, safetensors and JSON for the others, and its card."""

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from safetensors.numpy import save
from safetensors.torch import save as save_torch

from fedmed.atomic import write_bytes, write_json
from fedmed.config import RunConfig
from fedmed.data.sentences import synthetic_sentences
from fedmed.models import cnn
from fedmed.models.classifier import Classifier, TextClassifier
from fedmed.models.image_classifier import ImageClassifier
from fedmed.privacy.in_words import round_up
from fedmed.schema import to_dict
from fedmed.training import Arrays, set_adapter


def export(model: Classifier, arrays: Arrays, config: RunConfig, folder: Path) -> None:
    """Write the adapter under `folder`.

    Of a pretrained encoder: `head.safetensors`, so that nothing of fedmed is needed to use it; of text the head is on
    the encoder's plain pooled output, of images on features of norm `model.feature_norm`. LoRA kinds: a PEFT adapter
    (`adapter_model.safetensors`, `adapter_config.json`). Others: `adapter.safetensors` by parameter name. Of a network
    that is not pretrained, what is frozen in it came from the seed alone: `frozen.safetensors`. All: `adapter.json`
    with what it belongs to.
    """
    folder.mkdir(parents=True, exist_ok=True)
    model.initialise(config.seed)
    set_adapter(model, arrays)
    described: dict[str, Any] = {
        "fedmed": version("fedmed"),
        "task": to_dict(config.task),
        "model": to_dict(config.model),
        "adapter": to_dict(config.adapter),
        "seed": config.seed,
    }
    if isinstance(model, TextClassifier | ImageClassifier):
        described["transformers"] = version("transformers")
        weight, bias = model.plain_head()
        head = {"weight": weight.contiguous(), "bias": bias.contiguous()}
        write_bytes(folder / "head.safetensors", save_torch(head))
        described["head"] = f"logit = weight @ features + bias; features: {model.features_in_words}"
    described |= model.inputs(config.task)
    if config.adapter.kind in ("lora", "ffa_lora"):
        assert isinstance(model, TextClassifier | ImageClassifier)
        peft: Any = model.encoder
        peft.save_pretrained(folder, safe_serialization=True)
        # The path of this machine's base model is nobody else's business; the card has its digest.
        written = json.loads((folder / "adapter_config.json").read_text())
        write_json(folder / "adapter_config.json", written | {"base_model_name_or_path": None})
        # PEFT writes a card of placeholders; the run's own card says what is known.
        (folder / "README.md").unlink(missing_ok=True)
    else:
        contiguous = {name: np.asarray(values, order="C") for name, values in arrays.items()}
        write_bytes(folder / "adapter.safetensors", save(contiguous))
    frozen = {name: p.detach().contiguous() for name, p in model.named_parameters() if not p.requires_grad}
    if frozen and not config.model.pretrained:
        write_bytes(folder / "frozen.safetensors", save_torch(frozen))
    write_json(folder / "adapter.json", described)


def write_card(summary: dict[str, Any], config: RunConfig, path: Path) -> None:
    """The model card: what it is, what it was trained on, what it cost in privacy, how to use it."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("fedmed.models", "."),
        trim_blocks=True,
        lstrip_blocks=True,
        autoescape=False,
    )
    environment.filters["epsilon"] = lambda value: f"{round_up(value):.2f}"
    missing = {"exact": "one class", "private": "too few"}
    environment.filters["figure"] = lambda value, release: (
        missing[release] if value is None else f"{value:.3f}"
    )
    # Of an image encoder the preprocessing is in the file of the base model, which export has read.
    image = config.model.kind == "image"
    described = json.loads((path.parent / "adapter" / "adapter.json").read_text()) if image else {}
    text = environment.get_template("card.md.j2").render(
        summary=summary,
        config=config,
        described=described,
        transformers=version("transformers") if config.model.pretrained else "",
        lora="lora" in config.adapter.kind,
        frozen=not config.model.pretrained and (path.parent / "adapter" / "frozen.safetensors").exists(),
        widths=cnn.WIDTHS,
        groups=cnn.GROUPS,
        middle=cnn.MIDDLE,
        scale=cnn.SCALE,
        example=synthetic_sentences(config.task, 1)[0] if config.model.kind == "text" else "",
    )
    write_bytes(path, text.encode())
