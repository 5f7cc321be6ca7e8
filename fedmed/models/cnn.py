"""A small convolutional network for images, trained from nothing.

GroupNorm in place of BatchNorm: no statistic mixes the patients of a batch, so that a patient's gradient is the
patient's own. 105,097 parameters with one channel, 600 more for each further one.
"""

import itertools

import torch
from torch import Tensor, nn

from fedmed.config import AdapterConfig
from fedmed.data.dataset import SiteDataset
from fedmed.model import CnnModelConfig
from fedmed.models.activations import ActivationCache
from fedmed.models.adapters import freeze
from fedmed.models.classifier import Batch, Classifier, zero
from fedmed.models.row_linear import RowLinear
from fedmed.task import ImageTaskConfig

WIDTHS = (24, 48, 72, 96)
GROUPS = 8
# Grey values of 0 to 1 become -2 to 2: constants, as statistics of the data would be.
MIDDLE, SCALE = 0.5, 4.0


class CnnClassifier(Classifier):
    """Four blocks of convolution, GroupNorm and ReLU with pooling between them; the mean over what is left of the
    image; a head. The image's size matters to that mean alone, so that one adapter fits every size; in maps smaller
    than a kernel its outer weights meet padding alone, and stay as they were (`PatientGradients.live`).
    """

    def __init__(self, task: ImageTaskConfig, model: CnnModelConfig, adapter: AdapterConfig) -> None:
        super().__init__()
        del model
        first = _block(nn.Conv2d(task.slices, WIDTHS[0], kernel_size=5, stride=2, padding=2))
        others = [
            _block(nn.AvgPool2d(2), nn.Conv2d(a, b, kernel_size=3, padding=1))
            for a, b in itertools.pairwise(WIDTHS)
        ]
        self.blocks = nn.Sequential(first, *others)
        if adapter.kind == "head":
            freeze(self.blocks)
        self.head = RowLinear(WIDTHS[-1], 1)
        zero(self.head)

    def prepare(
        self, data: SiteDataset, *, cache: ActivationCache | None = None, alone: bool = False
    ) -> Batch:
        del cache, alone
        return {"images": torch.from_numpy(data.images)}

    def forward(self, images: Tensor) -> Tensor:
        """(records,) logits of (records, channels, size, size) images of 0 to 1."""
        values = (images - MIDDLE) * SCALE
        # Channels last in memory: pooling, convolutions and the gradients of patients are faster.
        values = values.to(memory_format=torch.channels_last)
        return self.head(self.blocks(values).mean(dim=(2, 3))).squeeze(-1)

    def drawn(self, name: str, parameter: nn.Parameter) -> bool:
        """Convolutions; GroupNorm starts as the identity, the head at zero."""
        return name.startswith("blocks.") and parameter.dim() == 4

    def inputs(self, task: ImageTaskConfig) -> dict[str, object]:
        shape = ["records", task.slices, task.image_size, task.image_size]
        return {"input": {"shape": shape, "low": 0.0, "high": 1.0}}


def _block(*layers: nn.Module) -> nn.Sequential:
    convolution = layers[-1]
    assert isinstance(convolution, nn.Conv2d)
    if convolution.bias is not None:
        nn.init.zeros_(convolution.bias)
    return nn.Sequential(*layers, nn.GroupNorm(GROUPS, convolution.out_channels), nn.ReLU())
