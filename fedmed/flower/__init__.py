"""Every touch of Flower's internals, for the pinned version: nothing outside this package imports them."""
