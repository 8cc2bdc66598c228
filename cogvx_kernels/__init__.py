"""Fast modules for video diffusion in torch, each tested against a plain-torch reference.

Importing this package imports neither torch nor Triton, needs no GPU and builds nothing: a name is
loaded from its module on first use (PEP 562). If torch is already imported, the ops are registered
at once, so that `torch.export.load` and `torch.jit.load` find `torch.ops.cogvx`: import torch first
to load a program.
"""

import importlib
import importlib.util
import sys
import types
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ._backend import BACKENDS as BACKENDS
    from ._backend import KernelFallbackWarning as KernelFallbackWarning
    from ._backend import OpModule as OpModule
    from ._backend import module_backend as module_backend
    from .conv3d import conv3d as conv3d
    from .expert_adaln import ExpertAdaLayerNorm as ExpertAdaLayerNorm
    from .expert_adaln import expert_adaln as expert_adaln
    from .expert_adaln import expert_adaln_reference as expert_adaln_reference
    from .expert_adaln import gated_residual as gated_residual
    from .expert_adaln import gated_residual_adaln as gated_residual_adaln
    from .expert_adaln import gated_residual_adaln_reference as gated_residual_adaln_reference
    from .expert_adaln import gated_residual_reference as gated_residual_reference
    from .expert_ffn import ExpertFFN as ExpertFFN
    from .expert_ffn import expert_ffn as expert_ffn
    from .expert_ffn import expert_ffn_reference as expert_ffn_reference
    from .frame_cache import FrameCacheJoin as FrameCacheJoin
    from .frame_cache import frame_cache_append as frame_cache_append
    from .frame_cache import frame_cache_join as frame_cache_join
    from .frame_cache import frame_cache_join_reference as frame_cache_join_reference
    from .frame_cache import frame_cache_push as frame_cache_push
    from .patching import DecodeState as DecodeState
    from .patching import UnsupportedModelError as UnsupportedModelError
    from .patching import explain as explain
    from .patching import patch as patch
    from .patching import patched as patched
    from .patching import stream_decode as stream_decode
    from .patching import supported as supported
    from .patching import unpatch as unpatch
    from .rope3d import QKNormRoPE3D as QKNormRoPE3D
    from .rope3d import RoPE3D as RoPE3D
    from .rope3d import crop_positions as crop_positions
    from .rope3d import qk_norm_rope3d as qk_norm_rope3d
    from .rope3d import qk_norm_rope3d_reference as qk_norm_rope3d_reference
    from .rope3d import rope3d as rope3d
    from .rope3d import rope3d_reference as rope3d_reference
    from .rope3d import rope3d_tables as rope3d_tables
    from .rope3d import slice_positions as slice_positions
    from .rope3d import split_headdim as split_headdim
    from .spatial_norm import SpatialNormSiLU as SpatialNormSiLU
    from .spatial_norm import residual_moments as residual_moments
    from .spatial_norm import residual_moments_reference as residual_moments_reference
    from .spatial_norm import spatial_norm_silu as spatial_norm_silu
    from .spatial_norm import spatial_norm_silu_reference as spatial_norm_silu_reference
    from .temporal_conv import TemporalConv as TemporalConv
    from .temporal_conv import temporal_conv as temporal_conv
    from .temporal_conv import temporal_conv_reference as temporal_conv_reference

__version__ = "0.1.0"

# Module of each public name; the imports above are for type checkers.
_MODULES = {
    "_backend": "BACKENDS KernelFallbackWarning OpModule module_backend",
    "conv3d": "conv3d",
    "expert_adaln": """
        ExpertAdaLayerNorm expert_adaln expert_adaln_reference gated_residual gated_residual_adaln
        gated_residual_adaln_reference gated_residual_reference
    """,
    "expert_ffn": "ExpertFFN expert_ffn expert_ffn_reference",
    "frame_cache": """
        FrameCacheJoin frame_cache_append frame_cache_join
        frame_cache_join_reference frame_cache_push
    """,
    "patching": """
        DecodeState UnsupportedModelError explain patch patched stream_decode supported unpatch
    """,
    "rope3d": """
        QKNormRoPE3D RoPE3D crop_positions qk_norm_rope3d qk_norm_rope3d_reference rope3d
        rope3d_reference rope3d_tables slice_positions split_headdim
    """,
    "spatial_norm": """
        SpatialNormSiLU residual_moments residual_moments_reference spatial_norm_silu
        spatial_norm_silu_reference
    """,
    "temporal_conv": "TemporalConv temporal_conv temporal_conv_reference",
}
_HOMES = {name: module for module, names in _MODULES.items() for name in names.split()}

__all__ = sorted(["__version__", *_HOMES])


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


class _Package(types.ModuleType):
    """This package's type: `cogvx_kernels.rope3d` stays the function when its module is loaded.

    Python sets a loaded submodule as an attribute of its package; `rope3d`, `conv3d` and others are
    both a module and a function.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, types.ModuleType) and _HOMES.get(name) == name:
            value = getattr(value, name)
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package

if "torch" in sys.modules:
    for _module in _MODULES:
        importlib.import_module(f".{_module}", __name__)
