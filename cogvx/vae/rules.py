"""What may go into a VAE, checked before any work: one description of each way through it."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .. import frames
from ..autocast import autocast_dtype
from ..config import VAEConfig
from ..threads import suited_threads
from .decoder import Decoder
from .encoder import Encoder
from .state import FrameCache

Coder = Encoder | Decoder


@dataclass(frozen=True)
class Way:
    """One way through a VAE: encoding or decoding.

    Attributes:
        where: who complains.
        name: what goes in, "video" or "latents".
        module: the encoder or decoder.
        channels: of what goes in.
        multiple: what height and width must be multiples of.
        chunk: frames of every chunk but the first and last.
        plan: number of frames -> frames of each chunk.
        frames_out: number of frames -> number of frames that come out.
    """

    where: str
    name: str
    module: Coder
    channels: int
    multiple: int
    chunk: int
    plan: Callable[[int], tuple[int, ...]]
    frames_out: Callable[[int], int]

    @property
    def config(self) -> VAEConfig:
        return self.module.config

    @property
    def leads(self) -> bool:
        """The first chunk is the first frame."""
        return self.config.factorized

    def coder(self, chunk: Tensor, cache: FrameCache | None) -> Tensor:
        """One chunk through the module."""
        if torch.compiler.is_compiling():
            return self.module(chunk, cache)
        with suited_threads(self._values(chunk), chunk.device):
            return self.module(chunk, cache)

    def check(self, x: Any) -> Tensor:
        """x is a batch of clips, or pieces of clips, that the coder can take."""
        dims = "(batch, frames, channels, height, width)"
        if not isinstance(x, Tensor):
            raise self._wrong(TypeError, f"a tensor {dims}", type(x).__name__)
        if x.dim() != 5:
            raise self._wrong(ValueError, f"5-dimensional {dims}", f"{tuple(x.shape)}")
        if x.shape[2] != self.channels:
            came = f"{tuple(x.shape)}, {x.shape[2]} channels"
            raise self._wrong(ValueError, f"{dims} with {self.channels} channels", came)
        if 0 in x.shape:
            raise self._wrong(ValueError, f"{dims} with nothing empty", f"{tuple(x.shape)}")
        weight = self.module.conv_out.weight
        # Under autocast the coder casts what enters it, as torch's layers do.
        cast = x.is_floating_point() and autocast_dtype(x.device) is not None
        if x.dtype != weight.dtype and not cast:
            raise self._wrong(TypeError, f"{weight.dtype} as the weights", f"{x.dtype}")
        if x.device != weight.device:
            raise self._wrong(ValueError, f"on {weight.device} as the weights", f"{x.device}")
        frames.check_size(self.where, self.name, x.shape[3], x.shape[4], self.multiple)
        return x

    def check_frames(self, count: int, name: str | None = None) -> None:
        """So many frames make a whole clip."""
        if self.name == "video":
            frames.check(self.where, name or self.name, count, self.config)
        elif count < 1:
            raise ValueError(
                f"{self.where}: {name or self.name} must have at least 1 frame; got {count}"
            )

    def _values(self, chunk: Tensor) -> int:
        """Values of the largest tensor between two layers, in frames of the video's size."""
        batch, frames, _, height, width = chunk.shape
        if self.name == "latents":
            frames *= self.config.temporal_compression_ratio
            height *= self.config.spatial_compression_ratio
            width *= self.config.spatial_compression_ratio
        return int(batch * frames * height * width * self.config.block_out_channels[0])

    def _wrong(self, kind: type[Exception], wanted: str, came: str) -> Exception:
        return kind(f"{self.where}: {self.name} must be {wanted}; got {came}")


def encoding(encoder: Encoder, where: str) -> Way:
    if not isinstance(encoder, Encoder):
        raise TypeError(f"{where}: encoder must be an Encoder; got {type(encoder).__name__}")
    config = encoder.config
    return Way(
        where=where,
        name="video",
        module=encoder,
        channels=config.in_channels,
        multiple=config.spatial_compression_ratio,
        chunk=config.num_sample_frames_batch_size,
        plan=partial(frames.encode_plan, config=config),
        frames_out=partial(frames.latent_frames, config=config),
    )


def decoding(decoder: Decoder, where: str) -> Way:
    if not isinstance(decoder, Decoder):
        raise TypeError(f"{where}: decoder must be a Decoder; got {type(decoder).__name__}")
    config = decoder.config
    return Way(
        where=where,
        name="latents",
        module=decoder,
        channels=config.latent_channels,
        multiple=1,
        chunk=config.num_latent_frames_batch_size,
        plan=partial(frames.decode_plan, config=config),
        frames_out=partial(frames.video_frames, config=config),
    )
