"""A pretrained image encoder with a head."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from fedmed.config import AdapterConfig
from fedmed.data.dataset import SiteDataset
from fedmed.devices import sent
from fedmed.errors import ModelError
from fedmed.model import ImageModelConfig
from fedmed.models.activations import ActivationCache, Asked
from fedmed.models.adapters import add_adapter
from fedmed.models.classifier import Batch, Classifier, zero
from fedmed.models.loading import IMAGE_FAMILIES, load_image_encoder, settings_digest
from fedmed.models.prefix import capture, cut_point, replayed
from fedmed.models.row_linear import RowLinear
from fedmed.task import ImageTaskConfig


class ImageClassifier(Classifier):
    """A pretrained encoder, pooled, scaled to a norm that suits one clipping norm, and a linear head.

    Of a record with several slices or frames each goes through the encoder by itself, as three equal channels; their
    pooled features are averaged. A record is prepared alone, so that no bit of what is stored of it depends on others.
    """

    features_in_words = (
        "the encoder's pooled output, averaged over slices and scaled to the norm feature_norm"
    )

    def __init__(self, task: ImageTaskConfig, model: ImageModelConfig, adapter: AdapterConfig) -> None:
        super().__init__()
        self.config, self.where = model, task.path
        encoder, self.preprocessor = load_image_encoder(model)
        self.family = IMAGE_FAMILIES[encoder.config.model_type]
        # (height, width) of what the encoder reads.
        self.size = self.preprocessor.size(task.image_size, task.image_size)
        own = encoder.config.image_size if self.family.fixed else self.size
        self.interpolated = self.size != (tuple(own) if isinstance(own, list | tuple) else (own, own))
        self.encoder = encoder
        self._check_pooling()
        self._check_adapter(adapter)
        self.encoder = add_adapter(encoder, adapter, lora_targets=model.lora_targets)
        with torch.set_grad_enabled(adapter.kind == "full"):
            features = self._blank_features()
        if adapter.kind == "full":
            self._freeze_unused(features)
        self.head = RowLinear(features.shape[1], 1)
        zero(self.head)
        after, self.cut = cut_point(self.encoder)
        self.head_only = after and adapter.kind == "head"

    def forward(
        self, images: Tensor | None = None, state: Tensor | None = None, features: Tensor | None = None
    ) -> Tensor:
        """(records,) logits of `images`, (records, slices, height, width) of 0 to 1 as the encoder's preprocessing
        resampled them; from a stored `state`, (records, slices, …), or from stored `features` (records, width)."""
        if features is None:
            features = self._features(images, state)
        return self.head(features).squeeze(-1)

    @torch.no_grad()
    def prepare(
        self, data: SiteDataset, *, cache: ActivationCache | None = None, alone: bool = False
    ) -> Batch:
        # Always alone.
        del alone
        self.eval()
        if not len(data.images):
            # Of a site without a usable record: tensors of no record, shaped like any others.
            Asked(cache, data, self.where, {}, {}, self.device).forget_earlier()
            some = dataclasses.replace(data, images=np.zeros((1, *data.images.shape[1:]), dtype=np.float32))
            return {name: tensor[:0] for name, tensor in self.prepare(some).items()}
        records = torch.from_numpy(data.images)

        def images() -> Iterator[Tensor]:
            return (self.preprocessor.cut(record[None]) for record in records)

        def through(part: Callable[[Tensor], Tensor]) -> Iterator[Tensor]:
            return (part(sent(image, self.device)).cpu() for image in images())

        asked = Asked(cache, data, self.where, self._depends, {"images": records}, self.device)
        if self.head_only:
            return {"features": asked.features(lambda: through(self._features))}
        if self.cut is None:
            return {"images": torch.cat(list(images()))}
        return {"state": asked.state(self.cut, lambda: through(self._state), self.config.activations)}

    @property
    def _depends(self) -> dict[str, Any]:
        """What stored activations depend on besides the images."""
        return {
            "model": self.config.sha256,
            "settings": settings_digest(self.encoder),
            "pooling": self.config.pooling,
            "feature_norm": self.config.feature_norm,
            "preprocessing": dataclasses.asdict(self.preprocessor),
        }

    def inputs(self, task: ImageTaskConfig) -> dict[str, object]:
        shape = ["records", task.slices, task.image_size, task.image_size]
        resampled = self.preprocessor.resampled(task.image_size, task.image_size)
        return {
            "input": {"shape": shape, "low": 0.0, "high": 1.0},
            "encoder": self.family.encoder,
            "module": self.family.module,
            "leading_tokens": self._leading,
            "interpolated": self.interpolated,
            "preprocessing": dataclasses.asdict(self.preprocessor)
            | {"resampled": resampled, "size": self.size, "padding": self.preprocessor.padding(*resampled)},
            "feature_norm": self.config.feature_norm,
        }

    def plain_head(self) -> tuple[Tensor, Tensor]:
        """Weight (1, width) and bias (1,) of the head."""
        return self.head.weight.detach(), self.head.bias.detach()

    @property
    def _leading(self) -> int:
        """Tokens before the patches': the class token and registers."""
        registers: int = getattr(self.encoder.config, "num_register_tokens", 0)
        return self.family.class_token + registers

    def _state(self, images: Tensor) -> Tensor:
        """What enters the first trainable block, of one record: (1, slices, …)."""
        assert self.cut is not None
        slices = images.split(1, dim=1)
        return torch.stack([capture(self.encoder, self.cut, self._inputs(one)) for one in slices], dim=1)

    def _features(self, images: Tensor | None, state: Tensor | None = None) -> Tensor:
        """(records, width): the mean over a record's slices, of norm `feature_norm`."""
        if state is not None:
            pooled = [self._replayed(one.float()) for one in state.unbind(1)]
        else:
            assert images is not None
            pooled = [self._pool(self.encoder(**self._inputs(one))) for one in images.split(1, dim=1)]
        # Slice by slice, so that in each pass of the encoder a record has one row: that is what gradients go by.
        return functional.normalize(torch.stack(pooled).mean(dim=0)) * self.config.feature_norm

    def _replayed(self, state: Tensor) -> Tensor:
        assert self.cut is not None
        # Only its shape is read.
        blank = state.new_zeros(()).expand(len(state), 3, *self.size)
        with replayed(self.encoder, self.cut, state):
            return self._pool(self.encoder(pixel_values=blank, **self._options))

    def _inputs(self, images: Tensor) -> dict[str, Any]:
        """For the encoder, of (records, 1, height, width) of 0 to 1."""
        return {"pixel_values": self.preprocessor.scaled(images), **self._options}

    @property
    def _options(self) -> dict[str, bool]:
        return {"interpolate_pos_encoding": True} if self.interpolated else {}

    def _pool(self, output: Any) -> Tensor:
        if self.config.pooling == "pooler":
            pooled: Tensor = output.pooler_output
            return pooled.flatten(1)
        hidden: Tensor = output.last_hidden_state
        if hidden.dim() == 4:
            return hidden.mean(dim=(2, 3))
        return hidden[:, 0] if self.config.pooling == "cls" else hidden[:, self._leading :].mean(dim=1)

    def _blank_features(self) -> Tensor:
        """(1, width) features of a black image: the first time that the encoder meets this size."""
        self.eval()
        try:
            return self._features(torch.zeros(1, 1, *self.size))
        except (RuntimeError, ValueError):
            raise ModelError(
                f"model.image_size={self.config.image_size}: the encoder cannot read images of "
                f"{self.size[0]} x {self.size[1]} pixels"
            ) from None

    def _freeze_unused(self, features: Tensor) -> None:
        """Freeze what the features do not depend on: it would be trained on noise alone."""
        trained = [p for p in self.encoder.parameters() if p.requires_grad]
        gradients = torch.autograd.grad(features.sum(), trained, allow_unused=True)
        for parameter, gradient in zip(trained, gradients, strict=True):
            parameter.requires_grad_(gradient is not None)

    def _check_pooling(self) -> None:
        able = {
            "cls": self.family.class_token,
            "mean": True,
            "pooler": self.family.pooler and getattr(self.encoder.config, "vision_use_head", True),
        }
        if not able[self.config.pooling]:
            kind = self.encoder.config.model_type
            expected = " or ".join(name for name, ok in able.items() if ok)
            raise ModelError(f"model.pooling={self.config.pooling}: a '{kind}' encoder has {expected}")

    def _check_adapter(self, adapter: AdapterConfig) -> None:
        """Some encoders stay as they are; of others embeddings' gradients for one patient are known of a ViT at its own
        size alone."""
        if self.family.head_only and adapter.kind != "head":
            kind = self.encoder.config.model_type
            raise ModelError(
                f"adapter={adapter.kind}: a '{kind}' encoder stays as it is; expected adapter=head"
            )
        known = self.family.encoder == "ViTModel" and not self.interpolated
        if adapter.kind == "full" and adapter.embeddings and not known:
            kind = self.encoder.config.model_type
            raise ModelError(
                f"adapter.embeddings=true: expected false: of a '{kind}' encoder at {self.size[0]} pixels no rule "
                "gives one patient's gradient of the embeddings"
            )
