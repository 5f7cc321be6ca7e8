"""Patients' gradients of parameters before they are computed: what they are products or sums of.

A block of patients computes its own where and when they are clipped (`fedmed.privacy.clipping`), so that no more than
that block's are ever held.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


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


# The part of a parameter outside of which every gradient is zero, whatever the data; () is all of it.
Region = tuple[slice, ...]
# Of parameters; what is not there is live everywhere.
Live = Mapping[Tensor, Region]


@dataclass(frozen=True)
class Place:
    """Where the entries of a gradient belong.

    Attributes:
        order: of the dimensions of the region, in which the entries are laid out; () leaves them as they are.
    """

    region: Region = ()
    order: tuple[int, ...] = ()

    def of(self, values: Tensor) -> Tensor:
        """A view of the region of values in the shape of the parameter, in this order."""
        part = values[self.region]
        return part.permute(self.order) if self.order else part


@dataclass(frozen=True)
class Product:
    """Of a weight matrix, or of a kernel's matrices: sums over positions of one side's row times the other's.

    Attributes:
        left: (records, positions, rows).
        right: (records, positions, columns), the last `reach` of them zero.
        offsets: for each matrix how many positions further the left side is read, at most `reach`. It is read beyond
            a record's end where the right side is zero.
    """

    left: Tensor
    right: Tensor
    place: Place = Place()
    offsets: tuple[int, ...] = (0,)
    reach: int = 0

    @property
    def shape(self) -> tuple[int, int]:
        """(matrices, entries of each)."""
        return len(self.offsets), self.left.shape[2] * self.right.shape[2]

    def write(self, block: Block, out: Tensor, *, add: bool) -> None:
        """Into or onto (matrices, patients, entries), contiguous: over the positions of all records of a patient."""
        left, right = (block.of(values).flatten(1, 2).to(out.dtype) for values in (self.left, self.right))
        span = left.shape[1] - self.reach
        for offset, matrices in zip(
            self.offsets, out.unflatten(2, (left.shape[2], right.shape[2])), strict=True
        ):
            pair = left[:, offset : offset + span].transpose(1, 2), right[:, :span]
            if add:
                matrices.baddbmm_(*pair)
            else:
                torch.bmm(*pair, out=matrices)


@dataclass(frozen=True)
class Small:
    """Of a vector: what each record gives, computed already.

    Attributes:
        values: (records, entries).
    """

    values: Tensor
    place: Place = Place()

    @property
    def shape(self) -> tuple[int, int]:
        """(1, entries)."""
        return 1, self.values.shape[1]

    def write(self, block: Block, out: Tensor, *, add: bool) -> None:
        """Into or onto (1, patients, entries)."""
        _write_sum(block.of(self.values), out[0], add)


@dataclass(frozen=True)
class Sampled:
    """By a rule that gives each record's gradient, for the records of a block at a time.

    Attributes:
        entries: of the parameter.
        of: (patients * records, *shape) for a block.
    """

    entries: int
    of: Callable[[Block], Tensor]
    place: Place = Place()

    @property
    def shape(self) -> tuple[int, int]:
        """(1, entries)."""
        return 1, self.entries

    def write(self, block: Block, out: Tensor, *, add: bool) -> None:
        """Into or onto (1, patients, entries)."""
        _write_sum(self.of(block).reshape(block.patients, block.records, -1), out[0], add)


def _write_sum(own: Tensor, out: Tensor, add: bool) -> None:
    if add:
        out += own.sum(dim=1)
    elif own.shape[1] == 1:
        out.copy_(own[:, 0])
    else:
        torch.sum(own, dim=1, out=out)


Gradient = Product | Small | Sampled


class Memory:
    """Kept from step to step: fresh pages cost as much as what is written to them."""

    def __init__(self) -> None:
        self._held = torch.empty(0)

    def of(self, entries: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """(entries,), not initialised; the next are written over them."""
        if self._held.numel() < entries or self._held.dtype != dtype or self._held.device != device:
            self._held = torch.empty(entries, dtype=dtype, device=device)
        return self._held[:entries]


@dataclass(frozen=True, kw_only=True)
class BlockGradients:
    """The gradients of a block's patients, one parameter after the other.

    Attributes:
        sums: of each parameter: what is added up to its gradient, all of one shape.
        dtype: float32 or better.
    """

    block: Block
    sums: Sequence[Sequence[Gradient]]
    dtype: torch.dtype
    device: torch.device
    memory: Memory

    @classmethod
    def at_hand(cls, parts: Sequence[Tensor]) -> "BlockGradients":
        """Of (patients, entries) parts that are computed already."""
        first = parts[0]
        return cls(
            block=Block(0, len(first), 1), sums=[[Small(part)] for part in parts],
            dtype=first.dtype, device=first.device, memory=Memory(),
        )  # fmt: skip

    @property
    def patients(self) -> int:
        return self.block.patients

    @property
    def entries(self) -> int:
        """Of one patient."""
        return sum(math.prod(own[0].shape) for own in self.sums)

    @torch.no_grad()
    def computed(self) -> list[Tensor]:
        """Parts, each (pieces, patients, entries): all patients' at once; the next are written over them."""
        shapes = [own[0].shape for own in self.sums]
        sizes = [self.patients * math.prod(shape) for shape in shapes]
        parts = [
            flat.view(pieces, self.patients, entries)
            for flat, (pieces, entries) in zip(
                self.memory.of(sum(sizes), self.dtype, self.device).split(sizes), shapes, strict=True
            )
        ]
        for part, own in zip(parts, self.sums, strict=True):
            for number, gradient in enumerate(own):
                gradient.write(self.block, part, add=number > 0)
        return parts
