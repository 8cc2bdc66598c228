"""A generation in a file: after some steps, to go on from; after all of them, to decode.

One safetensors file holds the latents, scaled and padded as the transformer has them. While steps
are left it also holds what they need: the solver's memory, the state of the random numbers, and
the conditions (embeddings, the image's latents). Its metadata holds a record of the models and of
everything asked for; a file is used only where the record agrees.
"""

import json
import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..checkpoint import read_tensors, write_tensors
from ..checkpoint.record import Record, check_record, fingerprint, record_of_config, to_json
from ..files import CheckpointError, check_writable, parse_json
from ..vae import CausalVAE, Tiling
from .conditioning import Progress, decode
from .denoise import Conditions, State
from .request import Inputs, Request

FORMAT = "cogvx latents 1"

PathLike = str | os.PathLike[str]
T = TypeVar("T", State, Conditions)


@dataclass(frozen=True)
class Saved:
    """What a file holds.

    record      of models and options
    steps       how many there are; state.done of them are done
    conditions  what the steps that are left need, with the state of the random numbers; None if
                none are left
    """

    record: Record
    steps: int
    state: State
    conditions: Conditions | None = None
    random: Tensor | None = None

    @property
    def padding(self) -> int:
        """Latent frames at the front that are not decoded."""
        return int(self.record["padding"])

    def to(self, device: torch.device) -> "Saved":
        """All but the random numbers on a device."""
        state, conditions = _to(self.state, device), self.conditions
        return replace(self, state=state, conditions=conditions and _to(conditions, device))


def _to(value: T, device: torch.device) -> T:
    moved: dict[str, Any] = {
        name: held.to(device) for name, held in vars(value).items() if isinstance(held, Tensor)
    }
    return replace(value, **moved)


def write(path: PathLike, has: Saved) -> None:
    """Writes the file, whole or not at all; see `cogvx.checkpoint.atomic_path`."""
    tensors = {"latents": has.state.latents}
    if has.conditions is not None:
        rest = {**vars(has.conditions), "memory": has.state.memory, "random": has.random}
        tensors |= {name: tensor for name, tensor in rest.items() if tensor is not None}
    metadata = {
        "format": FORMAT,
        "done": str(has.state.done),
        "steps": str(has.steps),
        "record": json.dumps(has.record, sort_keys=True),
    }
    write_tensors(path, tensors, metadata)


def read(path: PathLike) -> Saved:
    """What a file holds, on the CPU. Raises CheckpointError if `write` wrote no such file."""
    tensors, metadata = read_tensors(path)
    if metadata.get("format") != FORMAT:
        came = metadata.get("format", "another file")
        raise CheckpointError(
            f"{path}: must be latents that CogVideoX.generate saved; got {came[:60]!r}"
        )
    try:
        done, steps = int(metadata["done"]), int(metadata["steps"])
        record = parse_json(metadata["record"].encode(), f"{path}: its record")
        if record["padding"] not in range(len(tensors["latents"][0])):
            raise ValueError(f"padding must be less than the frames; got {record['padding']!r}")
        state = State(tensors["latents"], tensors.get("memory"), done)
        if done >= steps:
            return Saved(record, steps, state)
        conditions = Conditions(tensors["text"], tensors.get("negative"), tensors.get("image"))
        return Saved(record, steps, state, conditions, tensors["random"])
    except KeyError as error:
        raise CheckpointError(f"{path}: must hold {error} as it was written; it is gone") from error
    except ValueError as error:
        raise CheckpointError(f"{path}: its metadata is damaged: {error}") from error


def decode_saved(
    vae: CausalVAE,
    path: PathLike,
    tiling: Tiling | None = None,
    progress: Progress | None = None,
) -> Tensor:
    """The video of latents that `CogVideoX.generate` saved; the transformer is not needed.

    The VAE must be the model's; its dtype, device and tiling are free.

    Raises CheckpointError if the file is no such file, belongs to another VAE, or has steps left.
    """
    has = read(path)
    check_record(path, has.record, record_of_config("vae", vae.config))
    if has.state.done < has.steps:
        raise CheckpointError(
            f"{path}: must hold latents after all steps; got {has.state.done} of {has.steps}: go "
            "on with generate(resume=…)"
        )
    return decode(vae, has.state.latents[:, has.padding :], tiling, progress)


def check_saving(save_latents: PathLike | None, checkpoint_every: int | None) -> None:
    """Raises ValueError unless the file can be written and there is one for the checkpoints."""
    where = "CogVideoX.generate"
    if checkpoint_every is not None and (checkpoint_every < 1 or save_latents is None):
        raise ValueError(
            f"{where}: checkpoint_every must be at least 1, and save_latents name the file; got "
            f"{checkpoint_every} and {save_latents}"
        )
    if save_latents is not None:
        path = Path(save_latents)
        if path.is_dir() or not path.parent.is_dir():
            raise ValueError(
                f"{where}: save_latents must be a file in a folder that exists; got {path}"
            )
        try:
            check_writable(path)
        except OSError as error:
            raise OSError(
                f"{where}: save_latents must be where a file can be written; got {path}: "
                f"{error.strerror}"
            ) from error


def record_of(request: Request, inputs: Inputs) -> Record:
    """What was asked for, in JSON's values; tensors by the hash of what they hold."""
    given = {**vars(inputs), "prompt": inputs.prompts}
    hashes = {name: fingerprint(v) for name, v in given.items() if isinstance(v, Tensor)}
    return to_json({**asdict(request), **given, **hashes})
