"""Pixels to the moments of latents."""

from functools import partial
from itertools import pairwise

from torch import Tensor, nn

from cogvx_kernels.streaming import FrameCache

from ..autocast import autocast_dtype
from ..config import VAEConfig
from .blocks import Level, MakeConv, MakeNorm, resnets, run_levels
from .causal_conv import CausalConv3d, FactorizedConv3d, name_convs
from .norm import Flow, FrameNorm, Norm
from .resample import Downsample3D


class Encoder(nn.Module):
    """One chunk of video in, the mean and log-variance of its latents out.

    Attributes:
        config: the VAE's.
        gradient_checkpointing: make activations again in the backward pass instead of keeping them.
    """

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False
        make_norm = FrameNorm if config.factorized else Norm
        groups = config.norm_num_groups
        norm: MakeNorm = partial(make_norm, groups, eps=config.norm_eps)
        conv: MakeConv = FactorizedConv3d if config.factorized else CausalConv3d
        widths = config.block_out_channels
        self.conv_in = conv(config.in_channels, widths[0])
        self.down_blocks = nn.ModuleList()
        for i, (width_in, width) in enumerate(pairwise((widths[0], *widths))):
            last = i == len(widths) - 1
            down = None if last else Downsample3D(width, time=i < config.time_levels)
            blocks = resnets(width_in, width, config.layers_per_block, norm, conv)
            self.down_blocks.append(Level(blocks, downsampler=down))
        self.mid_block = Level(resnets(widths[-1], widths[-1], 2, norm, conv))
        self.norm_out = make_norm(groups, widths[-1], eps=1e-6)
        self.conv_out = conv(widths[-1], 2 * config.latent_channels)
        name_convs(self)

    def forward(self, video: Tensor, cache: FrameCache | None = None) -> Tensor:
        """Encode one chunk.

        Args:
            video: (batch, frames, in_channels, height, width), values in [-1, 1].
            cache: what the chunks before left, and this one leaves for the next; None means that
                this chunk is the whole clip.

        Returns:
            (batch, latent frames, 2 · latent_channels, height / 8, width / 8): mean, log-variance.

        `encode` walks a clip of any length in the chunks that the VAE is defined by.
        """
        cache = FrameCache(keep=False) if cache is None else cache
        video = video.to(autocast_dtype(video.device) or video.dtype)
        with cache.chunk(leads=self.config.factorized or video.shape[1] % 2 == 1):
            levels = (*self.down_blocks, self.mid_block)
            # Not named here, so that what comes out of conv_in is freed when it has been used.
            flow = run_levels(
                levels,
                Flow(self.conv_in(video.transpose(1, 2), cache)),
                None,
                cache,
                self.gradient_checkpointing,
            )
            return self.conv_out.after(self.norm_out, flow, None, cache).transpose(1, 2)
