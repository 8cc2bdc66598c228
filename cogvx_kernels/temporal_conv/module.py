"""Module for causal temporal convolution."""

from typing import Any

from torch import Tensor, nn

from .. import _checks
from .._backend import OpModule
from .op import STARTS, temporal_conv


class TemporalConv(OpModule):
    """`temporal_conv` as a module, in place of a padded nn.Conv3d or nn.Conv1d.

    State dict: `weight`, `bias`, with the shapes and initial values of an nn.Conv3d of kernel
    (kernel_size, 1, 1), or, with dims=1, of an nn.Conv1d. Loads a state dict of either.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int = 1,
        depthwise: bool = False,
        bias: bool = True,
        dims: int = 3,
        start: str = "replicate",
    ) -> None:
        super().__init__()
        name = "TemporalConv"
        _checks.integer(name, "kernel_size", kernel_size, 1, 5, "")
        _checks.integer(name, "stride", stride, 1, 2, "")
        _checks.choice(name, "start", start, STARTS)
        if dims not in (1, 3):
            raise ValueError(f"{name}: dims must be 3, of an nn.Conv3d, or 1; got {dims!r}")
        if depthwise and in_channels != out_channels:
            raise ValueError(
                f"{name}: depthwise needs out_channels = in_channels = {in_channels}; "
                f"got {out_channels}"
            )
        groups = in_channels if depthwise else 1
        like = (
            nn.Conv3d(in_channels, out_channels, (kernel_size, 1, 1), groups=groups, bias=bias)
            if dims == 3
            else nn.Conv1d(in_channels, out_channels, kernel_size, groups=groups, bias=bias)
        )
        self.weight = like.weight
        self.bias = like.bias
        self.stride = stride
        self.start = start

    def forward(self, x: Tensor, cache: Tensor | None = None) -> Tensor:
        """Convolve a clip, or a chunk of it after cached frames.

        Args:
            x: (batch, in_channels, frames, height, width), or (batch, in_channels, frames).
            cache: (batch, in_channels, kernel_size - 1, ...), the frames before x, not written;
                None if the clip begins with x.

        Returns:
            (batch, out_channels, (frames - 1) // stride + 1, ...), new, of x's dtype.
        """
        return temporal_conv(
            x, self.weight, self.bias, cache=cache, stride=self.stride, start=self.start,
            backend=self.backend,
        )  # fmt: skip

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        """Reshape a weight of nn.Conv1d for nn.Conv3d, or vice versa."""
        weight = state_dict.get(f"{prefix}weight")
        if isinstance(weight, Tensor) and weight.dim() in (3, 5):
            ones = weight.shape[3:] == (1, 1) or weight.dim() == 3
            if ones and weight.shape[:3] == self.weight.shape[:3]:
                state_dict[f"{prefix}weight"] = weight.reshape(self.weight.shape)
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def extra_repr(self) -> str:
        out, inner, kernel = self.weight.shape[:3]
        return (
            f"{out} <- {inner}, kernel_size={kernel}, stride={self.stride}, start={self.start!r}, "
            f"backend={self.backend!r}"
        )
