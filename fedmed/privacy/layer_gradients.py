"""Each patient's gradient of a layer, from what the layer read and the gradient of what it wrote.

Opacus has a rule for many kinds of layers that gives each record's gradient; those for which that can be done cheaper
have one here, and it is loaded for the others alone. Nothing large is computed until a `Block` of patients asks for its
own.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedmed.errors import PrivacyError


@dataclass(frozen=True)
class Block:
    """Patients who follow one another and have as many records each, which follow one another.

    Attributes:
        first: the first record.
    """

    first: int
    patients: int
    records: int

    def of(self, values: Tensor) -> Tensor:
        """(patients, records, …) of (all records, …)."""
        own = values[self.first : self.first + self.patients * self.records]
        return own.unflatten(0, (self.patients, self.records))


# Where in a parameter a gradient can differ from zero; () is everywhere.
Region = tuple[slice, ...]


@dataclass(frozen=True)
class Product:
    """Of a weight matrix: the sum over places of an output's gradient times an input.

    Attributes:
        outputs: (records, out, places).
        inputs: (records, *in, *places), any strides.
        places: how many dimensions of `inputs` are places.
        region: of the weight, (out, *in).
    """

    outputs: Tensor
    inputs: Tensor
    places: int = 1
    region: Region = ()

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the region."""
        return (self.outputs.shape[1], *self._inputs().shape[1 : -self.places])

    def _inputs(self) -> Tensor:
        return self.inputs[(slice(None), *self.region[1:])] if self.region else self.inputs

    def write(self, block: Block, out: Tensor, *, add: bool) -> None:
        """Into or onto (patients, entries): one matrix product a patient, over the places of all its records."""
        left, right = _joined(block, self.outputs, 1), _joined(block, self._inputs(), self.places)
        matrix = out.unflatten(1, (left.shape[1], right.shape[1]))
        left, right = left.to(out.dtype), right.to(out.dtype).transpose(1, 2)
        torch.baddbmm(matrix, left, right, beta=int(add), out=matrix)


def _joined(block: Block, values: Tensor, places: int) -> Tensor:
    """(patients, width, records * places): without a copy, where the strides allow it."""
    own = block.of(values)
    widths = list(range(2, own.dim() - places))
    moved = own.permute(0, *widths, 1, *range(own.dim() - places, own.dim()))
    return moved.reshape(block.patients, math.prod(own.shape[n] for n in widths), -1)


