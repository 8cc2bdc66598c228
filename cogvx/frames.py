"""How many frames a clip may have, and in which chunks a causal VAE takes them.

A causal VAE keeps the first frame for itself and compresses those after it, `ratio` into one.

- The released VAE takes 1, 8k or 8k + 1 frames, any number of latents, and cuts them into chunks
  of 8 frames or 2 latents; what remains goes into the *first* chunk (49 frames: 9, 8, 8, 8, 8, 8).
  Only a clip with an odd number of latents has a first frame of its own.
- The factorised VAE takes 1 + ratio·k frames and gives 1 + k latents; its first chunk is the first
  frame alone.

The plans are part of the function computed (fact sheet, sections 4.4 and 4.7). Imports no torch.
"""

from .config import VAEConfig

RELEASED = VAEConfig()


def rule(config: VAEConfig = RELEASED) -> str:
    """The frame rule of a VAE in words, for messages."""
    if config.factorized:
        return f"1 + {config.temporal_compression_ratio}k"
    chunk = config.num_sample_frames_batch_size
    return f"1, {chunk}k or {chunk}k + 1"


def is_valid(frames: int, config: VAEConfig = RELEASED) -> bool:
    """Whether a clip of so many frames can be encoded and comes back as long as it was."""
    if frames < 1:
        return False
    if config.factorized:
        return frames % config.temporal_compression_ratio == 1 % config.temporal_compression_ratio
    return frames == 1 or (frames > 1 and frames % config.num_sample_frames_batch_size in (0, 1))


def nearest_valid(frames: int, config: VAEConfig = RELEASED) -> tuple[int, ...]:
    """The valid numbers of frames nearest to `frames`: itself, or the next below and above.

    >>> nearest_valid(49), nearest_valid(52), nearest_valid(0)
    ((49,), (49, 56), (1,))
    """
    if is_valid(frames, config):
        return (frames,)
    longest = config.num_sample_frames_batch_size + config.temporal_compression_ratio
    below = [n for n in range(frames - 1, frames - longest, -1) if is_valid(n, config)]
    above = [n for n in range(max(frames, 0) + 1, max(frames, 0) + longest) if is_valid(n, config)]
    return (*below[:1], *above[:1])


def check(where: str, name: str, frames: int, config: VAEConfig = RELEASED) -> None:
    """Raises ValueError with the rule and the nearest valid counts if `frames` is not valid."""
    if not is_valid(frames, config):
        nearest = " or ".join(map(str, nearest_valid(frames, config)))
        raise ValueError(
            f"{where}: {name} must have {rule(config)} frames, nearest {nearest}; got {frames}"
        )


def check_size(where: str, name: str | None, height: int, width: int, multiple: int) -> None:
    """Raises ValueError, with the nearest valid sizes, unless `multiple` divides both sides.

    name: the argument that has the size; None where height and width are arguments themselves.
    """
    for side, size in (("height", height), ("width", width)):
        if size < 1 or size % multiple:
            nearest = nearest_multiples(size, multiple)
            if name is None:
                raise ValueError(
                    f"{where}: {side} must be a multiple of {multiple}, nearest {nearest}; "
                    f"got {size}"
                )
            raise ValueError(
                f"{where}: {name} must have a {side} that is a multiple of {multiple}, nearest "
                f"{nearest}; got {height}x{width}"
            )


def nearest_multiples(size: int, multiple: int) -> str:
    """The positive multiples next to a size that is none, in words: 80 or 96."""
    below = size // multiple * multiple
    return " or ".join(str(n) for n in (below, below + multiple) if n > 0)


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
    return _plan(frames, config.num_sample_frames_batch_size, config.factorized)


def decode_plan(latents: int, config: VAEConfig = RELEASED) -> tuple[int, ...]:
    """Latent frames of each chunk, in order: 13 -> 3, 2, 2, 2, 2, 2 (released)."""
    return _plan(latents, config.num_latent_frames_batch_size, config.factorized)


def _plan(length: int, chunk: int, factorized: bool) -> tuple[int, ...]:
    if factorized:
        whole, rest = divmod(length - 1, chunk)
        return (1, *(chunk,) * whole, *((rest,) if rest else ()))
    whole, rest = divmod(length, chunk)
    return (chunk + rest, *(chunk,) * (whole - 1)) if whole else (rest,)
