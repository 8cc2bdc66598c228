"""The decoder of the VAE: latents to pixels."""

from functools import partial
from itertools import pairwise

import torch
from torch import Tensor, nn

from cogvx_kernels.streaming import FrameCache

from ..autocast import autocast_dtype
from ..config import VAEConfig
from .blocks import Level, MakeConv, MakeNorm, resnets, run_levels
from .causal_conv import CausalConv3d, FactorizedConv3d
from .norm import Flow, FrameNorm, SpatialNorm
from .options import Options
from .ranks import VAERanks
from .resample import Upsample3D


class Decoder(nn.Module):
    """Decodes one chunk of latents.

    Attributes:
        config: the VAE's.
        options: of execution, shared by all layers.
        gradient_checkpointing: recompute activations in the backward pass instead of keeping them.
        ranks: that share a clip's chunks or tiles; None for this process alone.
    """

    def __init__(self, config: VAEConfig, options: Options | None = None) -> None:
        super().__init__()
        self.config = config
        self.options = options = options or Options()
        self.gradient_checkpointing = False
        self.ranks: VAERanks | None = None
        groups = config.norm_num_groups
        norm: MakeNorm = partial(SpatialNorm, groups, zq_channels=config.latent_channels)
        if config.factorized:
            norm = partial(FrameNorm, groups, eps=config.norm_eps)
        make_conv = FactorizedConv3d if config.factorized else CausalConv3d
        conv: MakeConv = partial(make_conv, options=options)
        widths = config.block_out_channels[::-1]
        self.conv_in = conv(config.latent_channels, widths[0], name="conv_in")
        self.mid_block = Level(resnets(widths[0], widths[0], 2, norm, conv, "mid_block"))
        self.up_blocks = nn.ModuleList()
        for i, (width_in, width) in enumerate(pairwise((widths[0], *widths))):
            last = i == len(widths) - 1
            up = None if last else Upsample3D(width, i < config.time_levels, options)
            count, level = config.layers_per_block + 1, f"up_blocks.{i}"
            blocks = resnets(width_in, width, count, norm, conv, level, resampled=not last)
            self.up_blocks.append(Level(blocks, upsampler=up))
        self.norm_out = norm(widths[-1])
        self.conv_out = conv(widths[-1], config.out_channels, name="conv_out")

    def forward(self, latents: Tensor, cache: FrameCache | None = None) -> Tensor:
        """Decode one chunk.

        Args:
            latents: (batch, latent frames, latent_channels, height, width), unscaled.
            cache: frames of the chunk before, replaced by those of this one; None if this chunk is
                the whole clip.

        Returns:
            (batch, frames, out_channels, 8 · height, 8 · width), values in about [-1, 1].

        `decode` runs a clip of any length in the chunks that the VAE is defined by.
        """
        cache = FrameCache(keep=False) if cache is None else cache
        latents = latents.to(autocast_dtype(latents.device) or latents.dtype)
        with cache.chunk(leads=self.config.factorized or latents.shape[1] % 2 == 1):
            zq = latents.transpose(1, 2).contiguous(memory_format=torch.channels_last_3d)
            levels = (self.mid_block, *self.up_blocks)
            # Unnamed, so that the output of conv_in is freed once it has been used.
            flow = run_levels(
                levels, Flow(self.conv_in(zq, cache)), zq, cache, self.gradient_checkpointing
            )
            norm, modulation = self.norm_out, None
            if isinstance(norm, SpatialNorm):
                [modulation] = SpatialNorm.modulated([norm], zq)
            return self.conv_out.after(norm, flow, modulation, cache).transpose(1, 2)
