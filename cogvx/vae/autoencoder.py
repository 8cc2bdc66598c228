"""CausalVAE: an encoder and a decoder that belong together."""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from ..config import VAEConfig
from .decoder import Decoder
from .distribution import DiagonalGaussian
from .encoder import Encoder
from .state import DecodeState, EncodeState
from .tiling import Tiling
from .walk import Progress, decode, encode, stream_decode, stream_encode


class CausalVAE(nn.Module):
    """The 3-D causal VAE of CogVideoX: 49 frames to 13 latent frames, and back.

    Latents are raw here; whoever diffuses them multiplies by `config.scaling_factor`. The keys of
    the state dict are those of the released files. Source: fact sheet, section 4.
    """

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)

    @classmethod
    def of(cls, encoder: Encoder, decoder: Decoder) -> "CausalVAE":
        """The VAE of an encoder and a decoder that are there; they must be of one config."""
        if encoder.config != decoder.config:
            raise ValueError(
                f"CausalVAE.of: decoder must have the encoder's config {encoder.config}; "
                f"got {decoder.config}"
            )
        with torch.device("meta"):
            vae = cls(encoder.config)
        vae.encoder, vae.decoder = encoder, decoder
        return vae

    @property
    def gradient_checkpointing(self) -> bool:
        """Whether activations are made again in the backward pass instead of kept."""
        return self.encoder.gradient_checkpointing and self.decoder.gradient_checkpointing

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, on: bool) -> None:
        self.encoder.gradient_checkpointing = self.decoder.gradient_checkpointing = on

    def encode(
        self,
        video: Tensor,
        *,
        tiling: Tiling | None = None,
        slicing: bool = False,
        progress: Progress | None = None,
    ) -> DiagonalGaussian:
        """The distribution of a clip's raw latents: `cogvx.vae.encode`."""
        return encode(self.encoder, video, tiling=tiling, slicing=slicing, progress=progress)

    def decode(
        self,
        latents: Tensor,
        *,
        tiling: Tiling | None = None,
        slicing: bool = False,
        progress: Progress | None = None,
    ) -> Tensor:
        """The video of raw latents: `cogvx.vae.decode`."""
        return decode(self.decoder, latents, tiling=tiling, slicing=slicing, progress=progress)

    def stream_encode(
        self,
        video: Tensor | Iterable[Tensor],
        state: EncodeState | None = None,
        *,
        total: int | None = None,
        last: bool = True,
    ) -> Iterator[DiagonalGaussian]:
        """The chunks of `encode`, one by one, in constant memory: `cogvx.vae.stream_encode`."""
        return stream_encode(self.encoder, video, state, total=total, last=last)

    def stream_decode(
        self,
        latents: Tensor | Iterable[Tensor],
        state: DecodeState | None = None,
        *,
        total: int | None = None,
        last: bool = True,
    ) -> Iterator[Tensor]:
        """The chunks of `decode`, one by one, in constant memory: `cogvx.vae.stream_decode`."""
        return stream_decode(self.decoder, latents, state, total=total, last=last)

    def forward(self, video: Tensor) -> Tensor:
        """The reconstruction of a video from the mode of its latents."""
        return self.decode(self.encode(video).mode())
