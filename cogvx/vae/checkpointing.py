"""A layer whose activations are made again in the backward pass, memory for time."""

from collections.abc import Sequence

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .norm import Flow, Modulation
from .state import FrameCache


def checkpointed(
    layer: nn.Module, flow: Flow, modulations: Sequence[Modulation], cache: FrameCache
) -> Flow:
    """layer(flow, modulations, cache), keeping only what goes in.

    The layer runs on a fork of the cache as it is now: when it runs again, in the backward pass,
    later chunks have long replaced the frames in `cache` itself.
    """
    before = cache.fork()

    def run(x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        fork = before.fork()
        return layer(Flow(x), modulations, fork).x, fork.frames

    out, cache.frames = checkpoint(run, flow.x, use_reentrant=False)
    return Flow(out)
