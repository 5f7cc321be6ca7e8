"""Made-up patients whose gradients are orthogonal, and random sources that an audit can couple and count."""

import hashlib
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedmed.models.classifier import Arrays, Classifier
from fedmed.privacy.randomness import RandomSource
from fedmed.training import LocalData

# The weights whose changes are the canaries' scores.
WEIGHT = "head.weight"
# A canary's gradient at zero weights, in units of the clipping norm: it stays above 1 while the weights are small.
REACH = 5.0


class CanaryModel(Classifier):
    """A linear layer without bias on `width` inputs: input i's gradient is a multiple of the i-th unit vector."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.head = nn.Linear(width, 1, bias=False)
        nn.init.zeros_(self.head.weight)
        self.built = {WEIGHT: self.head.weight.detach().clone()}

    def forward(self, features: Tensor) -> Tensor:
        """(records,) logits of (records, width)."""
        return self.head(features).squeeze(-1)

    def zeros(self) -> Arrays:
        """The arrays at which every canary's gradient is the same: the coordinator may send what suits it best."""
        return {WEIGHT: np.zeros((1, self.head.in_features), dtype=np.float32)}


def canary_data(
    directions: NDArray[np.int64], *, width: int, max_grad_norm: float, records: Sequence[int] | None = None
) -> LocalData:
    """Patients of whom the i-th has `records[i]` (default 1) equal records, whose gradient at zero weights is
    `REACH` times the norm along -e_j with j = `directions[i]`: a step that includes the patient raises weight j."""
    counts = np.ones(len(directions), dtype=np.int64) if records is None else np.asarray(records)
    of_record = np.repeat(directions, counts)
    features = torch.zeros(len(of_record), width)
    # At zero weights the loss has the slope -1/2 in the logit.
    features[torch.arange(len(of_record)), torch.from_numpy(of_record)] = 2 * REACH * max_grad_norm
    ends = np.cumsum(counts)
    records_of = [np.arange(end - count, end) for end, count in zip(ends, counts, strict=True)]
    return LocalData({"features": features}, torch.ones(len(of_record)), records_of)


@dataclass
class Counted:
    """A random source and the number of bytes that were read from it, counted where they leave it, in any thread."""

    source: RandomSource
    total: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def counting(self) -> RandomSource:
        """The same bytes, counted."""

        def read(count: int) -> bytes:
            with self._lock:
                self.total += count
            return self.source.read(count)

        return RandomSource(read, private=self.source.private)


def coupled(key: bytes) -> Callable[[], RandomSource]:
    """Makes sources that all give the same noise, whatever the number of patients that are sampled.

    Each length of a request has a stream of its own, so that the n uniforms of a Poisson sample do not move
    the noise along. NOT PRIVATE.
    """

    def make() -> RandomSource:
        streams: dict[int, np.random.Generator] = {}

        def read(count: int) -> bytes:
            if count not in streams:
                digest = hashlib.sha256(key + count.to_bytes(8, "big")).digest()
                streams[count] = np.random.default_rng(list(digest))
            return streams[count].bytes(count)

        return RandomSource(read, private=False)

    return make
