"""A generation in a file: after some steps, to go on from; after all of them, to decode.

One safetensors file holds the latents, scaled and padded as the transformer has them. While steps
are left it also holds what they need: the solver's memory, the state of the random numbers, and
the conditions (embeddings, the image's latents). Its metadata holds a record of the models and of
everything asked for; a file is used only where the record agrees.
"""

import ctypes
import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..checkpoint import read_tensors, write_tensors
from ..config import Config
from ..files import CheckpointError, check_writable, parse_json
from ..transformer import ExpertTransformer
from ..vae import CausalVAE, Tiling
from .conditioning import Progress, decode
from .denoise import Conditions, State
from .request import Inputs, Request

FORMAT = "cogvx latents 1"
INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

PathLike = str | os.PathLike[str]
Record = dict[str, Any]
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


def check_record(path: PathLike, has: Record, wanted: Record) -> None:
    """Raises CheckpointError, with every difference, unless `has` holds what `wanted` does."""
    if told := differences(has, wanted):
        raise CheckpointError(f"{Path(path)}: was made with other models or options: {told}")


def differences(has: Record, wanted: Record) -> str:
    """Where a record does not hold what is wanted, in words; "" if nowhere."""
    return "; ".join(
        f"{name} {_short(has.get(name))} there, {_short(value)} here"
        for name, value in wanted.items()
        if has.get(name) != value
    )


def record_of(request: Request, inputs: Inputs) -> Record:
    """What was asked for, in JSON's values; tensors by the hash of what they hold."""
    given = {**vars(inputs), "prompt": inputs.prompts}
    hashes = {name: fingerprint(v) for name, v in given.items() if isinstance(v, Tensor)}
    return _plain({**asdict(request), **given, **hashes})


def record_of_config(name: str, config: Config) -> Record:
    """A model's config, each field under the model's name."""
    return _plain({f"{name}.{key}": value for key, value in config.to_dict().items()})


def record_of_model(
    name: str,
    model: ExpertTransformer | CausalVAE,
    weights: Mapping[str, Tensor] | None = None,
) -> Record:
    """Config, dtype and weights of a model, each under the model's name.

    weights: its tensors by name, where they are not those that it has now.
    """
    return {
        **record_of_config(name, model.config),
        f"{name}.dtype": str(next(model.parameters()).dtype),
        f"{name}.weights": fingerprint_of_weights(
            model.state_dict() if weights is None else weights
        ),
    }


def fingerprint(tensor: Tensor) -> str:
    """A hash of dtype, shape and every bit."""
    plain = tensor.detach().cpu().contiguous()
    size = plain.numel() * plain.element_size()
    held = (ctypes.c_ubyte * size).from_address(plain.data_ptr()) if size else b""
    return hashed(f"{plain.dtype} {tuple(plain.shape)}".encode(), held)


def fingerprint_of_weights(state: Mapping[str, Tensor]) -> str:
    """A hash over the names, dtypes and shapes of a model's tensors and the sum of each one's
    bits, which is exact in any order: the same on every device, at the cost of one look."""
    sums = [
        tensor.detach().contiguous().view(INTEGERS[tensor.element_size()]).sum(dtype=torch.int64)
        for tensor in state.values()
    ]
    said = [f"{name} {t.dtype} {tuple(t.shape)}" for name, t in state.items()]
    values = torch.stack([total.cpu() for total in sums]).tolist()
    return hashed(json.dumps([said, values]).encode())


def hashed(*parts: Any) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()[:32]


def _plain(values: Record) -> Record:
    """The values as JSON gives them back."""
    plain: Record = json.loads(json.dumps(values))
    return plain


def _short(value: Any) -> str:
    said = json.dumps(value)
    return said if len(said) <= 60 else f"{said[:60]}…"
