"""The 3-D causal VAE: video to latents and back, whole or as a stream."""

from cogvx_kernels.streaming import DecodeState, EncodeState, FrameCache

from .autoencoder import CausalVAE
from .chunked import decode, encode, stream_decode, stream_encode
from .decoder import Decoder
from .distribution import DiagonalGaussian
from .encoder import Encoder
from .tiling import Tiling

__all__ = [
    "CausalVAE",
    "DecodeState",
    "Decoder",
    "DiagonalGaussian",
    "EncodeState",
    "Encoder",
    "FrameCache",
    "Tiling",
    "decode",
    "encode",
    "stream_decode",
    "stream_encode",
]
