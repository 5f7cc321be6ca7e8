"""The network that a configuration describes. Built once a process and kept: a warm site."""

import json
from collections.abc import Callable
from functools import lru_cache

import torch

from fedmed.config import parse
from fedmed.devices import CPU
from fedmed.errors import ModelError
from fedmed.models.classifier import Classifier, TabularClassifier, TextClassifier
from fedmed.models.cnn import CnnClassifier
from fedmed.models.image_classifier import ImageClassifier
from fedmed.pretrained import PretrainedConfig
from fedmed.schema import to_dict

# By the kind of the model's configuration.
NETWORKS: dict[str, Callable[..., Classifier]] = {
    "tabular": TabularClassifier,
    "text": TextClassifier,
    "image": ImageClassifier,
    "cnn": CnnClassifier,
}


def build(task: object, model: object, adapter: object, *, device: torch.device = CPU) -> Classifier:
    """The network for a task, model and adapter configuration, on a device.

    The same configuration gives the same object until two others were asked for: callers `initialise` it and
    set the adapter's values before they use it.

    Raises:
        ModelError: the model cannot be loaded, or the adapter does not fit it.
    """
    if isinstance(model, PretrainedConfig):
        model = model.bare()
    # In the order that was declared: the columns' order is the order of a sentence's phrases.
    return _build(*(json.dumps(to_dict(part)) for part in (task, model, adapter)), device)


@lru_cache(maxsize=2)
def _build(task_json: str, model_json: str, adapter_json: str, device: torch.device) -> Classifier:
    task = parse("task", json.loads(task_json))
    model = parse("model", json.loads(model_json))
    if model.kind not in NETWORKS:
        raise ModelError(f"model.kind={model.kind}: gives embeddings, and is not trained on")
    adapter = parse("adapter", json.loads(adapter_json))
    # What it computes of itself, public constants among it, is computed where every site can.
    built = NETWORKS[model.kind](task, model, adapter).to(device)
    # Training changes the adapter in place; `initialise` goes back to these copies.
    built.built = {name: p.detach().clone() for name, p in built.adapter().items()}
    return built
