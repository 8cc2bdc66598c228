"""The drop-in: experts of text and of video as a module that owns their weights."""

import math

import torch
from torch import Tensor, nn

from .. import _checks
from .op import expert_ffn
from .reference import ACTIVATIONS


class ExpertFFN(nn.Module):
    """`expert_ffn` as a module: `num_experts` feed-forwards, their weights stacked.

    With one expert it serves all tokens; with two the first serves text and the second video,
    unless an index says otherwise. State dict: `up`, `up_bias`, `down`, `down_bias`, whatever the
    backend. Weights are initialised as nn.Linear's are.
    """

    def __init__(
        self,
        dim: int,
        ffn_dim: int,
        num_experts: int = 2,
        activation: str = "gelu_tanh",
        bias: bool = True,
        recompute: bool = True,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        _checks.integer("ExpertFFN", "num_experts", num_experts, 1, 2**15, "")
        _checks.choice("ExpertFFN", "activation", activation, tuple(ACTIVATIONS))
        rows = 2 * ffn_dim if activation == "swiglu" else ffn_dim
        self.up = nn.Parameter(torch.empty(num_experts, rows, dim))
        self.down = nn.Parameter(torch.empty(num_experts, dim, ffn_dim))
        self.up_bias = nn.Parameter(torch.empty(num_experts, rows)) if bias else None
        self.down_bias = nn.Parameter(torch.empty(num_experts, dim)) if bias else None
        self.activation = activation
        self.recompute = recompute
        self.backend = backend
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for weight, bias in ((self.up, self.up_bias), (self.down, self.down_bias)):
            bound = 1 / math.sqrt(weight.shape[-1])
            nn.init.uniform_(weight, -bound, bound)
            if bias is not None:
                nn.init.uniform_(bias, -bound, bound)

    def forward(
        self,
        x: Tensor,
        index: Tensor | None = None,
        weight: Tensor | None = None,
        text_len: int = 0,
    ) -> Tensor:
        return expert_ffn(
            x,
            self.up,
            self.up_bias,
            self.down,
            self.down_bias,
            index,
            weight,
            text_len=text_len,
            activation=self.activation,
            recompute=self.recompute,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        experts, _, dim = self.up.shape
        return f"{dim}, {self.down.shape[-1]}, num_experts={experts}, backend={self.backend!r}"
