"""Each patient's gradient of a layer, from what the layer read and the gradient of what it wrote.

Opacus has a rule for many kinds of layers that gives each record's gradient; those for which that can be done cheaper
have one here, and it is loaded for the others alone. Nothing large is computed here
(`fedmed.privacy.block_gradients`).
"""

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedmed.errors import PrivacyError
from fedmed.privacy.block_gradients import Block, Gradient, Live, Place, Product, Region, Sampled, Small

# A convolution of fewer channels is one product for all places of its kernel: one for each would be too small.
FEW_CHANNELS = 8
_WHOLE = (slice(None), slice(None))


# The gradients of a layer's parameters from all that it read, with what `REMEMBERED` adds, and its output's gradient,
# first dimension records. Those of parameters that are not trained may be among them.
Rule = Callable[[Any, list[Tensor], Tensor, Live], dict[Tensor, Gradient]]


# Each record's gradient of a layer's trained parameters, as Opacus's rules give it: from the layer, all that it read
# and its output's gradient, first dimension records; by parameter (records, *shape).
Sampler = Callable[[Any, list[Tensor], Tensor], dict[Any, Tensor]]
SAMPLERS: dict[type[nn.Module], Sampler] = {}


def sampler(*kinds: type[nn.Module]) -> Callable[[Sampler], Sampler]:
    """Registers a rule for kinds of layers that Opacus lacks, or where its rule is not PyTorch's gradient."""

    def register(rule: Sampler) -> Sampler:
        SAMPLERS.update(dict.fromkeys(kinds, rule))
        return rule

    return register


def has_rule(kind: type[nn.Module]) -> bool:
    """Whether `layer_gradients` knows this kind of layer."""
    return kind in RULES or _sampler(kind) is not None


def layer_gradients(
    layer: nn.Module, inputs: list[Tensor], backprops: Tensor, live: Live
) -> dict[Tensor, Gradient]:
    """By the rule for the layer's type, else from each record's gradient; in float32 or better."""
    inputs, backprops = [_wide(value) for value in inputs], _wide(backprops)
    if type(layer) in RULES:
        return RULES[type(layer)](layer, inputs, backprops, live)
    return _by_record(layer, inputs, backprops)


def _wide(values: Tensor) -> Tensor:
    return values.float() if values.dtype in (torch.bfloat16, torch.float16) else values


def _sampler(kind: type[nn.Module]) -> Sampler | None:
    if kind in SAMPLERS:
        return SAMPLERS[kind]
    # Loads scipy and torch.distributed: two seconds that most runs need not spend.
    from opacus.grad_sample import GradSampleModule

    known: dict[type[nn.Module], Sampler] = GradSampleModule.GRAD_SAMPLERS
    return known.get(kind)


def _by_record(layer: nn.Module, inputs: list[Tensor], backprops: Tensor) -> dict[Tensor, Gradient]:
    rule = _sampler(type(layer))
    assert rule is not None, f"check_sound lets no trainable {type(layer).__name__} pass"

    @lru_cache(maxsize=1)
    def sampled(block: Block) -> dict[Tensor, Tensor]:
        own = [block.of(values).flatten(0, 1) for values in (*inputs, backprops)]
        return rule(layer, own[:-1], own[-1])

    def gradient(p: nn.Parameter) -> Sampled:
        return Sampled(p.numel(), lambda block: sampled(block)[p])

    return {p: gradient(p) for p in layer.parameters(recurse=False) if p.requires_grad}


def linear(layer: nn.Linear, inputs: list[Tensor], backprops: Tensor, live: Live) -> dict[Tensor, Gradient]:
    """
    Args:
        inputs: (records, …, in).
        backprops: (records, …, out).
    """
    del live
    outputs, values = (v.flatten(1, -2) if v.dim() > 2 else v[:, None] for v in (backprops, inputs[0]))
    found: dict[Tensor, Gradient] = {}
    if layer.weight.requires_grad:
        found[layer.weight] = Product(outputs, values)
    if layer.bias is not None and layer.bias.requires_grad:
        found[layer.bias] = Small(outputs.sum(dim=1))
    return found


