"""One video on several GPUs, by torch.distributed. See `docs/distributed.md`."""

from .launch import start, stop
from .ranks import Ranks, context_parallel
from .vae import vae_parallel

__all__ = ["Ranks", "context_parallel", "start", "stop", "vae_parallel"]
