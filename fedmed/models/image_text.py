"""Models of images and text (CLIP, SigLIP): both in one space, where the cosine says how well they fit together.

For embedding alone: what is trained is a classifier, which loads the tower for images and no other.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from fedmed.data.dataset import SiteDataset
from fedmed.devices import CPU, sent
from fedmed.errors import ConfigError
from fedmed.model import ImageModelConfig
from fedmed.models.activations import ActivationCache, Asked
from fedmed.models.loading import load_image_text, settings_digest
from fedmed.task import ImageTaskConfig


class ImageTextEncoder:
    """Both towers of a published model, each with its projection; records and prompts go through it one by one.

    Raises:
        ModelError: the folder does not hold both towers and a tokenizer, or is not the pinned one.
    """

    def __init__(self, task: ImageTaskConfig, model: ImageModelConfig, *, device: torch.device = CPU) -> None:
        self.config, self.where, self.device = model, task.path, device
        self.model, self.tokenizer, self.preprocessor = load_image_text(model)
        self.model.to(device)
        size = self.preprocessor.size(task.image_size, task.image_size)
        own = self.model.config.vision_config.image_size
        self.interpolated = size != (own, own)
        self.most_tokens: int = self.model.config.text_config.max_position_embeddings

    @property
    def depends(self) -> dict[str, Any]:
        """What an image's embedding depends on besides the image."""
        return {
            "model": self.config.sha256,
            "settings": settings_digest(self.model),
            "space": "image and text",
            "preprocessing": dataclasses.asdict(self.preprocessor),
        }

    @torch.no_grad()
    def images(self, data: SiteDataset, *, cache: ActivationCache | None = None) -> Tensor:
        """(records, width) of norm 1: the mean of a record's slices in the shared space."""
        records = torch.from_numpy(data.images)

        def pieces() -> Iterator[Tensor]:
            for record in records:
                slices = self.preprocessor.cut(record[None]).split(1, dim=1)
                yield functional.normalize(
                    torch.stack([self._image(one) for one in slices]).mean(dim=0)
                ).cpu()

        asked = Asked(cache, data, self.where, self.depends, {"images": records}, self.device)
        return asked.features(pieces)

    @torch.no_grad()
    def texts(self, prompts: list[str]) -> Tensor:
        """(prompts, width) of norm 1.

        Raises:
            ConfigError: a prompt is longer than the tower reads: cut off, it would be another one.
        """
        # SigLIP was trained on padded texts, and reads the last place.
        padding = "max_length" if self.model.config.model_type == "siglip" else False
        rows = []
        for number, prompt in enumerate(prompts, start=1):
            inputs = self.tokenizer(
                prompt, padding=padding, max_length=self.most_tokens, truncation=False, return_tensors="pt"
            )
            tokens = inputs["input_ids"].shape[1]
            if tokens > self.most_tokens:
                raise ConfigError(
                    f"--texts: prompt {number} has {tokens} tokens; expected at most {self.most_tokens}"
                )
            names = ("input_ids",) if padding else ("input_ids", "attention_mask")
            known = {name: sent(inputs[name], self.device) for name in names}
            rows.append(functional.normalize(self.model.get_text_features(**known).pooler_output).cpu())
        return torch.cat(rows)

    def _image(self, image: Tensor) -> Tensor:
        inputs: dict[str, Any] = {"pixel_values": self.preprocessor.scaled(sent(image, self.device))}
        if self.interpolated:
            inputs["interpolate_pos_encoding"] = True
        found: Tensor = self.model.get_image_features(**inputs).pooler_output
        return found