def conv2d(layer: nn.Conv2d, inputs: list[Tensor], backprops: Tensor, live: Live) -> dict[Tensor, Gradient]:
    """
    Args:
        inputs: (records, channels, rows, columns).
        backprops: (records, width, rows, columns).
    """
    [images] = inputs
    if layer.groups != 1:
        return _grouped(layer, images, backprops)
    found: dict[Tensor, Gradient] = {}
    if layer.weight.requires_grad:
        found[layer.weight] = _kernel(layer, images, backprops, live.get(layer.weight, ()))
    if layer.bias is not None and layer.bias.requires_grad:
        found[layer.bias] = Small(backprops.sum(dim=(2, 3)))
    return found


def _grouped(layer: nn.Conv2d, images: Tensor, backprops: Tensor) -> dict[Tensor, Gradient]:
    if layer.padding_mode != "zeros":
        # Opacus's rule pads with zeros all the same.
        raise PrivacyError(
            f"Conv2d: groups with padding_mode={layer.padding_mode}; freeze it, or pad with zeros"
        )
    if not layer.groups == layer.in_channels == layer.out_channels or isinstance(layer.padding, str):
        # Opacus reads the memory of an image as if its channels came first (ConvNeXt has them last).
        return _by_record(layer, [images.contiguous()], backprops)
    found: dict[Tensor, Gradient] = {}
    if layer.weight.requires_grad:
        found[layer.weight] = Sampled(
            layer.weight.numel(),
            lambda block: _depthwise(layer, *(block.of(v).flatten(0, 1) for v in (images, backprops))),
        )
    if layer.bias is not None and layer.bias.requires_grad:
        found[layer.bias] = Small(backprops.sum(dim=(2, 3)))
    return found


def _depthwise(layer: nn.Conv2d, images: Tensor, backprops: Tensor) -> Tensor:
    """(records, channels, 1, *kernel): each channel by itself, one place of the kernel after the other."""
    assert not isinstance(layer.padding, str)
    (down, across), (step, stride), (far, wide) = layer.padding, layer.stride, layer.dilation
    padded = functional.pad(images, (across, across, down, down))
    rows, columns = (
        (size - 1) * by + 1 for size, by in zip(backprops.shape[2:], (step, stride), strict=True)
    )
    places = [
        torch.einsum(
            "nchw,nchw->nc",
            padded[:, :, far * i : far * i + rows : step, wide * j : wide * j + columns : stride],
            backprops,
        )
        for i in range(layer.kernel_size[0])
        for j in range(layer.kernel_size[1])
    ]
    return torch.stack(places, dim=2).view(len(images), *layer.weight.shape)


def _kernel(layer: nn.Conv2d, images: Tensor, backprops: Tensor, region: Region) -> Product:
    """Where the kernel moves by one, a matrix (channels, width) for each of its places.

    Images are read with their channels last. What a place of the kernel meets is then the padded image some positions
    further, so that nothing is copied: an output's gradient is zero where that lies beyond a row's end.
    """
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    padded = functional.pad(images, layer._reversed_padding_repeated_twice, mode=mode)
    if layer.stride != (1, 1) or layer.in_channels < FEW_CHANNELS:
        return _patches(layer, padded.contiguous(), backprops, region)
    padded = padded.permute(0, 2, 3, 1).contiguous()
    columns, (down, across) = padded.shape[2], layer.dilation
    last = (layer.kernel_size[0] - 1) * down, (layer.kernel_size[1] - 1) * across
    outputs = functional.pad(backprops.permute(0, 2, 3, 1), (0, 0, 0, last[1], 0, last[0])).contiguous()
    own = [range(size)[part] for size, part in zip(layer.kernel_size, region[2:] or _WHOLE, strict=True)]
    offsets = tuple(i * down * columns + j * across for i in own[0] for j in own[1])
    reach = last[0] * columns + last[1]
    return Product(padded.flatten(1, 2), outputs.flatten(1, 2), Place(region, (2, 3, 1, 0)), offsets, reach)


def _patches(layer: nn.Conv2d, padded: Tensor, backprops: Tensor, region: Region) -> Product:
    """One matrix, (channels, *kernel, width), from what each position meets."""
    record, channel, row, column = padded.stride()
    shape = (*padded.shape[:2], *layer.kernel_size, *backprops.shape[2:])
    kernel = row * layer.dilation[0], column * layer.dilation[1]
    steps = row * layer.stride[0], column * layer.stride[1]
    patches = padded.as_strided(shape, (record, channel, *kernel, *steps))
    patches = patches[(slice(None), slice(None), *(region[2:] or _WHOLE))].flatten(4).flatten(1, 3)
    outputs = backprops.flatten(2).transpose(1, 2)
    return Product(patches.transpose(1, 2), outputs, Place(region, (1, 2, 3, 0)))


