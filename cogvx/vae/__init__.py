"""The 3-D causal VAE: video to latents and back, whole or as a stream."""

from .autoencoder import CausalVAE
from .decoder import Decoder
from .distribution import DiagonalGaussian
from .encoder import Encoder
from .state import DecodeState, EncodeState, FrameCache
from .tiling import Tiling
from .walk import decode, encode, stream_decode, stream_encode

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
