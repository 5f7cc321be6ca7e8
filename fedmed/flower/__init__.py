"""Every touch of Flower's internals, for the pinned version: nothing outside this package imports them."""

from fedmed.flower.in_process import InProcessGrid, constant_failure, load_object, run_in_process

__all__ = ["InProcessGrid", "constant_failure", "load_object", "run_in_process"]
