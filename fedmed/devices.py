"""Where networks compute: the processor, or an accelerator and the way onto it.

Who has the machine says which (`device` of site.yaml, `federation.device` of a simulation); no message does.
"""

from functools import lru_cache

import torch
from torch import Tensor

from fedmed.errors import ConfigError

CPU = torch.device("cpu")


@lru_cache
def device_of(name: str) -> torch.device:
    """The device that a setting names: cpu, cuda, cuda:N, or auto for the first accelerator if there is one.

    PyTorch calls AMD's accelerators cuda too.

    Raises:
        ConfigError: as `check`.
    """
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return CPU
    check(name)
    # An algorithm is not chosen by what memory happens to be free, and fp32 is not done in fewer bits.
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.allow_tf32 = False
    return torch.device("cuda", _number(name))


def check(name: str) -> None:
    """Whether the accelerator that is named is there. It is not woken: processes can be forked afterwards.

    Raises:
        ConfigError: it is not.
    """
    count = torch.cuda.device_count() if name.startswith("cuda") else 0
    if name.startswith("cuda") and not count:
        raise ConfigError(
            f"device={name}: PyTorch {torch.__version__} finds no accelerator; see whether nvidia-smi does and whether "
            "this is PyTorch's build for it (pytorch.org/get-started), or set device to auto or cpu"
        )
    if _number(name) >= max(1, count):
        raise ConfigError(f"device={name}: PyTorch finds {count}; expected cuda:0 to cuda:{count - 1}")


def _number(name: str) -> int:
    return int(name.partition(":")[2] or 0)


def in_words(device: torch.device) -> str:
    """Its name, which what it computed may depend on in the last bits."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def sent(values: Tensor, device: torch.device, rows: Tensor | None = None) -> Tensor:
    """`values` of the host, or those of their `rows`, on the device; nobody waits for the copy.

    It is made from pinned memory, which PyTorch gives to nobody else before it was read.
    """
    if device.type == "cpu":
        return values if rows is None else values[rows]
    count = len(values) if rows is None else len(rows)
    pinned = torch.empty((count, *values.shape[1:]), dtype=values.dtype, pin_memory=True)
    if rows is None:
        pinned.copy_(values)
    else:
        torch.index_select(values, 0, rows, out=pinned)
    return pinned.to(device, non_blocking=True)


def free_bytes(device: torch.device) -> int:
    """Of an accelerator's memory: what nobody uses, what PyTorch holds for later counted too."""
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
