"""A layer whose activations are made again in the backward pass, memory for time."""

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .state import FrameCache


def checkpointed(layer: nn.Module, x: Tensor, zq: Tensor | None, cache: FrameCache) -> Tensor:
    """layer(x, zq, cache), keeping only what goes in.

    The layer runs on a fork of the cache as it is now: when it runs again, in the backward pass,
    later chunks have long replaced the frames in `cache` itself.
    """
    before = cache.fork()

    def run(x: Tensor, zq: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
        fork = before.fork()
        return layer(x, zq, fork), fork.frames

    out: Tensor
    out, cache.frames = checkpoint(run, x, zq, use_reentrant=False)
    return out
