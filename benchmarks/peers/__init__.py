"""Implementations of our ops by other libraries, called with our arguments; never copied.

Each file is about a family of ops and registers its providers. A maker gets the arguments, once and
untimed, and returns a function of them, or raises `Unavailable`.
"""

from . import adaln, ffn, rope, vae

__all__ = ["adaln", "ffn", "rope", "vae"]
