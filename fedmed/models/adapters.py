"""Which parameters are trained and travel."""

import re
import warnings
from collections.abc import Callable

from torch import nn

from fedmed.config import AdapterConfig
from fedmed.errors import ModelError
from fedmed.models.prefix import transformer_blocks

# Attention projections by the names that BERT-, ViT-, CLIP- and Llama-like families give them; ConvNeXt has pointwise
# convolutions in their place.
DEFAULT_TARGETS = ("query", "value", "q_proj", "v_proj", "Wqkv", "pwconv1", "pwconv2")
# In the names of what `full` does not train: BERT's and ViT's pooler, which is not used; SigLIP's attention pooling and
# ConvNeXt's scales of a block, whose gradient for one patient no rule gives.
FROZEN = re.compile(r"pooler|(^|\.)head\.|layer_scale_parameter")


def freeze(module: nn.Module) -> None:
    """Freeze every parameter."""
    for parameter in module.parameters():
        parameter.requires_grad_(False)


def add_adapter(encoder: nn.Module, adapter: AdapterConfig, *, lora_targets: str = "") -> nn.Module:
    """The encoder with its trainable part marked: none for `head`, LoRA layers, or (almost) everything.

    Args:
        lora_targets: a pattern for the layers' names within a block; `adapter.targets` stands above it.

    Raises:
        ModelError: no layer has a target's name, or there are fewer blocks than `last_blocks`.
    """
    freeze(encoder)
    if adapter.kind == "head":
        return encoder
    if adapter.kind == "full":
        # Registers the rules that Opacus lacks; imported here, since it loads transformers' models.
        import fedmed.models.grad_samplers  # noqa: F401

        for name, parameter in encoder.named_parameters():
            # An embedding table's gradient per sample is huge.
            trained = not FROZEN.search(name) and (adapter.embeddings or "embeddings." not in name)
            parameter.requires_grad_(trained)
        return encoder
    from peft import LoraConfig, get_peft_model

    settings = LoraConfig(
        r=adapter.rank,
        lora_alpha=adapter.alpha,
        lora_dropout=0.0,
        target_modules=_targets(encoder, adapter, lora_targets),
    )
    with warnings.catch_warnings():
        # PEFT reads a setting by a name that transformers is about to drop.
        warnings.simplefilter("ignore", FutureWarning)
        adapted = get_peft_model(encoder, settings)
    for name, parameter in adapted.named_parameters():
        if "lora_A" in name:
            parameter.requires_grad_(adapter.kind == "lora")
    return adapted


def _targets(encoder: nn.Module, adapter: AdapterConfig, lora_targets: str) -> list[str]:
    prefixes, blocks = transformer_blocks(encoder)
    if adapter.last_blocks > len(blocks):
        raise ModelError(f"adapter.last_blocks={adapter.last_blocks}: the encoder has {len(blocks)} blocks")
    wanted = _wanted(adapter, lora_targets)
    first = len(blocks) - adapter.last_blocks
    names = [
        f"{prefix}.{name}"
        for prefix, block in zip(prefixes[first:], blocks[first:], strict=True)
        for name, module in block.named_modules()
        if isinstance(module, nn.Linear) and wanted(name)
    ]
    if not names:
        linear = sorted(
            {n.rpartition(".")[2] for n, m in blocks[first].named_modules() if isinstance(m, nn.Linear)}
        )
        asked = (
            f"model.lora_targets={lora_targets}"
            if lora_targets and not adapter.targets
            else f"adapter.targets={adapter.targets or list(DEFAULT_TARGETS)}"
        )
        raise ModelError(f"{asked}: no such layer; the blocks have {', '.join(linear)}")
    return names


def _wanted(adapter: AdapterConfig, lora_targets: str) -> Callable[[str], bool]:
    """Whether LoRA goes into the linear layer of this name within its block."""
    if lora_targets and not adapter.targets:
        pattern = re.compile(rf"(.*\.)?({lora_targets})")
        return lambda name: pattern.fullmatch(name) is not None
    return lambda name: name.rpartition(".")[2] in (adapter.targets or DEFAULT_TARGETS)
