"""Per-sample gradient rules that Opacus lacks, or that differ from PyTorch's gradient."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.models.convnext.modeling_convnext import ConvNextLayerNorm
from transformers.models.convnextv2.modeling_convnextv2 import ConvNextV2GRN, ConvNextV2LayerNorm
from transformers.models.dinov2.modeling_dinov2 import Dinov2LayerScale
from transformers.models.dinov2_with_registers.modeling_dinov2_with_registers import (
    Dinov2WithRegistersLayerScale,
)
from transformers.models.dinov3_vit.modeling_dinov3_vit import DINOv3ViTLayerScale
from transformers.models.vit.modeling_vit import ViTEmbeddings

from fedmed.privacy.layer_gradients import sampler


@sampler(ViTEmbeddings)
def vit_embeddings(
    layer: nn.Module, _activations: list[Tensor], backprops: Tensor
) -> dict[nn.Parameter, Tensor]:
    """`output = [cls_token; patches] + position_embeddings`, so both gradients are slices of the output's.

    Args:
        backprops: (batch, 1 + patches, width).
    """
    rules: dict[str, Callable[[], Tensor]] = {
        "position_embeddings": lambda: backprops.unsqueeze(1),
        "cls_token": lambda: backprops[:, :1].unsqueeze(1),
        # Used only with masked patches, which no task here has.
        "mask_token": lambda: backprops.new_zeros(len(backprops), *layer.get_parameter("mask_token").shape),
    }
    return {
        parameter: rules[name]()
        for name, parameter in layer.named_parameters(recurse=False)
        if parameter.requires_grad
    }


@sampler(nn.Embedding)
def embedding(
    layer: nn.Embedding, activations: list[Tensor], backprops: Tensor
) -> dict[nn.Parameter, Tensor]:
    """Opacus's rule, with no gradient for the padding token: PyTorch gives it none."""
    from opacus.grad_sample.embedding import compute_embedding_grad_sample

    gradients: dict[nn.Parameter, Tensor] = compute_embedding_grad_sample(layer, activations, backprops)
    if layer.padding_idx is not None:
        for gradient in gradients.values():
            gradient[:, layer.padding_idx] = 0
    return gradients


@sampler(nn.LayerNorm, ConvNextLayerNorm, ConvNextV2LayerNorm)
def layer_norm(
    layer: nn.LayerNorm, activations: list[Tensor], backprops: Tensor
) -> dict[nn.Parameter, Tensor]:
    """Opacus's rule, also without a bias (ModernBERT), and for the channels of an image (ConvNeXt).

    Args:
        backprops: (batch, …, width), or (batch, width, rows, columns) where the layer says `channels_first`.
    """
    values = activations[0]
    if getattr(layer, "data_format", "channels_last") == "channels_first":
        values, backprops = values.movedim(1, -1), backprops.movedim(1, -1)
    between = tuple(range(1, values.dim() - len(layer.normalized_shape)))
    found: dict[nn.Parameter, Tensor] = {}
    if layer.weight.requires_grad:
        normal = functional.layer_norm(values, layer.normalized_shape, eps=layer.eps)
        found[layer.weight] = _sum(normal * backprops, between)
    if layer.bias is not None and layer.bias.requires_grad:
        found[layer.bias] = _sum(backprops, between)
    return found


@sampler(Dinov2LayerScale, Dinov2WithRegistersLayerScale, DINOv3ViTLayerScale)
def layer_scale(layer: nn.Module, activations: list[Tensor], backprops: Tensor) -> dict[nn.Parameter, Tensor]:
    """`output = input * lambda1`.

    Args:
        backprops: (batch, tokens, width).
    """
    return {layer.get_parameter("lambda1"): (activations[0] * backprops).sum(dim=1)}


@sampler(ConvNextV2GRN)
def response_norm(
    layer: nn.Module, activations: list[Tensor], backprops: Tensor
) -> dict[nn.Parameter, Tensor]:
    """`output = weight * normalised(input) + bias + input`.

    Args:
        backprops: (batch, rows, columns, width).
    """
    values = activations[0]
    norms = torch.linalg.vector_norm(values, dim=(1, 2), keepdim=True)
    normal = values * norms / (norms.mean(dim=-1, keepdim=True) + 1e-6)
    return {
        layer.get_parameter("weight"): (normal * backprops).sum(dim=(1, 2))[:, None, None, None],
        layer.get_parameter("bias"): backprops.sum(dim=(1, 2))[:, None, None, None],
    }


def _sum(values: Tensor, dims: tuple[int, ...]) -> Tensor:
    # Over no dimension, torch would sum over all.
    return values.sum(dim=dims) if dims else values
