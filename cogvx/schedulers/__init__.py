"""Noise: how much there is at each timestep, and how a solver takes it away."""

from .ddim import DDIM
from .dpm import DPMSolver
from .guidance import dynamic_guidance
from .noise_schedule import NoiseSchedule
from .solver import Generators, Solver, draw
from .trajectory import Trajectory, trajectory

SOLVERS: dict[str, type[Solver]] = {"ddim": DDIM, "dpm": DPMSolver}

__all__ = [
    "DDIM",
    "DPMSolver",
    "Generators",
    "NoiseSchedule",
    "SOLVERS",
    "Solver",
    "Trajectory",
    "draw",
    "dynamic_guidance",
    "trajectory",
]
