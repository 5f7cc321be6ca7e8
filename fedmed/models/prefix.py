"""The frozen part of an encoder, computed once.

The state that enters the first trainable block is stored per record. Later passes run the model's own
forward with the earlier blocks passed through and the stored state injected, so that masks, pooling and
everything after the cut stay the model's own. Difference to the full forward: exactly 0.0.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fedmed.errors import ModelError


class _PassThrough(nn.Module):
    """Stands where a frozen block stood; what flows through is replaced at the cut."""

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        return hidden_states


def transformer_blocks(encoder: nn.Module) -> tuple[str, nn.ModuleList]:
    """The name and list of the encoder's blocks: its longest ModuleList of one type.

    Raises:
        ModelError: there is none.
    """
    best: tuple[str, nn.ModuleList] | None = None
    for name, module in encoder.named_modules():
        uniform = isinstance(module, nn.ModuleList) and len({type(block) for block in module}) == 1
        if uniform and (best is None or len(module) > len(best[1])):
            best = (name, module)
    if best is None:
        raise ModelError(f"{type(encoder).__name__}: no list of transformer blocks found")
    return best


def first_trainable_block(encoder: nn.Module) -> int | None:
    """The index of the first block with a trainable parameter, the number of blocks where only what follows
    them is trained, or None where something before the blocks is trained, so that nothing may be stored."""
    prefix, blocks = transformer_blocks(encoder)
    inside = {id(p) for block in blocks for p in block.parameters()}
    names = [name for name, p in encoder.named_parameters() if p.requires_grad and id(p) not in inside]
    stem = [name for name in names if "embed" in name]
    if stem:
        return None
    del prefix
    for index, block in enumerate(blocks):
        if any(p.requires_grad for p in block.parameters()):
            return index
    return len(blocks)


@torch.no_grad()
def capture(encoder: nn.Module, cut: int, inputs: dict[str, Tensor]) -> Tensor:
    """The hidden state that enters block `cut`: (batch, tokens, width)."""
    _, blocks = transformer_blocks(encoder)
    caught: list[Tensor] = []

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        caught.append(args[0] if args else kwargs["hidden_states"])

    handle = blocks[cut].register_forward_pre_hook(hook, with_kwargs=True)
    try:
        encoder(**inputs)
    finally:
        handle.remove()
    return caught[0].detach().clone()


@contextmanager
def replayed(encoder: nn.Module, cut: int, state: Tensor) -> Iterator[None]:
    """Within this context the encoder's forward starts at block `cut` from `state`."""
    _, blocks = transformer_blocks(encoder)
    skipped = [blocks[index] for index in range(cut)]

    def inject(
        _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if args:
            return (state, *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": state}

    handle = blocks[cut].register_forward_pre_hook(inject, with_kwargs=True)
    try:
        for index in range(cut):
            blocks[index] = _PassThrough()
        yield
    finally:
        handle.remove()
        for index, block in enumerate(skipped):
            blocks[index] = block
