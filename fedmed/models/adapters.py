"""Which parameters are trained and travel."""

from torch import nn

from fedmed.config import AdapterConfig
from fedmed.errors import ModelError
from fedmed.models.prefix import transformer_blocks

# Attention projections by the names that BERT-, ViT-, CLIP- and Llama-like families give them.
DEFAULT_TARGETS = ("query", "value", "q_proj", "v_proj", "Wqkv")


def freeze(module: nn.Module) -> None:
    """Freeze every parameter."""
    for parameter in module.parameters():
        parameter.requires_grad_(False)


def add_adapter(encoder: nn.Module, adapter: AdapterConfig) -> nn.Module:
    """The encoder with its trainable part marked: none for `head`, LoRA layers, or (almost) everything.

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
            # The pooler's output is not used; an embedding table's gradient per sample is huge.
            trained = "pooler" not in name and (adapter.embeddings or "embeddings." not in name)
            parameter.requires_grad_(trained)
        return encoder
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(
        encoder,
        LoraConfig(
            r=adapter.rank,
            lora_alpha=adapter.alpha,
            lora_dropout=0.0,
            target_modules=_targets(encoder, adapter),
        ),
    )
    for name, parameter in adapted.named_parameters():
        if "lora_A" in name:
            parameter.requires_grad_(adapter.kind == "lora")
    return adapted


def _targets(encoder: nn.Module, adapter: AdapterConfig) -> list[str]:
    prefix, blocks = transformer_blocks(encoder)
    if adapter.last_blocks > len(blocks):
        raise ModelError(f"adapter.last_blocks={adapter.last_blocks}: the encoder has {len(blocks)} blocks")
    wanted = tuple(adapter.targets) or DEFAULT_TARGETS
    first = len(blocks) - adapter.last_blocks
    names = [
        f"{prefix}.{index}.{name}"
        for index in range(first, len(blocks))
        for name, module in blocks[index].named_modules()
        if isinstance(module, nn.Linear) and name.rpartition(".")[2] in wanted
    ]
    if not names:
        linear = sorted(
            {n.rpartition(".")[2] for n, m in blocks[first].named_modules() if isinstance(m, nn.Linear)}
        )
        raise ModelError(
            f"adapter.targets={list(wanted)}: no such layer; the blocks have {', '.join(linear)}"
        )
    return names
