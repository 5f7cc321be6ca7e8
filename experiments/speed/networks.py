"""The networks whose steps are timed, with made-up records: their speed does not depend on what is in them."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import ViTConfig, ViTModel

from fedmed.config import AdapterConfig
from fedmed.model import CnnModelConfig
from fedmed.models.adapters import add_adapter
from fedmed.models.cnn import CnnClassifier
from fedmed.models.prefix import transformer_blocks
from fedmed.models.row_linear import RowLinear
from fedmed.privacy.plan import PrivacyPlan
from fedmed.task import ImageTaskConfig


@dataclass(frozen=True)
class Setting:
    """One step that is timed.

    Attributes:
        family: cnn, vit (from pixels), suffix (the last two blocks of a ViT, from the stored state), head or mlp.
        adapter: lora, full or head.
        size: pixels a side.
        width, layers: of a ViT.
        bf16: whether the layers compute in bf16, as `training.precision=bf16` has it.
        target: how many times the step without privacy it may take, where that was promised.
    """

    name: str
    family: str
    patients: int
    images: int = 1
    size: int = 224
    width: int = 192
    layers: int = 12
    adapter: str = "full"
    bf16: bool = False
    target: float | None = None

    @property
    def records(self) -> int:
        return self.patients * self.images


class ViT(nn.Module):
    """A ViT (patches of 16 pixels) with a linear head on its first token; of `suffix` the last two blocks alone."""

    def __init__(self, setting: Setting) -> None:
        super().__init__()
        config = ViTConfig(
            hidden_size=setting.width, num_hidden_layers=setting.layers, num_attention_heads=setting.width // 64,
            intermediate_size=4 * setting.width, image_size=setting.size, patch_size=16,
        )  # fmt: skip
        kind = setting.adapter
        encoder = add_adapter(
            ViTModel(config, add_pooling_layer=False), AdapterConfig(kind=kind, rank=8, last_blocks=2)
        )
        self.head = RowLinear(setting.width, 1)
        if setting.family == "suffix":
            self.blocks = nn.ModuleList(list(transformer_blocks(encoder)[1])[-2:])
            self.norm = nn.LayerNorm(setting.width).requires_grad_(False)
        else:
            self.encoder = encoder

    def forward(self, values: Tensor) -> Tensor:
        """(records,) logits of (records, 3, size, size) pixels, or of (records, tokens, width) states."""
        if hasattr(self, "encoder"):
            return self.head(self.encoder(pixel_values=values).last_hidden_state[:, 0]).squeeze(-1)
        for block in self.blocks:
            found = block(values)
            values = found if isinstance(found, Tensor) else found[0]
        return self.head(self.norm(values)[:, 0]).squeeze(-1)


class Cnn(CnnClassifier):
    def forward(self, values: Tensor) -> Tensor:
        return super().forward(images=values)


class Head(nn.Module):
    """On stored features, or with a hidden layer on a table's."""

    def __init__(self, inputs: int, hidden: int) -> None:
        super().__init__()
        self.hidden = nn.Sequential(nn.Linear(inputs, hidden), nn.Tanh()) if hidden else nn.Identity()
        self.head = RowLinear(hidden or inputs, 1)

    def forward(self, values: Tensor) -> Tensor:
        return self.head(self.hidden(values)).squeeze(-1)


def network(setting: Setting) -> nn.Module:
    """Ready to train, the same at each call."""
    torch.manual_seed(0)
    if setting.family == "cnn":
        task = ImageTaskConfig(path="nowhere", image_size=setting.size, declared_sizes={"a": 1_000})
        model: nn.Module = Cnn(task, CnnModelConfig(), AdapterConfig(kind="full"))
    elif setting.family in ("vit", "suffix"):
        model = ViT(setting)
    else:
        model = Head(768, 0) if setting.family == "head" else Head(20, 64)
    for name, p in model.named_parameters():
        # Both start at zero, where the layers below have no gradient.
        if "lora_B" in name or name == "head.weight":
            nn.init.normal_(p, std=0.05)
    # Frozen layers, dropout and what is trained alike: no network here has statistics.
    return model.eval()


def records(setting: Setting) -> tuple[Tensor, Tensor, Tensor]:
    """Values, labels and the patient of each record."""
    torch.manual_seed(1)
    shapes: dict[str, tuple[int, ...]] = {
        "cnn": (1, setting.size, setting.size), "vit": (3, setting.size, setting.size),
        "suffix": (1 + (setting.size // 16) ** 2, setting.width), "head": (768,), "mlp": (20,),
    }  # fmt: skip
    values = torch.rand(setting.records, *shapes[setting.family])
    labels = torch.arange(setting.records).remainder(2).float()
    return values, labels, torch.arange(setting.patients).repeat_interleave(setting.images)


def plan(setting: Setting) -> PrivacyPlan:
    """Noise 1.0 and clip 1.0, of a site sixteen batches large."""
    return PrivacyPlan(
        unit="patient", declared_size=16 * setting.patients, sample_rate=1 / 16, records_per_patient=setting.images,
        max_grad_norm=1.0, noise_multiplier=1.0, steps_per_round=1000, rounds=1, delta=1e-5,
    )  # fmt: skip
