"""An accelerator that is none: its tensors compute on the processor, and everything that would wait is noted.

PyTorch sees tensors of a device of its own, so that whatever would fail on a real accelerator, for example adding a
tensor of the host to one of the device, fails here too; the figures are the processor's. What cannot be seen here:
time, an accelerator's own rounding, and whether a copy is still under way. The registration is for good: a process of
its own has to make it, before the first backward pass.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

# Operations that hand a value to the host.
ASKING = (
    "_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero", "masked_select", "_unique2", "unique_dim",
    "unique_consecutive", "bincount", "repeat_interleave",
)  # fmt: skip


class _Backend(backend_registration._DummyBackendModule):
    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]


backend_registration._setup_privateuseone_for_python_backend("pretended", backend_module=_Backend())
PRETENDED = torch.device("pretended", 0)


class Away(Tensor):
    """A tensor of the pretended device."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> "Away":
        made = Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype,
            device=PRETENDED,
        )  # fmt: skip
        made.inner = inner
        return made

    def untyped_storage(self) -> torch.UntypedStorage:
        """Whose address says which tensors share it."""
        return self.inner.untyped_storage()

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert _watches, "used outside of `pretended`"
        return _watches[-1].run(function, args, kwargs or {})


@dataclass
class Watch:
    """What was seen of the traffic between host and device.

    Attributes:
        waits: what made the host wait for the device, or the device for the host.
        copies: how many tensors went to the device.
    """

    waits: list[str] = field(default_factory=list)
    copies: int = 0
    # By their address; kept, so that no other tensor gets it.
    _pinned: dict[int, Tensor] = field(default_factory=dict)

    def run(self, function: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        name = function.name().removeprefix("aten::").partition(".")[0]
        tensors = [one for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)]
        away = [one for one in tensors if isinstance(one, Away)]
        here = [one for one in tensors if not isinstance(one, Away)]
        target = kwargs.get("device")
        to_device = bool(away) if target is None else torch.device(target).type == PRETENDED.type
        if target is not None:
            kwargs = kwargs | {"device": torch.device("cpu")}
        pinned = bool(kwargs.pop("pin_memory", False))
        self._look(name, args, kwargs, away, here, to_device)
        known = {id(one.inner): one for one in away}
        args, kwargs = tree_map(_inner, (args, kwargs))
        found = function(*args, **kwargs)
        if pinned:
            self._pinned[found.untyped_storage().data_ptr()] = found
        if not to_device:
            return found

        def away_of(one: Any) -> Any:
            if not isinstance(one, Tensor):
                return one
            return known[id(one)] if id(one) in known else Away(one)

        return tree_map(away_of, found)

    def _look(
        self,
        name: str,
        args: Any,
        kwargs: dict[str, Any],
        away: list[Away],
        here: list[Tensor],
        to_device: bool,
    ) -> None:
        if name == "_to_copy" and to_device and here:
            self._sent(here[0], non_blocking=kwargs.get("non_blocking", False))
        elif name == "copy_" and away and here:
            if isinstance(args[0], Away):
                self._sent(args[1], non_blocking=args[2] if len(args) > 2 else False)
            else:
                self.waits.append("copy_ to the host")
        elif away and (name in ASKING or not to_device):
            self.waits.append(name)
        elif (
            away and name.startswith("index") and any(one.dtype in (torch.bool, torch.uint8) for one in away)
        ):
            self.waits.append(f"{name} by a mask")
        elif away and any(one.dim() for one in here):
            raise RuntimeError(f"{name}: expected all tensors to be on the same device")

    def _sent(self, values: Tensor, *, non_blocking: bool) -> None:
        self.copies += 1
        if not non_blocking or values.untyped_storage().data_ptr() not in self._pinned:
            self.waits.append(f"a copy of {tuple(values.shape)} from pageable memory")


def _inner(one: Any) -> Any:
    return one.inner if isinstance(one, Away) else one


_watches: list[Watch] = []


class _Mode(TorchDispatchMode):
    """For what makes tensors, or brings the first one there."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _watches[-1].run(function, args, kwargs or {})


@contextlib.contextmanager
def pretended() -> Iterator[Watch]:
    """Within it there is the device `PRETENDED`."""
    _watches.append(Watch())
    try:
        with _Mode():
            yield _watches[-1]
    finally:
        _watches.pop()
