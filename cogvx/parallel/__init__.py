"""One video on several GPUs, by torch.distributed. See `docs/distributed.md`."""

from .launch import start, stop
from .ranks import Ranks, context_parallel

__all__ = ["Ranks", "context_parallel", "start", "stop"]
