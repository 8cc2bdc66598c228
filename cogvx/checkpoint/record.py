"""Records of the models and options that a file was made with, and fingerprints of tensors.

A record is a flat dict of JSON values, kept in the metadata of latents and checkpoints.
"""

import ctypes
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config import Config
from ..files import CheckpointError
from ..transformer import ExpertTransformer
from ..vae import CausalVAE

PathLike = str | os.PathLike[str]
Record = dict[str, Any]
INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def check_record(path: PathLike, has: Record, wanted: Record) -> None:
    """Raise CheckpointError, with every difference, unless `has` agrees with `wanted`."""
    if found := differences(has, wanted):
        raise CheckpointError(f"{Path(path)}: was made with other models or options: {found}")


def differences(has: Record, wanted: Record) -> str:
    """List the entries of `wanted` that `has` lacks or has otherwise; "" if none."""
    return "; ".join(
        f"{name} {_short(has.get(name))} there, {_short(value)} here"
        for name, value in wanted.items()
        if has.get(name) != value
    )


def record_of_config(name: str, config: Config) -> Record:
    """Record of a model's config, each key prefixed with the model's name."""
    return to_json({f"{name}.{key}": value for key, value in config.to_dict().items()})


def record_of_model(
    name: str,
    model: ExpertTransformer | CausalVAE,
    weights: Mapping[str, Tensor] | None = None,
) -> Record:
    """Record of a model's config, dtype and weights, each key prefixed with the model's name.

    weights: tensors by name, if not the model's current ones.
    """
    return {
        **record_of_config(name, model.config),
        f"{name}.dtype": str(next(model.parameters()).dtype),
        f"{name}.weights": fingerprint_of_weights(
            model.state_dict() if weights is None else weights
        ),
    }


def fingerprint(tensor: Tensor) -> str:
    """Hash of a tensor's dtype, shape and bits."""
    plain = tensor.detach().cpu().contiguous()
    size = plain.numel() * plain.element_size()
    held = (ctypes.c_ubyte * size).from_address(plain.data_ptr()) if size else b""
    return hashed(f"{plain.dtype} {tuple(plain.shape)}".encode(), held)


def fingerprint_of_weights(state: Mapping[str, Tensor]) -> str:
    """Hash of the names, dtypes and shapes of a state dict and of the integer sum of each tensor.

    An integer sum does not depend on the order, so the hash is the same on every device.
    """
    sums = [
        tensor.detach().contiguous().view(INTEGERS[tensor.element_size()]).sum(dtype=torch.int64)
        for tensor in state.values()
    ]
    described = [f"{name} {t.dtype} {tuple(t.shape)}" for name, t in state.items()]
    values = torch.stack([total.cpu() for total in sums]).tolist()
    return hashed(json.dumps([described, values]).encode())


def hashed(*parts: Any) -> str:
    """First 32 hex digits of a SHA-256."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()[:32]


def to_json(values: Record) -> Record:
    """The values after a round trip through JSON."""
    plain: Record = json.loads(json.dumps(values))
    return plain


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:60]}…"
