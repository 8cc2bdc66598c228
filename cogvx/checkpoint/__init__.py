"""Load and save models: `folder` for components, `tensors` for single files."""

from ..files import CheckpointError, atomic_path
from .folder import (
    load_scheduler,
    load_transformer,
    load_vae,
    save_scheduler,
    save_transformer,
    save_vae,
)
from .tensors import read_tensors, write_tensors

__all__ = [
    "CheckpointError",
    "atomic_path",
    "load_scheduler",
    "load_transformer",
    "load_vae",
    "read_tensors",
    "save_scheduler",
    "save_transformer",
    "save_vae",
    "write_tensors",
]
