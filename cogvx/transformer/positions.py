"""Positional embeddings: RoPE tables and added sin-cos tables.

CogVideoX-2B adds a table of sines and cosines, the 5B models rotate q and k (RoPE), and 5B-I2V does
that and adds a learned table. All but the learned one are computed on the CPU from sizes alone, and
are not in the state dict.
"""

from operator import index

import torch
from torch import Tensor, nn

from cogvx_kernels import crop_positions, rope3d_tables, slice_positions, split_headdim

from ..config import TransformerConfig


def token_grid(
    config: TransformerConfig, frames: int, height: int, width: int
) -> tuple[int, int, int]:
    """Size (frames, height, width) of latents in tokens."""
    patch = config.patch_size
    return frames // (config.patch_size_t or 1), height // patch, width // patch


def rope_tables(
    config: TransformerConfig,
    frames: int,
    height: int,
    width: int,
    device: torch.device | str = "cpu",
) -> tuple[Tensor, Tensor]:
    """cos and sin of every video token, each (video_len, headdim // 2) fp32.

    CogVideoX 1.0 spreads positions over a centred crop of the training grid; 1.5, with
    `patch_size_t`, counts tokens. Those integers do not depend on the training size, so larger
    grids work, too (diffusers slices a finite table).

    frames, height, width  of the latents, before patches

    Source: `docs/model.md`, sections 3.2 and 3.3.
    """
    grid = token_grid(config, frames, height, width)
    if config.patch_size_t is None:
        positions = crop_positions(grid, config.grid)
    else:
        positions = slice_positions(grid)
    cos, sin = rope3d_tables(positions, split_headdim(config.attention_head_dim))
    return cos.to(device), sin.to(device)


def sincos_table(
    dim: int, grid: tuple[int, int, int], spatial_scale: float, temporal_scale: float
) -> Tensor:
    """The fixed table of CogVideoX-2B, (video_len, dim) fp64.

    A quarter of the dims encodes the frame, then 3/8 the column and 3/8 the row, each as sines,
    then cosines, of position / scale · 10000^(-i / n) for its n pairs.

    dim   a multiple of 16
    grid  (frames, height, width) in tokens

    Raises ValueError if 16 does not divide dim. Source: `docs/model.md`, section 2.2.
    """
    if dim % 16:
        raise ValueError(f"sincos_table: dim must be a multiple of 16; got {dim}")

    def axis(count: int, scale: float, pairs: int) -> Tensor:
        positions = torch.arange(count, dtype=torch.float32) / scale  # in fp32, as diffusers does
        omega = 10000.0 ** (-torch.arange(pairs, dtype=torch.float64) / pairs)
        angles = torch.outer(positions.double(), omega)
        return torch.cat([angles.sin(), angles.cos()], 1)

    frames = axis(grid[0], temporal_scale, dim // 8)[:, None, None]
    rows = axis(grid[1], spatial_scale, 3 * dim // 16)[None, :, None]
    columns = axis(grid[2], spatial_scale, 3 * dim // 16)[None, None]
    parts = [part.expand(*grid, part.shape[-1]) for part in (frames, columns, rows)]
    return torch.cat(parts, -1).flatten(0, 2)


def sincos_positions(config: TransformerConfig, frames: int, height: int, width: int) -> Tensor:
    """`sincos_table` for latents of that size, after zeros for the text: (seqlen, dim) fp64."""
    grid = token_grid(config, frames, height, width)
    table = sincos_table(
        config.hidden_size,
        grid,
        config.spatial_interpolation_scale,
        config.temporal_interpolation_scale,
    )
    return torch.cat([table.new_zeros(config.max_text_seq_length, config.hidden_size), table])


class Tables:
    """Cache of the positional tables of one model, for the last `KEPT` sizes.

    For torch.compile a table is a constant, and a new size a new graph.
    """

    KEPT = 4

    def __init__(self, config: TransformerConfig) -> None:
        self.config = config
        self._kept: dict[tuple[object, ...], Tensor] = {}

    def rope(self, frames: int, height: int, width: int, device: torch.device) -> Tensor:
        """cos and sin, stacked: (2, video_len, headdim // 2); video_len is 0 without RoPE."""
        size = index(frames), index(height), index(width)  # ints, not the compiler's symbols
        return self._table("rope", *size, device, torch.float32)

    def sincos(
        self, frames: int, height: int, width: int, device: torch.device, dtype: torch.dtype
    ) -> Tensor:
        """`sincos_positions` on a device, in a dtype: (seqlen, dim)."""
        size = index(frames), index(height), index(width)  # ints, not the compiler's symbols
        return self._table("sincos", *size, device, dtype)

    def _table(
        self,
        kind: str,
        frames: int,
        height: int,
        width: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> Tensor:
        key = kind, frames, height, width, device, dtype
        table = self._kept.get(key)
        if table is None:
            # A table made in inference mode could not be used in a training step later.
            with torch.inference_mode(False), torch.no_grad(), torch.device("cpu"):
                table = self._make(kind, frames, height, width).to(device, dtype)
            if type(table) is Tensor:  # a fake tensor belongs to the mode that made it
                while len(self._kept) >= self.KEPT:
                    del self._kept[next(iter(self._kept))]
                self._kept[key] = table
        # The compiler takes the shape of a parameter as static.
        return nn.Parameter(table, False) if torch.compiler.is_compiling() else table

    # What torch.compiler.assume_constant_result sets, without importing the compiler.
    _table._dynamo_marked_constant = True  # type: ignore[attr-defined]

    def _make(self, kind: str, frames: int, height: int, width: int) -> Tensor:
        if kind == "sincos":
            return sincos_positions(self.config, frames, height, width)
        if self.config.use_rotary_positional_embeddings:
            return torch.stack(rope_tables(self.config, frames, height, width))
        return torch.zeros(2, 0, max(1, self.config.attention_head_dim // 2))
