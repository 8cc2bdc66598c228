"""Frame counts and chunk plans of the VAEs. Imports no torch.

A causal VAE keeps the first frame for itself and compresses those after it, `ratio` into one.

- The released VAE takes 1, 8k or 8k + 1 frames, any number of latents, and cuts them into chunks
  of 8 frames or 2 latents; the remainder goes into the *first* chunk (49 frames: 9, 8, 8, 8, 8, 8).
  Only a clip with an odd number of latents has a first frame of its own.
- The factorised VAE takes 1 + ratio·k frames and gives 1 + k latents; its first chunk is the first
  frame alone.

The plans are part of the function computed (`docs/model.md`, sections 4.4 and 4.7).
"""

from cogvx_kernels.chunks import Chunking, check_size, nearest_multiples

from .config import VAEConfig

__all__ = [
    "check",
    "check_size",
    "decode_plan",
    "decoder_chunking",
    "encode_plan",
    "encoder_chunking",
    "is_valid",
    "latent_frames",
    "nearest_multiples",
    "nearest_valid",
    "video_frames",
]

RELEASED = VAEConfig()


def encoder_chunking(config: VAEConfig = RELEASED) -> Chunking:
    """Valid frame counts of a video, and its chunks."""
    size, ratio = config.num_sample_frames_batch_size, config.temporal_compression_ratio
    if config.factorized:
        return Chunking(size, True, ratio, (1 % ratio,), rule=f"1 + {ratio}k")
    return Chunking(size, False, size, (0, 1), rule=f"1, {size}k or {size}k + 1")


def decoder_chunking(config: VAEConfig = RELEASED) -> Chunking:
    """The chunks of latents; any number of latent frames is valid."""
    return Chunking(config.num_latent_frames_batch_size, config.factorized)


def is_valid(frames: int, config: VAEConfig = RELEASED) -> bool:
    """True if a clip of so many frames can be encoded and comes back as long as it was."""
    return encoder_chunking(config).is_valid(frames)


def nearest_valid(frames: int, config: VAEConfig = RELEASED) -> tuple[int, ...]:
    """The valid numbers of frames nearest to `frames`: itself, or the next below and above.

    >>> nearest_valid(49), nearest_valid(52), nearest_valid(0)
    ((49,), (49, 56), (1,))
    """
    return encoder_chunking(config).nearest(frames)


def check(where: str, name: str, frames: int, config: VAEConfig = RELEASED) -> None:
    """Raises ValueError with the rule and the nearest valid counts if `frames` is not valid."""
    encoder_chunking(config).check(where, name, frames)


def latent_frames(frames: int, config: VAEConfig = RELEASED) -> int:
    """Latent frames of a valid clip: 49 -> 13, 48 -> 12 (released)."""
    return -(-frames // config.temporal_compression_ratio)


def video_frames(latents: int, config: VAEConfig = RELEASED) -> int:
    """Frames that so many latent frames decode to: 13 -> 49, 12 -> 48 (released)."""
    own_first = config.factorized or latents % 2 == 1
    ratio = config.temporal_compression_ratio
    return latents * ratio - (ratio - 1 if own_first else 0)


def encode_plan(frames: int, config: VAEConfig = RELEASED) -> tuple[int, ...]:
    """Frames of each chunk of a valid clip, in order: 49 -> 9, 8, 8, 8, 8, 8 (released)."""
    return encoder_chunking(config).plan(frames)


def decode_plan(latents: int, config: VAEConfig = RELEASED) -> tuple[int, ...]:
    """Latent frames of each chunk, in order: 13 -> 3, 2, 2, 2, 2, 2 (released)."""
    return decoder_chunking(config).plan(latents)
