"""Merge LoRA adapters into a transformer's weights, and remove them bit for bit."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ..checkpoint.lora import LowRank, adapter_file, read_lora
from ..checkpoint.record import fingerprint, hashed
from ..transformer import ExpertTransformer


@dataclass(frozen=True)
class Adapter:
    """A loaded adapter; `digest` distinguishes adapters of the same name."""

    name: str
    layers: Mapping[str, LowRank]
    scale: float
    digest: str

    def __str__(self) -> str:
        return f"{self.name} (scale {self.scale:g}, {self.digest[:8]})"


class Adapters:
    """Adapters merged into one transformer: each weight is the original plus their sum.

    originals  original weights of the adapted layers, on the CPU (3.2 GB for the attention of 5B in
               bfloat16)
    """

    def __init__(self, transformer: ExpertTransformer) -> None:
        self.transformer = transformer
        self.loaded: tuple[Adapter, ...] = ()
        self.originals: dict[str, Tensor] = {}

    def add(self, path: Path, scale: float) -> None:
        """Read an adapter and merge it. On an error all weights stay as they were."""
        if isinstance(scale, bool) or not isinstance(scale, (int, float)):
            raise TypeError(f"load_lora: scale must be a number; got {scale!r}")
        if not math.isfinite(scale):
            raise ValueError(f"load_lora: scale must be a finite number; got {scale}")
        layers = read_lora(path, self.transformer)
        file = adapter_file(path)
        name = f"{path.resolve().name}/{file.name}" if path.is_dir() else file.name
        new = Adapter(name, layers, float(scale), _digest(layers))
        names = [f"{layer}.{part}" for layer, change in layers.items() for part in change.parts]
        for parameter in names:
            self._check(parameter)
        before, self.loaded = self.loaded, (*self.loaded, new)
        try:
            for parameter in names:
                self._merge(parameter)
        except BaseException:
            self.loaded = before
            for parameter in names:
                if parameter in self.originals:
                    self._merge(parameter)
            raise

    def remove(self) -> None:
        """Restore every original weight."""
        self.loaded = ()
        for parameter in list(self.originals):
            self._merge(parameter)

    def record(self) -> str | None:
        """Names, scales and digests, for the record of a run; None without adapters."""
        return ", ".join(map(str, self.loaded)) or None

    def weights(self) -> dict[str, Tensor]:
        """State dict of the transformer with the original weights."""
        state = self.transformer.state_dict()
        return state | {name: t.to(state[name].dtype) for name, t in self.originals.items()}

    def _check(self, name: str) -> None:
        parameter = self.transformer.get_parameter(name)
        if type(parameter) is not nn.Parameter or not parameter.is_floating_point():
            raise TypeError(
                f"load_lora: {name} must be a plain floating weight to take a LoRA; got "
                f"{type(parameter).__name__} of {parameter.dtype}: load it before quantising"
            )

    @torch.no_grad()
    def _merge(self, name: str) -> None:
        """Set a parameter to its original plus the loaded adapters' sum, computed in float32."""
        parameter = self.transformer.get_parameter(name)
        layer, part = name.rsplit(".", 1)
        active = [
            (adapter.scale, adapter.layers[layer])
            for adapter in self.loaded
            if layer in adapter.layers and part in adapter.layers[layer].parts
        ]
        original = self.originals.setdefault(name, parameter.detach().to("cpu", copy=True))
        value = original.to(parameter.device)
        if active:
            value = value.to(torch.promote_types(value.dtype, torch.float32))
            for scale, change in active:
                value = value + scale * change.of(part, value)
            if not value.abs().max() <= torch.finfo(parameter.dtype).max:
                raise ValueError(
                    f"load_lora: scale must leave {name} finite in {parameter.dtype}; got "
                    f"{', '.join(f'{scale:g}' for scale, _ in active)}"
                )
        else:
            del self.originals[name]
        parameter.copy_(value)


def _digest(layers: Mapping[str, LowRank]) -> str:
    """Hash of an adapter's tensors and scales."""
    parts = [
        [layer, low.scale, *(fingerprint(t) for t in (low.down, low.up, low.bias) if t is not None)]
        for layer, low in sorted(layers.items())
    ]
    return hashed(json.dumps(parts).encode())
