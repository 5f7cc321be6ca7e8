"""The coordinator's side. One aggregation idea a file; `build` picks the one that a configuration names.

A strategy sees only the sites' updates (differences to the global adapter) and their declared sizes.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedmed.config import StrategyConfig
    from strategies.base import Strategy, Update

# Module and class of each kind: NumPy waits until a strategy is wanted, since `fedmed --help` passes here.
STRATEGIES = {
    "fedavg": "strategies.fedavg:FedAvg",
    # FedProx (Li et al. 2020) changes what a site does, not how updates are averaged.
    "fedprox": "strategies.fedavg:FedAvg",
    "fedavgm": "strategies.fedavgm:FedAvgM",
    "fedadam": "strategies.fedopt:FedAdam",
    "fedyogi": "strategies.fedopt:FedYogi",
    "fedadagrad": "strategies.fedopt:FedAdagrad",
}


def build(config: "StrategyConfig") -> "Strategy":
    """The strategy that a configuration names."""
    module, _, name = STRATEGIES[config.kind].partition(":")
    strategy: Strategy = getattr(importlib.import_module(module), name)(config)
    return strategy


def __getattr__(name: str) -> Any:
    if name in ("Strategy", "Update"):
        return getattr(importlib.import_module("strategies.base"), name)
    raise AttributeError(name)


__all__ = ["STRATEGIES", "Strategy", "Update", "build"]
