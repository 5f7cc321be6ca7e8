"""Per-sample gradient rules that Opacus lacks, or that differ from PyTorch's gradient."""

from collections.abc import Callable

from opacus.grad_sample import register_grad_sampler
from opacus.grad_sample.embedding import compute_embedding_grad_sample
from torch import Tensor, nn
from transformers.models.vit.modeling_vit import ViTEmbeddings


@register_grad_sampler(ViTEmbeddings)
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


@register_grad_sampler(nn.Embedding)
def embedding(
    layer: nn.Embedding, activations: list[Tensor], backprops: Tensor
) -> dict[nn.Parameter, Tensor]:
    """Opacus's rule, with no gradient for the padding token: PyTorch gives it none."""
    gradients = compute_embedding_grad_sample(layer, activations, backprops)
    if layer.padding_idx is not None:
        for gradient in gradients.values():
            gradient[:, layer.padding_idx] = 0
    return gradients
