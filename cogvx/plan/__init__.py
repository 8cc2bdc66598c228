"""Forecasts from configs: memory of a clip by stage, operations, time on several GPUs."""

from .flops import denoise_flops, vae_flops
from .meshes import Mesh, MeshForecast, forecast_meshes
from .stages import GIB, MIB, Plan, PlanError, Stage, forecast, size

__all__ = [
    "GIB",
    "MIB",
    "Mesh",
    "MeshForecast",
    "Plan",
    "PlanError",
    "Stage",
    "denoise_flops",
    "forecast",
    "forecast_meshes",
    "size",
    "vae_flops",
]
