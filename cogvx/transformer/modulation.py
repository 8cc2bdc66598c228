"""Adaptive layer norms: shift, scale and gate as linear functions of the time embedding.

Text and video have separate modulations, applied in one pass (`cogvx_kernels.expert_adaln`). They
depend on the timestep alone, so those of a whole run can be computed in advance: `Modulations`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cogvx_kernels import OpModule, expert_adaln, gated_residual, gated_residual_adaln

from .module_utils import is_plain_linear

# Steps whose modulations are computed at once: of 5B, 3.1 MB each in bfloat16.
STEPS_AHEAD = 50
# Limit of the weights that `stacked` copies for one matrix product.
STACK_BYTES = 1 << 28


class Modulation(NamedTuple):
    """Shift, scale and gate of one norm, (batch, dim) each.

    In the row order of the released layers: video, then text.
    """

    shift: Tensor
    scale: Tensor
    gate: Tensor
    text_shift: Tensor
    text_scale: Tensor
    text_gate: Tensor


class Branch(NamedTuple):
    """Output of attention or feed-forward, not yet added to the residual stream, and its gates.

    y                (batch, seqlen, dim)
    gate, text_gate  (batch, dim) of each modality
    """

    y: Tensor
    gate: Tensor
    text_gate: Tensor


@dataclass(frozen=True)
class Modulations:
    """All shifts, scales and gates of a model at some timesteps; `ExpertTransformer.modulations`.

    values  (steps, 12 · num_layers + 2, dim): six rows of each norm of each block, in the order of
            `Modulation`, then shift and scale of the final norm
    """

    values: Tensor

    def __len__(self) -> int:
        return len(self.values)

    def at(self, step: int) -> "Modulations":
        """Modulations of one step, shared by the batch; a view. Raises IndexError."""
        if not 0 <= step < len(self):
            raise IndexError(f"Modulations: step must be in [0, {len(self)}); got {step}")
        return Modulations(self.values[step : step + 1])

    def block_modulations(
        self, batch: int, dtype: torch.dtype
    ) -> tuple[list[tuple[Modulation, Modulation]], tuple[Tensor, Tensor]]:
        """Modulations of each block and of the final norm, (batch, dim) each; views.

        There is one step for all items, or one for each.
        """
        rows = self.values.to(dtype).expand(batch, -1, -1).unbind(1)
        norms = [Modulation(*rows[i : i + 6]) for i in range(0, len(rows) - 2, 6)]
        return list(zip(norms[::2], norms[1::2], strict=True)), (rows[-2], rows[-1])


def stacked(layers: Sequence[nn.Module], x: Tensor) -> Tensor:
    """Concatenated outputs of all layers: (batch, in) -> (batch, sum of their rows).

    Plain linear layers are one matrix product per `STACK_BYTES` of copied weights. Wrapped ones
    (LoRA, quantised) are called.
    """
    parts = []
    for plain, run in groupby(layers, is_plain_linear):
        if plain:
            parts += [_product(few, x) for few in _few(list(run))]
        else:
            parts += [layer(x) for layer in run]
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def _product(layers: Sequence[nn.Module], x: Tensor) -> Tensor:
    weight, bias = (torch.cat([getattr(layer, name) for layer in layers])
                    for name in ("weight", "bias"))  # fmt: skip
    return F.linear(x, weight, bias)


def _few(layers: list[nn.Module]) -> list[list[nn.Module]]:
    """Split layers, in order, into runs of at most `STACK_BYTES` of weights, at least one each."""
    runs: list[list[nn.Module]] = []
    left = 0
    for layer in layers:
        nbytes = layer.get_parameter("weight").nbytes
        if nbytes > left or not runs:
            runs.append([])
            left = STACK_BYTES
        runs[-1].append(layer)
        left -= nbytes
    return runs


class ExpertAdaLayerNorm(OpModule):
    """Expert adaptive layer norm before a branch; also makes the gate after the branch.

    The rows of `linear` are shift, scale and gate of video, then of text, as released. Source:
    `docs/model.md`, section 2.3.
    """

    def __init__(self, dim: int, time_embed_dim: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.linear = nn.Linear(time_embed_dim, 6 * dim)
        self.norm = nn.LayerNorm(dim, eps)

    def modulation(self, temb: Tensor, dtype: torch.dtype) -> Modulation:
        """Modulation from temb (batch, time_embed_dim), after a SiLU; dtype even under autocast."""
        return Modulation(*self.linear(temb).to(dtype).chunk(6, 1))

    def forward(
        self, x: Tensor, branch: Branch | None, modulation: Modulation, text_len: int
    ) -> tuple[Tensor, Tensor]:
        """Add a branch to x, and normalise and modulate the sum, in one pass.

        Args:
            x: (batch, text_len + video_len, dim), text first.
            branch: of the same shape, to be added to x; or None.
            modulation: shift, scale and gate of each modality, (batch, dim) each.
            text_len: number of text tokens.

        Returns:
            The sum and its norm, (batch, text_len + video_len, dim) each.
        """
        shift, scale, _, text_shift, text_scale, _ = modulation
        norm = self.norm
        if branch is None:
            h = expert_adaln(
                x,
                shift,
                scale,
                text_shift,
                text_scale,
                norm.weight,
                norm.bias,
                text_len=text_len,
                eps=norm.eps,
                backend=self.backend,
            )
            return x, h
        return gated_residual_adaln(
            x,
            branch.y.to(x.dtype),
            branch.gate,
            branch.text_gate,
            shift,
            scale,
            text_shift,
            text_scale,
            norm.weight,
            norm.bias,
            text_len=text_len,
            eps=norm.eps,
            backend=self.backend,
        )

    def add(self, x: Tensor, branch: Branch, text_len: int) -> Tensor:
        """Add a branch to x where no norm follows."""
        y, gate, text_gate = branch
        return gated_residual(
            x, y.to(x.dtype), gate, text_gate, text_len=text_len, backend=self.backend
        )


class AdaLayerNorm(OpModule):
    """Final adaptive layer norm, of video tokens only, without a gate."""

    def __init__(self, dim: int, time_embed_dim: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.linear = nn.Linear(time_embed_dim, 2 * dim)
        self.norm = nn.LayerNorm(dim, eps)

    def forward(self, x: Tensor, time: Tensor | tuple[Tensor, Tensor]) -> Tensor:
        """Normalise and modulate video tokens.

        Args:
            x: (batch, video_len, dim).
            time: (batch, time_embed_dim) after its SiLU; or precomputed shift and scale, (batch,
                dim) each.

        Returns:
            (batch, video_len, dim).
        """
        if isinstance(time, Tensor):
            shift, scale = self.linear(time).to(x.dtype).chunk(2, 1)
        else:
            shift, scale = time
        return expert_adaln(
            x,
            shift,
            scale,
            None,
            None,
            self.norm.weight,
            self.norm.bias,
            eps=self.norm.eps,
            backend=self.backend,
        )
