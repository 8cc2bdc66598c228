"""The causal VAE: encoder and decoder of one config."""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from cogvx_kernels.conv3d import ALGOS
from cogvx_kernels.streaming import DecodeState, EncodeState

from ..config import VAEConfig
from ..validation import check_choice
from .chunked import Progress, decode, encode, stream_decode, stream_encode
from .decoder import Decoder
from .distribution import DiagonalGaussian
from .encoder import Encoder
from .options import Options
from .tiling import Tiling


class CausalVAE(nn.Module):
    """The 3-D causal VAE of CogVideoX: 49 frames to 13 latent frames, and back.

    Latents are raw here: not yet multiplied by `config.scaling_factor`, as diffusion expects. The
    keys of the state dict are those of the released files. Source: `docs/model.md`, section 4.

    The ops run on the backend of `cogvx_kernels.module_backend` at construction.
    """

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        self.config = config
        options = Options()
        self.encoder = Encoder(config, options)
        self.decoder = Decoder(config, options)

    @classmethod
    def of(cls, encoder: Encoder, decoder: Decoder) -> "CausalVAE":
        """The VAE of an encoder and a decoder that have the same config."""
        if encoder.config != decoder.config:
            raise ValueError(
                f"CausalVAE.of: decoder must have the encoder's config {encoder.config}; "
                f"got {decoder.config}"
            )
        with torch.device("meta"):
            vae = cls(encoder.config)
        vae.encoder, vae.decoder = encoder, decoder
        return vae

    def set_convolutions(self, algo: str = "auto", fold: bool = True) -> None:
        """Choose how convolutions are computed; values agree within rounding.

        algo  "conv3d", one 3-D convolution each; "conv2d", one 2-D convolution for each frame of
              the kernel; "auto", whichever is known to be right on the device, see
              `cogvx_kernels.conv3d`
        fold  upsample by four convolutions of the small picture, see `cogvx_kernels.resample`
        """
        check_choice("set_convolutions", "algo", algo, ALGOS)
        for coder in (self.encoder, self.decoder):
            coder.options.algo, coder.options.fold = algo, fold

    @property
    def gradient_checkpointing(self) -> bool:
        """True if activations are recomputed in the backward pass instead of kept."""
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
        """The distribution of a clip's raw latents, not multiplied by `config.scaling_factor`.

        Args:
            video: (batch, frames, in_channels, height, width) in [-1, 1], dtype and device of the
                weights; frames by the rule of `cogvx.frames`, sides multiples of 8.
            tiling: cut frames that are larger than a tile; None never does.
            slicing: take the clips of the batch one by one.
            progress: called with (chunks done, chunks in all): at the start and after each chunk.

        Returns:
            A distribution whose `mode()` and `sample()` are (batch, latent frames, latent_channels,
            height / 8, width / 8).

        Raises:
            TypeError, ValueError: an argument is not as above; nothing has been computed.
        """
        return encode(self.encoder, video, tiling=tiling, slicing=slicing, progress=progress)

    def decode(
        self,
        latents: Tensor,
        *,
        tiling: Tiling | None = None,
        slicing: bool = False,
        progress: Progress | None = None,
    ) -> Tensor:
        """The video of raw latents.

        Args:
            latents: (batch, latent frames, latent_channels, height, width), divided by
                `config.scaling_factor`, dtype and device of the weights; any number of frames.
            tiling, slicing, progress: as in `encode`; tiles are measured in pixels here too.

        Returns:
            (batch, frames, out_channels, 8 · height, 8 · width), values in about [-1, 1].
        """
        return decode(self.decoder, latents, tiling=tiling, slicing=slicing, progress=progress)

    def stream_encode(
        self,
        video: Tensor | Iterable[Tensor],
        state: EncodeState | None = None,
        *,
        total: int | None = None,
        last: bool = True,
    ) -> Iterator[DiagonalGaussian]:
        """`encode` as a stream: the distribution of each chunk, in order, as soon as possible.

        Memory does not grow with the clip, and the results are bit for bit those of `encode`.

        Args:
            video: (batch, frames, in_channels, height, width), or pieces of it in order, of any
                number of frames each.
            state: position in the clip, continued and updated; None begins a clip.
            total: frames of the whole clip. A clip given as one tensor needs none, nor does the
                factorised VAE. The released VAE puts the remainder into the *first* chunk, so
                without it the pieces must be that VAE's own chunks: 1, 8 or 9 frames, then 8 each.
            last: True if the clip ends with this video; if not, frames whose chunk is not full yet
                wait in the state.

        Yields:
            The distribution of each chunk's latents, (batch, latent frames, latent_channels,
            height / 8, width / 8).

        Raises:
            TypeError, ValueError: an argument, or a piece when it comes, is not as above. The state
                is as it was before that piece.
            RuntimeError: the state's clip has ended, or was lost to an exception in a chunk.
        """
        return stream_encode(self.encoder, video, state, total=total, last=last)

    def stream_decode(
        self,
        latents: Tensor | Iterable[Tensor],
        state: DecodeState | None = None,
        *,
        total: int | None = None,
        last: bool = True,
    ) -> Iterator[Tensor]:
        """`decode` as a stream: the video of each chunk, in order, as soon as possible.

        Args:
            latents: (batch, latent frames, latent_channels, height, width), or pieces of it.
            state, total, last: as in `stream_encode`, counted in latent frames: the released VAE's
                own chunks are 1, 2 or 3 frames, then 2 each.

        Yields:
            The video of each chunk, (batch, frames, out_channels, 8 · height, 8 · width).
        """
        return stream_decode(self.decoder, latents, state, total=total, last=last)

    def forward(self, video: Tensor) -> Tensor:
        """Reconstruct a video from the mode of its latents.

        Args:
            video: (batch, frames, in_channels, height, width), as in `encode`.

        Returns:
            (batch, frames, out_channels, height, width).
        """
        return self.decode(self.encode(video).mode())
