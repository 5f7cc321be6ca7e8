"""Every touch of Flower's internals, for the pinned version: nothing outside this package imports them."""

from fedmed.flower.in_process import InProcessGrid, constant_failure, load_object, run_in_process
from fedmed.flower.node import answered, refused

__all__ = ["InProcessGrid", "answered", "constant_failure", "load_object", "refused", "run_in_process"]
