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

# In the names of parameters outside the blocks that come before the last of them.
BEFORE = ("embed", "downsampling", "pre_layrnorm")


def transformer_blocks(encoder: nn.Module) -> tuple[list[str], list[nn.Module]]:
    """The names of the encoder's blocks and the blocks, in the order in which they run: those of its longest
    ModuleList of one type, or, where it has stages (ConvNeXt), the layers of all of these.

    Raises:
        ModelError: there is none.
    """
    staged = [
        (f"{name}.layers.{index}", layer)
        for name, stage in _stages(encoder)
        for index, layer in enumerate(stage.get_submodule("layers").children())
    ]
    if staged:
        return [name for name, _ in staged], [layer for _, layer in staged]
    best: tuple[str, nn.ModuleList] | None = None
    for name, module in encoder.named_modules():
        uniform = isinstance(module, nn.ModuleList) and len({type(block) for block in module}) == 1
        if uniform and (best is None or len(module) > len(best[1])):
            best = (name, module)
    if best is None:
        raise ModelError(f"{type(encoder).__name__}: no list of transformer blocks found")
    return [f"{best[0]}.{index}" for index in range(len(best[1]))], list(best[1])


def first_trainable_block(encoder: nn.Module) -> int | None:
    """The index of the first block with a trainable parameter, the number of blocks where only what follows
    them is trained, or None where something before the blocks is trained, so that nothing may be stored."""
    _, blocks = transformer_blocks(encoder)
    inside = {id(p) for block in blocks for p in block.parameters()}
    names = [name for name, p in encoder.named_parameters() if p.requires_grad and id(p) not in inside]
    if any(part in name for name in names for part in BEFORE):
        return None
    for index, block in enumerate(blocks):
        if any(p.requires_grad for p in block.parameters()):
            return index
    return len(blocks)


def cut_point(encoder: nn.Module) -> tuple[bool, int | None]:
    """Whether only what follows the blocks is trained; and the block that a stored state enters, None where nothing
    frozen comes before the first trainable one."""
    _, blocks = transformer_blocks(encoder)
    first = first_trainable_block(encoder)
    return first == len(blocks), first if first is not None and 0 < first < len(blocks) else None


class _Reached(Exception):
    """The forward came to the block whose input is wanted: what follows need not be computed."""

    def __init__(self, state: Tensor) -> None:
        super().__init__()
        self.state = state


@torch.no_grad()
def capture(encoder: nn.Module, cut: int, inputs: dict[str, Tensor]) -> Tensor:
    """The hidden state that enters block `cut`: (batch, tokens, width), or (batch, width, rows, columns).

    Raises:
        ModelError: the forward does not come to that block.
    """
    _, blocks = transformer_blocks(encoder)

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        raise _Reached(args[0] if args else kwargs["hidden_states"])

    handle = blocks[cut].register_forward_pre_hook(hook, with_kwargs=True)
    try:
        encoder(**inputs)
    except _Reached as reached:
        return reached.state.detach().clone()
    finally:
        handle.remove()
    raise ModelError(f"{type(encoder).__name__}: its forward leaves out block {cut}")


@contextmanager
def replayed(encoder: nn.Module, cut: int, state: Tensor) -> Iterator[None]:
    """Within this context the encoder's forward starts at block `cut` from `state`.

    Of an image encoder the embeddings are not computed either: only the shape of `pixel_values` matters.
    """
    _, blocks = transformer_blocks(encoder)
    # In place of their own forward: whatever else a network reads of them (ModernBERT: attention_type) stays.
    passed: dict[nn.Module, Any] = dict.fromkeys(_skipped(encoder, cut), _pass_through)
    if getattr(encoder, "main_input_name", None) == "pixel_values":
        stem = next(m for name, m in encoder.named_modules() if name.rpartition(".")[2] == "embeddings")
        passed[stem] = lambda *_, **__: state

    def inject(
        _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if args:
            return (state, *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": state}

    handle = blocks[cut].register_forward_pre_hook(inject, with_kwargs=True)
    try:
        for module, forward in passed.items():
            vars(module)["forward"] = forward
        yield
    finally:
        handle.remove()
        for module in passed:
            vars(module).pop("forward", None)


def _pass_through(hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
    return hidden_states


def _stages(encoder: nn.Module) -> list[tuple[str, nn.Module]]:
    """The stages of a ConvNeXt, each with a list of layers behind a list that halves the image."""
    return [
        (name, module)
        for name, module in encoder.named_modules()
        if isinstance(getattr(module, "downsampling_layer", None), nn.ModuleList)
    ]


def _skipped(encoder: nn.Module, cut: int) -> list[nn.Module]:
    """Everything that runs between the embeddings and block `cut`."""
    _, blocks = transformer_blocks(encoder)
    found, start = blocks[:cut], 0
    for _, stage in _stages(encoder):
        if start <= cut:
            found += stage.get_submodule("downsampling_layer").children()
        start += len(list(stage.get_submodule("layers").children()))
    return found
