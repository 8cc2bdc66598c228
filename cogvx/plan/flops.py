"""Floating-point operations of the models, from configs."""

import itertools

from ..config import TransformerConfig, VAEConfig


def denoise_flops(config: TransformerConfig, frames: int, height: int, width: int) -> float:
    """Floating-point operations of one forward of the transformer, for latents of this size.

    Matrix products of the blocks, and attention; the rest is less than 1 %.
    """
    patch, patch_t = config.patch_size, config.patch_size_t or 1
    tokens = config.max_text_seq_length
    tokens += -(-frames // patch_t) * (height // patch) * (width // patch)
    return config.num_layers * (
        2 * token_weights(config) * tokens + 4 * config.hidden_size * tokens**2
    )


def token_weights(config: TransformerConfig) -> float:
    """Weights of a block's matrix products that every token meets: of attention and feed-forward,
    where it is routed those of its experts."""
    return (4 + 2 * config.mlp_ratio * config.expert_top_k) * config.hidden_size**2


def vae_flops(config: VAEConfig, frames: int, height: int, width: int, *, decode: bool) -> float:
    """Floating-point operations of the convolutions to decode latents of this size, or to encode
    to them."""
    kernel = 9 + 3 if config.factorized else 27  # of a frame, then of time
    ratio, levels = config.spatial_compression_ratio, len(config.block_out_channels)
    widths = config.block_out_channels[:: -1 if decode else 1]
    layers = config.layers_per_block + decode

    first = config.factorized or frames % 2 == 1  # which stays one frame at every level

    def positions(level: int) -> tuple[int, int]:
        """Number of (frames, pixels in a frame) at a level."""
        halved = 2 ** min(level, config.time_levels)
        times = halved if decode else config.temporal_compression_ratio // halved
        scale = 2**level if decode else ratio >> level
        return frames * times - (times - 1) * first, height * width * scale**2

    total = 0.0
    for level, (source, width_of) in enumerate(itertools.pairwise((widths[0], *widths))):
        in_time, in_frame = positions(level)
        weights = kernel * width_of * (source + (2 * layers - 1) * width_of)
        total += weights * in_time * in_frame
        if level + 1 < levels:  # a convolution of frames, in time where there are fewer
            next_time, next_frame = positions(level + 1)
            total += 9 * width_of**2 * min(in_time, next_time) * next_frame
    total += 4 * kernel * widths[0 if decode else -1] ** 2 * frames * height * width  # the middle
    in_time, in_frame = positions(levels - 1 if decode else 0)
    ends = config.out_channels if decode else config.in_channels
    total += kernel * config.block_out_channels[0] * ends * in_time * in_frame
    return 2 * total
