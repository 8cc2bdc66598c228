"""Save and resume a generation: after some steps, or after all of them, to decode.

One safetensors file holds the latents, scaled and padded as the transformer has them. While steps
are left it also holds what they need: the solver's previous x0, the generators' state and the
conditioning (embeddings, the image's latents). Its metadata holds a record of the models and
options; a file is only used if the record agrees.
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..checkpoint import read_tensors, write_tensors
from ..checkpoint.record import Record, check_record, fingerprint, record_of_config, to_json
from ..checkpoint.tensors import TensorFile
from ..files import CheckpointError, check_writable, parse_json
from ..generation import WHERE
from ..vae import CausalVAE, Tiling
from ..validation import invalid
from .conditioning import Progress, decode
from .denoise import Conditioning, State
from .params import Request

FORMAT = "cogvx latents 2"
# Options that may differ when a run is resumed. (The generators are recorded apart.)
NOT_RECORDED = {
    "seed", "generator", "num_videos_per_prompt", "tiling", "output", "callback", "progress",
    "save_latents", "checkpoint_every", "resume",
}  # fmt: skip

PathLike = str | os.PathLike[str]
T = TypeVar("T", State, Conditioning)


@dataclass(frozen=True)
class Saved:
    """Contents of a file.

    record            models and options
    steps             of the run; state.done of them are done
    conditioning      for the steps that are left; None if none are left
    generator_states  likewise, (bytes,) or (batch, bytes)
    """

    record: Record
    steps: int
    state: State
    conditioning: Conditioning | None = None
    generator_states: Tensor | None = None

    @property
    def padding(self) -> int:
        """Latent frames at the front that are not decoded."""
        return int(self.record["padding"])

    def to(self, device: torch.device) -> "Saved":
        """Move everything except the generator states, which stay on the CPU."""
        state, conditioning = _to(self.state, device), self.conditioning
        return replace(self, state=state, conditioning=conditioning and _to(conditioning, device))

    def restore(self, generators: Sequence[torch.Generator]) -> None:
        """Set the states of the generators, if steps are left."""
        if self.generator_states is not None:
            states = self.generator_states.view(len(generators), -1)
            for generator, state in zip(generators, states, strict=True):
                generator.set_state(state.clone())  # torch crashes on a view


def _to(value: T, device: torch.device) -> T:
    moved: dict[str, Any] = {
        name: held.to(device) for name, held in vars(value).items() if isinstance(held, Tensor)
    }
    return replace(value, **moved)


def write(path: PathLike, saved: Saved) -> None:
    """Write the file atomically; see `cogvx.checkpoint.atomic_path`."""
    tensors = {"latents": saved.state.latents}
    if saved.conditioning is not None:
        rest = {"prev_x0": saved.state.prev_x0, "generator_states": saved.generator_states}
        rest |= vars(saved.conditioning)
        tensors |= {name: tensor for name, tensor in rest.items() if tensor is not None}
    metadata = {
        "format": FORMAT,
        "done": str(saved.state.done),
        "steps": str(saved.steps),
        "record": json.dumps(saved.record, sort_keys=True),
    }
    write_tensors(path, tensors, metadata)


def read(path: PathLike) -> Saved:
    """Read a file to the CPU. Raises CheckpointError if `write` did not write it."""
    tensors, metadata = read_tensors(path)
    record = _record(path, metadata)
    try:
        done, steps = int(metadata["done"]), int(metadata["steps"])
        if record["padding"] not in range(len(tensors["latents"][0])):
            raise ValueError(f"padding must be less than the frames; got {record['padding']!r}")
        state = State(tensors["latents"], tensors.get("prev_x0"), done)
        if done >= steps:
            return Saved(record, steps, state)
        conditioning = Conditioning(tensors["text"], tensors.get("negative"), tensors.get("image"))
        return Saved(record, steps, state, conditioning, tensors["generator_states"])
    except (KeyError, ValueError) as error:
        raise _damaged(path, error) from error


def read_record(path: PathLike) -> Record:
    """Read the record of a file, without its tensors. Raises CheckpointError as `read`."""
    with TensorFile(path) as file:
        return _record(path, file.metadata)


def _record(path: PathLike, metadata: Mapping[str, str]) -> Record:
    if metadata.get("format") != FORMAT:
        came = metadata.get("format", "another file")
        raise CheckpointError(
            f"{path}: must be latents that this version of CogVideoX.generate saved, {FORMAT!r}; "
            f"got {came[:60]!r}"
        )
    try:
        return parse_json(metadata["record"].encode(), f"{path}: its record")
    except (KeyError, ValueError) as error:
        raise _damaged(path, error) from error


def _damaged(path: PathLike, error: KeyError | ValueError) -> CheckpointError:
    if isinstance(error, KeyError):
        return CheckpointError(f"{path}: must hold {error} as it was written; it is gone")
    return CheckpointError(f"{path}: its metadata is damaged: {error}")


def decode_saved(
    vae: CausalVAE,
    path: PathLike,
    tiling: Tiling | None = None,
    progress: Progress | None = None,
) -> Tensor:
    """Decode latents that `CogVideoX.generate` saved; the transformer is not needed.

    The VAE must be the model's; its dtype, device and tiling may differ.

    Raises CheckpointError if the file is of another kind or another VAE, or has steps left.
    """
    saved = read(path)
    check_record(path, saved.record, record_of_config("vae", vae.config))
    if saved.state.done < saved.steps:
        raise CheckpointError(
            f"{path}: must hold latents after all steps; got {saved.state.done} of {saved.steps}: "
            "go on with generate(resume=…)"
        )
    return decode(vae, saved.state.latents[:, saved.padding :], tiling, progress)


def check_saving(save_latents: PathLike | None, checkpoint_every: int | None) -> None:
    """Raises ValueError if the file cannot be written, or `checkpoint_every` has no file."""
    if checkpoint_every is not None and (checkpoint_every < 1 or save_latents is None):
        raise invalid(
            WHERE, "checkpoint_every", "at least 1, and save_latents name the file",
            f"{checkpoint_every} and {save_latents}",
        )  # fmt: skip
    if save_latents is not None:
        path = Path(save_latents)
        if path.is_dir() or not path.parent.is_dir():
            raise invalid(WHERE, "save_latents", "a file in a folder that exists", path)
        try:
            check_writable(path)
        except OSError as error:
            wanted, got = "where a file can be written", f"{path}: {error.strerror}"
            raise invalid(WHERE, "save_latents", wanted, got, OSError) from error


def record_of(request: Request) -> Record:
    """Record of the options that decide the video; tensors as hashes."""
    options = {name: value for name, value in vars(request).items() if name not in NOT_RECORDED}
    hashes = {name: fingerprint(v) for name, v in options.items() if isinstance(v, Tensor)}
    return to_json({**options, "prompt": request.prompts, **hashes})
