"""`nn.Module` of feed-forwards: of text and of video, or of several experts."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .. import _checks
from .._backend import OpModule
from ..module_utils import is_unmodified
from .op import expert_ffn
from .reference import ACTIVATIONS


class ExpertFFN(OpModule):
    """`expert_ffn` as a module: `num_experts` feed-forwards with stacked weights.

    Without an index one expert serves all tokens; of two, the first serves text and the second
    video. State dict: `up`, `up_bias`, `down`, `down_bias`, for every backend. Weights are
    initialised as those of nn.Linear.

    `from_linears` builds one from the pairs of nn.Linear of an existing model:

        >>> ffn = ExpertFFN.from_linears([(text.up, text.down), (video.up, video.down)])
        >>> y = ffn(torch.cat([text_tokens, video_tokens], 1), text_len=text_tokens.shape[1])
    """

    def __init__(
        self,
        dim: int,
        ffn_dim: int,
        num_experts: int = 2,
        activation: str = "gelu_tanh",
        bias: bool = True,
        recompute: bool = True,
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
        self.reset_parameters()

    @classmethod
    def from_linears(
        cls,
        pairs: Sequence[tuple[nn.Linear, nn.Linear]],
        activation: str = "gelu_tanh",
        recompute: bool = True,
    ) -> "ExpertFFN":
        """Create a module from copies of linear layers, (up, down) of each expert.

        Args:
            pairs: layers dim -> ffn_dim and ffn_dim -> dim of each expert, text before video; of
                equal sizes, dtype and device, all with a bias or all without. For "swiglu" up has
                2 · ffn_dim rows, values and then gates.
            activation, recompute: as in the constructor.

        Returns:
            A module of their dtype, on their device; it computes down(activation(up(x))) for the
            tokens of each expert. A stacked parameter requires a gradient if that of any layer
            does.

        Raises:
            TypeError, ValueError: an invalid layer, named in the message.
        """
        where = "ExpertFFN.from_linears"
        _checks.choice(where, "activation", activation, tuple(ACTIVATIONS))
        _check_linears(where, pairs, activation)
        ups, downs = zip(*pairs, strict=True)
        with torch.device("meta"):
            module = cls(
                ups[0].in_features, downs[0].in_features, len(pairs), activation,
                ups[0].bias is not None, recompute,
            )  # fmt: skip
        for name, layers in (("up", ups), ("down", downs)):
            for own, theirs in ((name, "weight"), (f"{name}_bias", "bias")):
                tensors = [getattr(layer, theirs) for layer in layers]
                if tensors[0] is not None:
                    stacked = torch.stack([tensor.detach() for tensor in tensors])
                    trained = any(tensor.requires_grad for tensor in tensors)
                    setattr(module, own, nn.Parameter(stacked, trained))
        return module

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
        """Apply the experts of each token.

        Args:
            x: (batch, seqlen, dim), text first.
            index: (batch, seqlen, top_k) int32 or int64, the experts of each token; None for one
                expert, or for two, of which the first serves text.
            weight: (batch, seqlen, top_k), the weight of each expert; None for 1.
            text_len: number of text tokens.

        Returns:
            (batch, seqlen, dim), new, of x's dtype.
        """
        return expert_ffn(
            x, self.up, self.up_bias, self.down, self.down_bias, index, weight, text_len=text_len,
            activation=self.activation, recompute=self.recompute, backend=self.backend,
        )  # fmt: skip

    def extra_repr(self) -> str:
        experts, _, dim = self.up.shape
        return f"{dim}, {self.down.shape[-1]}, num_experts={experts}, backend={self.backend!r}"


def _check_linears(
    where: str, pairs: Sequence[tuple[nn.Linear, nn.Linear]], activation: str
) -> None:
    """Check the pairs of layers of `from_linears`: all like the first pair."""
    if not isinstance(pairs, Sequence) or not len(pairs):
        raise TypeError(
            f"{where}: pairs must be a sequence of (up, down) layers, one pair for each expert; "
            f"got {_checks.describe(pairs)}"
        )
    for i, pair in enumerate(pairs):
        if not isinstance(pair, Sequence) or len(pair) != 2:
            raise TypeError(
                f"{where}: pairs[{i}] must be two layers, (up, down); got {_checks.describe(pair)}"
            )
        for name, layer in zip(("up", "down"), pair, strict=True):
            # A quantised or adapted layer, or one with a hook, does not compute x · weightᵀ + bias.
            if not isinstance(layer, nn.Module) or not is_unmodified(layer, nn.Linear):
                raise TypeError(
                    f"{where}: {name} of pairs[{i}] must be an nn.Linear without hooks; "
                    f"got {type(layer).__name__}"
                )
    first, _ = pairs[0]
    rows, dim = first.weight.shape
    if activation == "swiglu" and rows % 2:
        raise ValueError(
            f'{where}: up of pairs[0] must have an even number of rows for activation="swiglu", '
            f"values and then gates; got {rows}"
        )
    ffn_dim = rows // 2 if activation == "swiglu" else rows
    for i, (up, down) in enumerate(pairs):
        for name, layer, shape in (("up", up, (rows, dim)), ("down", down, (dim, ffn_dim))):
            what = f"{name} of pairs[{i}]"
            _checks.shape(
                where, f"the weight of {what}", layer.weight, shape, "(out, in)",
                lambda: f" for up of pairs[0] of shape {(rows, dim)} and {activation=}",
            )  # fmt: skip
            if (layer.bias is None) != (first.bias is None):
                has, other = ("no bias", "one") if layer.bias is None else ("a bias", "none")
                raise ValueError(
                    f"{where}: all layers must have a bias, or none; got {what} with {has} and up "
                    f"of pairs[0] with {other}"
                )
            for kind, x in layer.named_parameters():
                x_name = f"the {kind} of {what}"
                _checks.dtype(where, x_name, x, (first.weight.dtype,))
                _checks.same_device(where, x_name, x, "up of pairs[0]", first.weight)
