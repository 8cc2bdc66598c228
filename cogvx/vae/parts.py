"""A chunk of video, a few frames at a time: what is large is never there twice.

Every layer of the VAE walks its chunk in parts: a norm makes a few frames, the convolution after it
takes them, and what comes out goes straight to its place in the result. So between two layers there
is only a part, where whole tensors would be twice the size of the result.

While gradients are recorded a part is the whole chunk, because autograd keeps what passes anyway.
"""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

# Frames of a part, where a chunk is cut at all: a 3x3x3 convolution then reads two frames for one.
FRAMES = 2
# Elements that a part has at least: smaller ones save nothing and cost their launches, and PyTorch
# sends small convolutions on a CPU to a slower algorithm.
ELEMENTS = 1 << 22


def slices(x: Tensor) -> list[slice]:
    """The frames of a chunk (batch, channels, frames, height, width), cut into parts, in order."""
    frames = x.shape[2]
    parts = max(1, min(-(-frames // FRAMES), x.numel() // ELEMENTS))
    step = frames if torch.is_grad_enabled() else -(-frames // parts)
    return [slice(start, min(start + step, frames)) for start in range(0, frames, step)]


def split(x: Tensor) -> Iterator[Tensor]:
    """The parts of a chunk, as views."""
    return (x[:, :, frames] for frames in slices(x))


def joined(parts: Iterable[Tensor], size: int, dim: int = 2, into: Tensor | None = None) -> Tensor:
    """Parts joined along `dim` to `size`, each put in its place as it comes.

    `into` may take them, if it is of the right shape and whoever makes the parts has read what lies
    where a part goes before giving it. While gradients are recorded nothing is overwritten.
    """
    if torch.is_grad_enabled():
        whole = list(parts)
        return whole[0] if len(whole) == 1 else torch.cat(whole, dim)
    start = 0
    for part in parts:
        if into is None:
            into = part.new_empty([*part.shape[:dim], size, *part.shape[dim + 1 :]])
        into.narrow(dim, start, part.shape[dim]).copy_(part)
        start += part.shape[dim]
        del part  # before the next one is made
    assert into is not None and start == size
    return into
