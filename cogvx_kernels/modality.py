"""The joint sequence: text tokens first, then video tokens. Said here, once.

Every op of this package that treats the two modalities differently takes one number, `text_len`,
and asks this module what it means. `text_len` may be 0 (a video alone) or the whole sequence.
"""

import torch
from torch import Tensor

TEXT, VIDEO = 0, 1


def split(x: Tensor, text_len: int, dim: int = 1) -> tuple[Tensor, Tensor]:
    """Views of the text and of the video tokens of a joint sequence; `join` puts them back."""
    return x.narrow(dim, 0, text_len), x.narrow(dim, text_len, x.shape[dim] - text_len)


def join(text: Tensor, video: Tensor, dim: int = 1) -> Tensor:
    """The joint sequence of text and video tokens; `split` takes it apart again."""
    return torch.cat([text, video], dim)
