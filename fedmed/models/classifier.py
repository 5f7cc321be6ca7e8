"""What every network is to the rest of fedmed, and the two that read tables: an encoder with a head, a tabular one.

They map a batch of named tensors to one logit a record, and know how to turn a site's records into such a batch,
once.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedmed.config import AdapterConfig
from fedmed.data.dataset import SiteDataset
from fedmed.data.sentences import synthetic_sentences
from fedmed.data.table import feature_names
from fedmed.devices import CPU, sent
from fedmed.model import TabularModelConfig, TextModelConfig
from fedmed.models.activations import ActivationCache, Asked
from fedmed.models.adapters import add_adapter
from fedmed.models.loading import load_text_encoder, settings_digest
from fedmed.models.prefix import capture, cut_point, replayed
from fedmed.models.row_linear import RowLinear
from fedmed.task import TableTaskConfig

Batch = dict[str, Tensor]
Arrays = dict[str, NDArray[np.float32]]
# Records per forward pass where no gradient is needed.
INFERENCE_BATCH = 32


class Classifier(nn.Module):
    """What training, evaluation and export need to know about a network."""

    head: nn.Linear
    # The adapter as it was built, before a seed.
    built: dict[str, Tensor]

    def prepare(
        self, data: SiteDataset, *, cache: ActivationCache | None = None, alone: bool = False
    ) -> Batch:
        """A site's records as named tensors, first dimension records: everything that is computed once.

        Args:
            cache: where the frozen part's activations are looked for, and kept.
            alone: compute each record by itself, so that its last bits do not depend on others.
        """
        raise NotImplementedError

    def adapter(self) -> dict[str, nn.Parameter]:
        """The trainable parameters by name, in a fixed order: what travels."""
        return {name: p for name, p in sorted(self.named_parameters()) if p.requires_grad}

    @property
    def device(self) -> torch.device:
        """Where it computes. What it prepares, and its arrays, are on the host."""
        return next(self.parameters()).device

    @property
    def trainable(self) -> int:
        """The number of trainable parameters: each is noised in every private step."""
        return sum(p.numel() for p in self.adapter().values())

    def initialise(self, seed: int) -> Arrays:
        """Set the adapter to where a run with this seed starts, and return copies of its arrays.

        Random matrices (those that are `drawn`) are drawn by NumPy, so that all sites hold the same frozen A
        of `ffa_lora` without sending it. The bound 1 / sqrt(fan in) is PyTorch's and PEFT's.
        """
        draws = np.random.default_rng([seed, 1])
        with torch.no_grad():
            for name, parameter in sorted(self.named_parameters()):
                if self.drawn(name, parameter):
                    fan_in = parameter[0].numel() if parameter.dim() > 1 else len(parameter)
                    values = draws.uniform(-1, 1, size=tuple(parameter.shape)) * fan_in**-0.5
                    parameter.copy_(torch.from_numpy(values.astype(np.float32)))
                elif name in self.built:
                    parameter.copy_(self.built[name])
        return {name: p.detach().cpu().numpy().copy() for name, p in self.adapter().items()}

    def drawn(self, name: str, parameter: nn.Parameter) -> bool:
        """Whether a parameter starts at random rather than as it was built: LoRA's A."""
        del parameter
        return "lora_A" in name

    def inputs(self, task: Any) -> dict[str, object]:
        """What adapter.json says of the network's input."""
        del task
        return {}

    def training_mode(self) -> None:
        """Train what is trainable; everything frozen stays in eval(), so that dropout and statistics are off."""
        self.eval()
        for module in self.modules():
            if any(p.requires_grad for p in module.parameters(recurse=False)):
                module.training = True


class TabularClassifier(Classifier):
    """Logistic regression, or one hidden tanh layer (bounded activations suit clipping: Papernot et al. 2021)."""

    def __init__(self, task: TableTaskConfig, model: TabularModelConfig, adapter: AdapterConfig) -> None:
        super().__init__()
        # Head and hidden layer are trained under either kind.
        del adapter
        width = len(feature_names(task))
        self.hidden: nn.Module = nn.Identity()
        if model.hidden:
            self.hidden = nn.Sequential(nn.Linear(width, model.hidden), nn.Tanh())
        self.head = RowLinear(model.hidden or width, 1)
        zero(self.head)

    def prepare(
        self, data: SiteDataset, *, cache: ActivationCache | None = None, alone: bool = False
    ) -> Batch:
        del cache, alone
        return {"features": torch.from_numpy(data.features)}

    def forward(self, features: Tensor) -> Tensor:
        """(records,) logits of (records, features)."""
        return self.head(self.hidden(features)).squeeze(-1)

    def drawn(self, name: str, parameter: nn.Parameter) -> bool:
        """The hidden layer."""
        del parameter
        return name.startswith("hidden.")

    def inputs(self, task: TableTaskConfig) -> dict[str, object]:
        return {"features": feature_names(task)}


