"""The encoder of the VAE: pixels to the moments of latents."""

from functools import partial
from itertools import pairwise

from torch import Tensor, nn

from cogvx_kernels.streaming import FrameCache

from ..autocast import autocast_dtype
from ..config import VAEConfig
from .blocks import Level, MakeConv, MakeNorm, resnets, run_levels
from .causal_conv import CausalConv3d, FactorizedConv3d
from .norm import Flow, FrameNorm, Norm
from .options import Options
from .ranks import VAERanks
from .resample import Downsample3D


class Encoder(nn.Module):
    """Encodes one chunk of video to the mean and log-variance of its latents.

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
        make_norm = partial(FrameNorm if config.factorized else Norm, groups)
        norm: MakeNorm = partial(make_norm, eps=config.norm_eps)
        make_conv = FactorizedConv3d if config.factorized else CausalConv3d
        conv: MakeConv = partial(make_conv, options=options)
        widths = config.block_out_channels
        self.conv_in = conv(config.in_channels, widths[0], name="conv_in")
        self.down_blocks = nn.ModuleList()
        for i, (width_in, width) in enumerate(pairwise((widths[0], *widths))):
            last = i == len(widths) - 1
            down = None if last else Downsample3D(width, i < config.time_levels)
            count, level = config.layers_per_block, f"down_blocks.{i}"
            blocks = resnets(width_in, width, count, norm, conv, level, resampled=not last)
            self.down_blocks.append(Level(blocks, downsampler=down))
        self.mid_block = Level(resnets(widths[-1], widths[-1], 2, norm, conv, "mid_block"))
        self.norm_out = make_norm(channels=widths[-1], eps=1e-6)
        self.conv_out = conv(widths[-1], 2 * config.latent_channels, name="conv_out")

    def forward(self, video: Tensor, cache: FrameCache | None = None) -> Tensor:
        """Encode one chunk.

        Args:
            video: (batch, frames, in_channels, height, width), values in [-1, 1].
            cache: frames of the chunk before, replaced by those of this one; None if this chunk is
                the whole clip.

        Returns:
            (batch, latent frames, 2 · latent_channels, height / 8, width / 8): mean, log-variance.

        `encode` runs a clip of any length in the chunks that the VAE is defined by.
        """
        cache = FrameCache(keep=False) if cache is None else cache
        video = video.to(autocast_dtype(video.device) or video.dtype)
        with cache.chunk(leads=self.config.factorized or video.shape[1] % 2 == 1):
            levels = (*self.down_blocks, self.mid_block)
            # Unnamed, so that the output of conv_in is freed once it has been used.
            flow = run_levels(
                levels,
                Flow(self.conv_in(video.transpose(1, 2), cache)),
                None,
                cache,
                self.gradient_checkpointing,
            )
            return self.conv_out.after(self.norm_out, flow, None, cache).transpose(1, 2)