@dataclass(frozen=True)
class Small:
    """Of a vector: what each record gives, computed already.

    Attributes:
        values: (records, entries).
    """

    values: Tensor
    region: Region = ()

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the parameter."""
        return tuple(self.values.shape[1:])

    def write(self, block: Block, out: Tensor, *, add: bool) -> None:
        """Into or onto (patients, entries)."""
        _write_sum(block.of(self.values), out, add)


@dataclass(frozen=True)
class Sampled:
    """By Opacus's rule, for the records of a block at a time.

    Attributes:
        shape: of the parameter.
        of: (patients * records, *shape) for a block.
    """

    shape: tuple[int, ...]
    of: Callable[[Block], Tensor]
    region: Region = ()

    def write(self, block: Block, out: Tensor, *, add: bool) -> None:
        """Into or onto (patients, entries)."""
        _write_sum(self.of(block).reshape(block.patients, block.records, -1), out, add)


def _write_sum(own: Tensor, out: Tensor, add: bool) -> None:
    if add:
        out += own.sum(dim=1)
    elif own.shape[1] == 1:
        out.copy_(own[:, 0])
    else:
        torch.sum(own, dim=1, out=out)


Gradient = Product | Small | Sampled
# The gradients of a layer's parameters from its input and its output's gradient, first dimension records. Those of
# parameters that are not trained may be among them.
Rule = Callable[[Any, Tensor, Tensor], dict[Tensor, Gradient]]


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


def layer_gradients(layer: nn.Module, inputs: list[Tensor], backprops: Tensor) -> dict[Tensor, Gradient]:
    """By the rule for the layer's type, else from each record's gradient; in float32 or better."""
    inputs, backprops = [_wide(value) for value in inputs], _wide(backprops)
    if type(layer) in RULES:
        return RULES[type(layer)](layer, inputs[0], backprops)
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
        return Sampled(tuple(p.shape), lambda block: sampled(block)[p])

    return {p: gradient(p) for p in layer.parameters(recurse=False) if p.requires_grad}


def linear(layer: nn.Linear, values: Tensor, backprops: Tensor) -> dict[Tensor, Gradient]:
    """
    Args:
        values: (records, …, in).
        backprops: (records, …, out).
    """
    outputs, inputs = (v.flatten(1, -2) if v.dim() > 2 else v[:, None] for v in (backprops, values))
    found: dict[Tensor, Gradient] = {}
    if layer.weight.requires_grad:
        found[layer.weight] = Product(outputs.transpose(1, 2), inputs.transpose(1, 2))
    if layer.bias is not None and layer.bias.requires_grad:
        found[layer.bias] = Small(outputs.sum(dim=1))
    return found


def conv2d(layer: nn.Conv2d, images: Tensor, backprops: Tensor) -> dict[Tensor, Gradient]:
    """
    Args:
        images: (records, channels, rows, columns).
        backprops: (records, width, rows, columns).
    """
    if layer.groups != 1:
        return _grouped(layer, images, backprops)
    found: dict[Tensor, Gradient] = {}
    if layer.weight.requires_grad:
        found[layer.weight] = _patches(layer, images, backprops)
    if layer.bias is not None and layer.bias.requires_grad:
        found[layer.bias] = Small(backprops.flatten(2).sum(dim=2))
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
            tuple(layer.weight.shape),
            lambda block: _depthwise(layer, *(block.of(v).flatten(0, 1) for v in (images, backprops))),
        )
    if layer.bias is not None and layer.bias.requires_grad:
        found[layer.bias] = Small(backprops.flatten(2).sum(dim=2))
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


def _patches(layer: nn.Conv2d, images: Tensor, backprops: Tensor) -> Product:
    """Outputs' gradients times a view (records, channels, *kernel, *places) of the padded images.

    Where the kernel moves by one, places are those of the padded rows one after the other, so that a patch is copied
    in one piece: at the end of a row it reads on in the next, where the output's gradient is taken to be zero.
    """
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    around = layer._reversed_padding_repeated_twice
    padded = functional.pad(images, around, mode=mode).contiguous()
    record, channel, row, column = padded.stride()
    kernel = (row * layer.dilation[0], column * layer.dilation[1])
    places: tuple[int, ...] = tuple(backprops.shape[2:])
    steps: tuple[int, ...] = (row * layer.stride[0], column * layer.stride[1])
    region = _live(layer, images, places, around) if mode == "constant" else ()
    if layer.stride == (1, 1):
        backprops = functional.pad(backprops, (0, row - places[1]))
        places, steps = ((places[0] - 1) * row + places[1],), (1,)
    shape = (*padded.shape[:2], *layer.kernel_size, *places)
    patches = padded.as_strided(shape, (record, channel, *kernel, *steps), padded.storage_offset())
    return Product(backprops.flatten(2)[..., : math.prod(places)], patches, len(places), region)


def _live(layer: nn.Conv2d, images: Tensor, places: tuple[int, ...], around: list[int]) -> Region:
    """Of the weights, those that meet anything but zeros, which padded a map smaller than the kernel."""
    # Of rows and of columns: a place's pixel is at place * stride + weight * dilation - padding.
    live = [
        [
            weight
            for weight in range(layer.kernel_size[n])
            if any(
                0
                <= place * layer.stride[n] + weight * layer.dilation[n] - around[2 - 2 * n]
                < images.shape[2 + n]
                for place in range(places[n])
            )
        ]
        for n in (0, 1)
    ]
    return (slice(None), slice(None), *(slice(own[0], own[-1] + 1) for own in live))


def group_norm(layer: nn.GroupNorm, values: Tensor, backprops: Tensor) -> dict[Tensor, Gradient]:
    """From two sums a channel, as PyTorch's own backward pass takes them.

    Args:
        values: (records, channels, …).
        backprops: (records, channels, …).
    """
    records, channels = values.shape[:2]
    groups = layer.num_groups
    _, mean, deviation = torch.native_group_norm(
        values.contiguous(), None, None, records, channels, values[0, 0].numel(), groups, layer.eps
    )
    total = backprops.flatten(2).sum(dim=2)
    product = (backprops * values).flatten(2).sum(dim=2)
    centred = product.view(records, groups, -1) - mean[:, :, None] * total.view(records, groups, -1)
    weight = (centred * deviation[:, :, None]).view(records, channels)
    return {layer.weight: Small(weight), layer.bias: Small(total)}


RULES: dict[type[nn.Module], Rule] = {nn.Linear: linear, nn.Conv2d: conv2d, nn.GroupNorm: group_norm}
