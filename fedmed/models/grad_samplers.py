"""Per-sample gradient rules for modules that hold parameters of their own and that Opacus does not know."""

from collections.abc import Callable

import torch
from opacus.grad_sample import register_grad_sampler
from torch import Tensor, nn
from transformers.models.vit.modeling_vit import ViTEmbeddings


@register_grad_sampler(ViTEmbeddings)
def vit_embeddings(layer: nn.Module, _activations: list[Tensor], backprops: Tensor) -> dict[nn.Parameter, Tensor]:
    """`output = [cls_token; patches] + position_embeddings`, so both gradients are slices of the output's.

    Args:
        backprops: (batch, 1 + patches, width).
    """
    rules: dict[str, Callable[[], Tensor]] = {
        "position_embeddings": lambda: backprops.unsqueeze(1),
        "cls_token": lambda: backprops[:, :1].unsqueeze(1),
        # Used only with masked patches, which no task here has.
        "mask_token": lambda: torch.zeros(len(backprops), *layer.mask_token.shape, dtype=backprops.dtype),
    }
    return {
        parameter: rules[name]()
        for name, parameter in layer.named_parameters(recurse=False)
        if parameter.requires_grad
    }
