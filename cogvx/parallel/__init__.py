"""One video on several GPUs, by torch.distributed. See `docs/distributed.md`."""

from .launch import launched, start, stop, world_size
from .ranks import Ranks, context_parallel
from .vae import vae_parallel

__all__ = [
    "Ranks",
    "context_parallel",
    "launched",
    "start",
    "stop",
    "vae_parallel",
    "world_size",
]
