"""CogVideoX on the ops of cogvx_kernels: the released models and a factorised one.

Videos and latents are (batch, frames, channels, height, width) in every public function, and videos
are in [-1, 1]. Importing this package imports no torch: names are loaded on first use (PEP 562), as
are transformers, PyAV and Triton.
"""

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

from cogvx_kernels import __version__ as __version__

if TYPE_CHECKING:
    from . import frames as frames
    from .checkpoint import CheckpointError as CheckpointError
    from .checkpoint import load_transformer as load_transformer
    from .checkpoint import load_vae as load_vae
    from .config import PRESETS as PRESETS
    from .config import SchedulerConfig as SchedulerConfig
    from .config import TransformerConfig as TransformerConfig
    from .config import VAEConfig as VAEConfig
    from .factorized import build as build
    from .factorized import build_transformer as build_transformer
    from .factorized import build_vae as build_vae
    from .factorized import decode_latent as decode_latent
    from .factorized import encode_video as encode_video
    from .factorized import param_count as param_count
    from .factorized import recommended_defaults as recommended_defaults
    from .factorized import rope3d_freqs as rope3d_freqs
    from .generation import GenerationParams as GenerationParams
    from .pipeline import CogVideoX as CogVideoX
    from .transformer import ExpertTransformer as ExpertTransformer
    from .transformer import load_balancing_loss as load_balancing_loss
    from .transformer import upcycle as upcycle
    from .vae import CausalVAE as CausalVAE
    from .vae import DecodeState as DecodeState
    from .vae import EncodeState as EncodeState
    from .vae import Tiling as Tiling

# Module of each public name. The imports above are for type checkers.
_MODULES = {
    "checkpoint": (
        "CheckpointError",
        "load_transformer",
        "load_vae",
    ),
    "config": (
        "PRESETS",
        "SchedulerConfig",
        "TransformerConfig",
        "VAEConfig",
    ),
    "factorized": (
        "build",
        "build_transformer",
        "build_vae",
        "decode_latent",
        "encode_video",
        "param_count",
        "recommended_defaults",
        "rope3d_freqs",
    ),
    "generation": ("GenerationParams",),
    "pipeline": ("CogVideoX",),
    "transformer": (
        "ExpertTransformer",
        "load_balancing_loss",
        "upcycle",
    ),
    "vae": (
        "CausalVAE",
        "DecodeState",
        "EncodeState",
        "Tiling",
    ),
}
_HOMES = {name: module for module, names in _MODULES.items() for name in names}

__all__ = sorted(["__version__", "frames", *_HOMES])


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        value = getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
        globals()[name] = value
        return value
    if not name.startswith("_") and importlib.util.find_spec(f"{__name__}.{name}"):
        return importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
