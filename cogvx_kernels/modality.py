"""Split and join the joint [text, video] sequence.

Ops that treat the two modalities differently take the number of text tokens, `text_len`, which may
be 0 (video alone) or the whole sequence.
"""

import torch
from torch import Tensor

TEXT, VIDEO = 0, 1


def split(x: Tensor, text_len: int, dim: int = 1) -> tuple[Tensor, Tensor]:
    """Views of the text and of the video tokens of a joint sequence."""
    return x.narrow(dim, 0, text_len), x.narrow(dim, text_len, x.shape[dim] - text_len)


def join(text: Tensor, video: Tensor, dim: int = 1) -> Tensor:
    """The joint sequence of text and video tokens."""
    return torch.cat([text, video], dim)
