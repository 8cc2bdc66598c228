"""Latents to pixels."""

from functools import partial
from itertools import pairwise

import torch
from torch import Tensor, nn

from cogvx_kernels.streaming import FrameCache

from ..autocast import autocast_dtype
from ..config import VAEConfig
from .blocks import Level, MakeConv, MakeNorm, resnets, run_levels
from .causal_conv import CausalConv3d, FactorizedConv3d, name_convs
from .norm import Flow, FrameNorm, SpatialNorm
from .resample import Upsample3D


class Decoder(nn.Module):
    """One chunk of latents in, its video out.

    Attributes:
        config: the VAE's.
        gradient_checkpointing: make activations again in the backward pass instead of keeping them.
    """

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False
        norm: MakeNorm = partial(
            SpatialNorm, config.norm_num_groups, zq_channels=config.latent_channels
        )
        if config.factorized:
            norm = partial(FrameNorm, config.norm_num_groups, eps=config.norm_eps)
        conv: MakeConv = FactorizedConv3d if config.factorized else CausalConv3d
        widths = config.block_out_channels[::-1]
        self.conv_in = conv(config.latent_channels, widths[0])
        self.mid_block = Level(resnets(widths[0], widths[0], 2, norm, conv))
        self.up_blocks = nn.ModuleList()
        for i, (width_in, width) in enumerate(pairwise((widths[0], *widths))):
            last = i == len(widths) - 1
            up = None if last else Upsample3D(width, time=i < config.time_levels)
            blocks = resnets(width_in, width, config.layers_per_block + 1, norm, conv)
            self.up_blocks.append(Level(blocks, upsampler=up))
        self.norm_out = norm(widths[-1])
        self.conv_out = conv(widths[-1], config.out_channels)
        name_convs(self)

    def forward(self, latents: Tensor, cache: FrameCache | None = None) -> Tensor:
        """Decode one chunk.

        Args:
            latents: (batch, latent frames, latent_channels, height, width), unscaled.
            cache: what the chunks before left, and this one leaves for the next; None means that
                this chunk is the whole clip.

        Returns:
            (batch, frames, out_channels, 8 · height, 8 · width), values in about [-1, 1].

        `decode` walks a clip of any length in the chunks that the VAE is defined by.
        """
        cache = FrameCache(keep=False) if cache is None else cache
        latents = latents.to(autocast_dtype(latents.device) or latents.dtype)
        with cache.chunk(leads=self.config.factorized or latents.shape[1] % 2 == 1):
            zq = latents.transpose(1, 2).contiguous(memory_format=torch.channels_last_3d)
            levels = (self.mid_block, *self.up_blocks)
            # Not named here, so that what comes out of conv_in is freed when it has been used.
            flow = run_levels(
                levels, Flow(self.conv_in(zq, cache)), zq, cache, self.gradient_checkpointing
            )
            norm, modulation = self.norm_out, None
            if isinstance(norm, SpatialNorm):
                [modulation] = SpatialNorm.modulated([norm], zq)
            return self.conv_out.after(norm, flow, modulation, cache).transpose(1, 2)