def may_be_dead(layer: nn.Conv2d) -> bool:
    """Whether some of the weights may meet zeros alone."""
    return layer.groups == 1 and layer.padding_mode == "zeros" and any(layer._reversed_padding_repeated_twice)


def live_kernel(layer: nn.Conv2d, size: Sequence[int], places: Sequence[int]) -> Region:
    """Of the weights of a layer that `may_be_dead`, those that meet anything but zeros, which padded a map smaller than
    the kernel.

    Args:
        size: of the maps that the layer reads: rows and columns.
        places: of those that it writes.
    """
    around = layer._reversed_padding_repeated_twice
    # Of rows and of columns: a place's pixel is at place * stride + weight * dilation - padding.
    live = [
        [
            weight
            for weight in range(layer.kernel_size[n])
            if any(
                0 <= place * layer.stride[n] + weight * layer.dilation[n] - around[2 - 2 * n] < size[n]
                for place in range(places[n])
            )
        ]
        for n in (0, 1)
    ]
    return (slice(None), slice(None), *(slice(own[0], own[-1] + 1) for own in live))


def group_norm(
    layer: nn.GroupNorm, inputs: list[Tensor], backprops: Tensor, live: Live
) -> dict[Tensor, Gradient]:
    """From two sums a channel, as PyTorch's own backward pass takes them.

    Args:
        inputs: (records, channels, …) and, where the forward pass kept them, each group's mean and the inverse of its
            deviation, (records, groups).
        backprops: (records, channels, …).
    """
    del live
    values, *statistics = inputs
    records, channels = values.shape[:2]
    groups = layer.num_groups
    if not statistics:
        _, *statistics = torch.native_group_norm(
            values.contiguous(), None, None, records, channels, values[0, 0].numel(), groups, layer.eps
        )
    mean, inverse = statistics
    last = values.movedim(1, -1), backprops.movedim(1, -1)
    if _on_cpu(*last, mean, inverse) and values.dim() > 2:
        from fedmed.privacy import compiled

        sides = [side.flatten(1, -2).numpy() for side in last]
        weight, total = torch.empty(records, channels), torch.empty(records, channels)
        compiled.group_norm(*sides, mean.numpy(), inverse.numpy(), weight.numpy(), total.numpy())
        return {layer.weight: Small(weight), layer.bias: Small(total)}
    places = tuple(range(2, values.dim()))
    total = backprops.sum(dim=places)
    product = (backprops * values).sum(dim=places)
    centred = product.view(records, groups, -1) - mean[:, :, None] * total.view(records, groups, -1)
    weight = (centred * inverse[:, :, None]).view(records, channels)
    return {layer.weight: Small(weight), layer.bias: Small(total)}


def _on_cpu(*values: Tensor) -> bool:
    """Whether compiled functions can read them."""
    return all(
        one.device.type == "cpu" and one.dtype == torch.float32 and one.is_contiguous() for one in values
    )


def _group_statistics(layer: nn.GroupNorm, values: Tensor, output: Tensor) -> list[Tensor]:
    """What autograd keeps of the forward pass, in float32 or better; nothing, where it kept that otherwise."""
    kept = [getattr(output.grad_fn, name, None) for name in ("_saved_result1", "_saved_result2")]
    shape, kinds = (len(values), layer.num_groups), (torch.float32, torch.float64)
    found = [one for one in kept if isinstance(one, Tensor) and one.shape == shape and one.dtype in kinds]
    return found if len(found) == 2 else []


RULES: dict[type[nn.Module], Rule] = {nn.Linear: linear, nn.Conv2d: conv2d, nn.GroupNorm: group_norm}
# What a rule reads beside what the layer read, from that and what it wrote: first dimension records.
REMEMBERED: dict[type[nn.Module], Callable[[Any, Tensor, Tensor], list[Tensor]]] = {
    nn.GroupNorm: _group_statistics
}