class TextClassifier(Classifier):
    """A pretrained encoder, pooled, centred by public constants, and a linear head."""

    features_in_words = "the encoder's plain pooled output"

    mean: Tensor
    projection: Tensor

    def __init__(self, task: TableTaskConfig, model: TextModelConfig, adapter: AdapterConfig) -> None:
        super().__init__()
        self.config, self.where = model, task.path
        encoder, self.tokenizer = load_text_encoder(model)
        self.limit = min(
            model.max_tokens, getattr(encoder.config, "max_position_embeddings", model.max_tokens)
        )
        self.model_type: str = encoder.config.model_type
        self.encoder = encoder
        width = int(encoder.config.hidden_size)
        mean, projection = self._whitening(task, width)
        self.register_buffer("mean", mean)
        self.register_buffer("projection", projection)
        self.encoder = add_adapter(encoder, adapter, lora_targets=model.lora_targets)
        self.head = RowLinear(projection.shape[1], 1)
        zero(self.head)
        after, self.cut = cut_point(self.encoder)
        self.head_only = after and adapter.kind == "head"

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        state: Tensor | None = None,
        features: Tensor | None = None,
    ) -> Tensor:
        """(records,) logits; from stored `features` where only the head is trained, or from a stored `state`."""
        if features is None:
            assert input_ids is not None
            assert attention_mask is not None
            if state is None or self.cut is None:
                hidden = self._encode(input_ids, attention_mask)
            else:
                with replayed(self.encoder, self.cut, state.float()):
                    hidden = self._encode(input_ids, attention_mask)
            features = (self._pool(hidden, attention_mask) - self.mean) @ self.projection
        return self.head(features).squeeze(-1)

    @torch.no_grad()
    def prepare(
        self, data: SiteDataset, *, cache: ActivationCache | None = None, alone: bool = False
    ) -> Batch:
        self.eval()
        if not data.texts:
            # Of a site without a usable record: tensors of no record, shaped like any others.
            Asked(cache, data, self.where, {}, {}, self.device).forget_earlier()
            some = dataclasses.replace(data, texts=["-"])
            return {name: tensor[:0] for name, tensor in self.prepare(some).items()}
        # Stored at one length: a record's state must not depend on the batch that it came in. The longest text of a
        # site is somebody's, and whose removal would shorten all others, down to their last bits.
        inputs = self.tokenize(data.texts, whole=alone)
        size = 1 if alone else INFERENCE_BATCH
        asked = Asked(cache, data, self.where, self._depends | {"batch": size}, inputs, self.device)
        if self.head_only:
            pooled = asked.features(lambda: iter([self.pooled(data.texts, size=size)]))
            return {"features": (pooled - self.mean.cpu()) @ self.projection.cpu()}
        if self.cut is not None:
            inputs["state"] = asked.state(
                self.cut, lambda: self._states(inputs, size), self.config.activations
            )
        return inputs

    def _states(self, inputs: Batch, size: int) -> Iterator[Tensor]:
        assert self.cut is not None
        pieces = (inputs[name].split(size) for name in ("input_ids", "attention_mask"))
        for ids, mask in zip(*pieces, strict=True):
            inputs = self._encoder_inputs(sent(ids, self.device), sent(mask, self.device))
            yield capture(self.encoder, self.cut, inputs).cpu()

    @property
    def _depends(self) -> dict[str, Any]:
        """What stored activations depend on besides the token ids."""
        return {
            "model": self.config.sha256,
            "settings": settings_digest(self.encoder),
            "pooling": self.config.pooling,
        }

    def tokenize(self, texts: list[str], *, whole: bool = False) -> Batch:
        """(records, tokens) int64 ids and mask, padded to the longest text, or to as many tokens as are ever read."""
        encoded = self.tokenizer(
            texts,
            padding="max_length" if whole else True,
            truncation=True,
            max_length=self.limit,
            return_tensors="pt",
        )
        return {"input_ids": encoded["input_ids"], "attention_mask": encoded["attention_mask"]}

    @torch.no_grad()
    def pooled(self, texts: list[str], *, size: int = INFERENCE_BATCH) -> Tensor:
        """(texts, width) pooled outputs of the encoder, `size` at a time, batched by length to save padding."""
        order = sorted(range(len(texts)), key=lambda index: len(texts[index]))
        pooled: list[Tensor] = [torch.empty(0)] * len(texts)
        for start in range(0, len(order), size):
            chosen = order[start : start + size]
            found = self.tokenize([texts[index] for index in chosen])
            inputs = {name: sent(values, self.device) for name, values in found.items()}
            rows = self._pool(self._encode(**inputs), inputs["attention_mask"]).cpu()
            for index, row in zip(chosen, rows, strict=True):
                pooled[index] = row
        return torch.stack(pooled)

    def plain_head(self) -> tuple[Tensor, Tensor]:
        """Weight (1, width) and bias (1,) of the same head on the encoder's plain pooled output."""
        weight = self.head.weight.detach().double() @ self.projection.double().T
        bias = self.head.bias.detach().double() - weight @ self.mean.double()
        return weight.float(), bias.float()

    def _encode(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.encoder(**self._encoder_inputs(input_ids, attention_mask)).last_hidden_state

    def _encoder_inputs(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Any]:
        inputs: dict[str, Any] = {"input_ids": input_ids, "attention_mask": attention_mask}
        if self.model_type == "bert":
            # Given per record, so that the position table's gradient has one row a record.
            positions = torch.arange(input_ids.shape[1], device=input_ids.device)
            inputs["position_ids"] = positions.expand(len(input_ids), -1)
        if input_ids.device.type != "cpu" and self.encoder.config._attn_implementation == "sdpa":
            inputs["attention_mask"] = self._masks(attention_mask)
        return inputs

    def _masks(self, attention_mask: Tensor) -> Any:
        """Of (records, tokens), as the encoder makes them, which asks an accelerator whether there is padding."""
        whole = attention_mask.bool()[:, None, None]
        if self.model_type == "bert":
            return whole
        if self.model_type == "modernbert":
            places = torch.arange(attention_mask.shape[1], device=attention_mask.device)
            near = (places[:, None] - places).abs() <= self.encoder.config.sliding_window
            return {"full_attention": whole, "sliding_attention": whole & near}
        return attention_mask

    def _pool(self, hidden: Tensor, attention_mask: Tensor) -> Tensor:
        if self.config.pooling == "cls":
            return hidden[:, 0]
        mask = attention_mask.unsqueeze(-1).to(hidden.dtype)
        return (hidden * mask).sum(1) / mask.sum(1)

    def _whitening(self, task: TableTaskConfig, width: int) -> tuple[Tensor, Tensor]:
        """Mean (width,) and projection (width, components) of synthetic sentences: public constants.

        Features keep the leading principal components, each divided by its deviation to the power
        `whitening`, and are scaled to a root-mean-square norm of `feature_norm` over the synthetic sentences,
        so that one clipping norm suits every encoder.
        """
        if not self.config.synthetic_sentences:
            return torch.zeros(width), torch.eye(width)
        rows = self.pooled(synthetic_sentences(task, self.config.synthetic_sentences)).double().numpy()
        mean = rows.mean(axis=0)
        if not self.config.components:
            scale = np.sqrt(((rows - mean) ** 2).sum(axis=1).mean())
            projection = np.eye(width) / scale
        else:
            _, singular, directions = np.linalg.svd(rows - mean, full_matrices=False)
            # Directions in which sentences differ by no more than float32 rounding would be blown up.
            kept = min(self.config.components, int((singular > 1e-3 * singular[0]).sum()))
            deviation = singular[:kept] / np.sqrt(len(rows))
            projection = directions[:kept].T * deviation**-self.config.whitening
            projection /= np.sqrt((((rows - mean) @ projection) ** 2).sum(axis=1).mean())
        return torch.from_numpy(mean).float(), torch.from_numpy(self.config.feature_norm * projection).float()


def select(batch: Mapping[str, Tensor], indices: Tensor, device: torch.device = CPU) -> Batch:
    """The rows `indices` of every tensor, on a device."""
    return {name: sent(tensor, device, indices) for name, tensor in batch.items()}


def zero(head: nn.Linear) -> None:
    """Start a head where it says nothing."""
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
