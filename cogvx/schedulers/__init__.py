"""Noise schedule, timesteps and solvers (DDIM, DPM-Solver++)."""

from .ddim import DDIM
from .dpm import DPMSolver
from .guidance import dynamic_guidance
from .noise_schedule import NoiseSchedule
from .solver import Generators, Solver, randn_tensor
from .timesteps import TimestepSchedule, timestep_schedule

SOLVERS: dict[str, type[Solver]] = {"ddim": DDIM, "dpm": DPMSolver}

__all__ = [
    "DDIM",
    "DPMSolver",
    "Generators",
    "NoiseSchedule",
    "SOLVERS",
    "Solver",
    "TimestepSchedule",
    "dynamic_guidance",
    "randn_tensor",
    "timestep_schedule",
]
