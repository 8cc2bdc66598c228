"""CogVideoX in thin torch, on the ops of cogvx_kernels: the released models and the factorised one.

Videos and latents are (batch, frames, channels, height, width) at every public door, and videos are
in [-1, 1]. Importing this package imports neither transformers nor PyAV nor Triton.
"""

from . import frames
from .checkpoint import CheckpointError, load_transformer, load_vae
from .config import PRESETS, SchedulerConfig, TransformerConfig, VAEConfig
from .factorized import (
    build,
    build_transformer,
    build_vae,
    decode_latent,
    encode_video,
    param_count,
    recommended_defaults,
    rope3d_freqs,
)
from .pipeline import CogVideoX
from .transformer import ExpertTransformer, load_balancing_loss, upcycle
from .vae import CausalVAE, DecodeState, EncodeState, Tiling

__all__ = [
    "CausalVAE",
    "CheckpointError",
    "CogVideoX",
    "DecodeState",
    "EncodeState",
    "ExpertTransformer",
    "PRESETS",
    "SchedulerConfig",
    "Tiling",
    "TransformerConfig",
    "VAEConfig",
    "build",
    "build_transformer",
    "build_vae",
    "decode_latent",
    "encode_video",
    "frames",
    "load_balancing_loss",
    "load_transformer",
    "load_vae",
    "param_count",
    "recommended_defaults",
    "rope3d_freqs",
    "upcycle",
]
