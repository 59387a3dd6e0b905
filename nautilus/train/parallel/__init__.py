"""Training on many processes: how they share a model out, and the loop's questions answered by all of them."""

from nautilus.train.parallel.start import start

__all__ = ["start"]
