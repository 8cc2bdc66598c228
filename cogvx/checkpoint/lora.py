"""Read LoRA adapters: safetensors of `cogvx train`, diffusers, peft or kohya's scripts."""

import math
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..files import CONFIG_BYTES, CheckpointError, parse_json, read_json
from ..validation import format_list, short_repr
from .tensors import Entry, TensorFile
from .weights import FLOATING, PICKLES

FILES = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors")
CONFIG = "adapter_config.json"  # peft's, beside the weights
METADATA = "lora_adapter_metadata"  # diffusers', the same settings in the header of the weights

# `X.lora_A.weight`, peft's `X.lora_A.default.weight`, `X.lora.down.weight`, `X_lora.down.weight`,
# `X.lora_down.weight`, and `X.alpha`.
KEY = re.compile(
    r"(?P<layer>.+?)(?:[._]lora[._](?P<side>A|B|down|up)(?:\.\w+)??\.(?P<kind>weight|bias)|\.alpha)"
)
PREFIX = re.compile(r"(?:(?:base_model\.model|model|transformer|diffusion_model|module)\.)+")
KOHYA = re.compile(r"lora_(?:transformer|unet)_+")
PARTS = {
    (None, None): "alpha",
    ("A", "weight"): "down",
    ("down", "weight"): "down",
    ("B", "weight"): "up",
    ("up", "weight"): "up",
    ("B", "bias"): "bias",
    ("up", "bias"): "bias",
    ("A", "bias"): "bias of down",
    ("down", "bias"): "bias of down",
}
OTHERS = {
    "of a text encoder, which takes no LoRA here": re.compile(r"(text_encoder|lora_te)"),
    "of DoRA, which is not supported": re.compile(r".*(dora_scale|lora_magnitude_vector)"),
    "of SAT, which CogVideo's tools/export_sat_lora_weight.py converts": re.compile(
        r".*\.matrix_[AB]\b"
    ),
    "of LoHa or LoKr, which are not supported": re.compile(r".*\.(hada|lokr)_"),
}
# Initialisations that change the base weights, so that the adapter fits only those.
CHANGES_BASE = ("pissa", "olora", "corda", "loftq")


@dataclass(frozen=True)
class LowRank:
    """Low-rank update of one layer: scale · up @ down to its weight, scale · bias to its bias.

    down   (rank, in), or (rank, in, height, width) of a convolution
    up     (out, rank), or (out, rank, 1, 1)
    scale  alpha / rank, or alpha / √rank if the adapter is rank-stabilised
    bias   (out,) or None
    """

    down: Tensor
    up: Tensor
    scale: float
    bias: Tensor | None = None

    def of(self, name: str, like: Tensor) -> Tensor:
        """Update of a layer's "weight" or "bias", with shape, dtype and device of `like`."""
        if name == "bias":
            assert self.bias is not None
            return self.scale * self.bias.to(like)
        up, down = self.up.to(like).flatten(1), self.down.to(like).flatten(1)
        return (self.scale * (up @ down)).view_as(like)

    @property
    def parts(self) -> tuple[str, ...]:
        return ("weight",) if self.bias is None else ("weight", "bias")


def read_lora(path: Path, model: nn.Module) -> dict[str, LowRank]:
    """Read an adapter from a file or a folder, by names of the model's layers.

    Names, shapes and dtypes are compared with the model before a tensor is read. alpha comes from
    `.alpha` entries, else from peft's `adapter_config.json` or diffusers' metadata, else it is the
    rank, as in diffusers.

    Raises CheckpointError, naming the keys, for an adapter of another model or kind, for pickles,
    and for NaN or infinity.
    """
    path = adapter_file(path)
    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, nn.Conv2d))
    }
    with TensorFile(path) as file:
        keys = _matched(file, layers)
        settings = _settings(file)
        if not settings and any(map(_is_of_peft, file.entries)):
            warnings.warn(
                f"{path}: is of peft, and no {CONFIG} lies beside it: alpha is taken to be the "
                "rank; give scale=alpha/rank if it was not",
                stacklevel=1,  # one place for all callers, so that it is shown once
            )
        read = {
            layer: {part: _read(file, key) for part, key in parts.items()}
            for layer, parts in keys.items()
        }
    return {
        layer: LowRank(
            parts["down"],
            parts["up"],
            _scale(path, settings, layer, len(parts["down"]), parts.get("alpha")),
            parts.get("bias"),
        )
        for layer, parts in read.items()
    }


def adapter_file(path: Path) -> Path:
    """Safetensors file of an adapter: `path`, or the one in that folder."""
    if path.is_dir():
        there = sorted(item.name for item in path.iterdir())
        known = [name for name in FILES if name in there]
        found = known[:1] or [name for name in there if name.endswith(".safetensors")]
        if len(found) == 1:
            return path / found[0]
        came = found or [name for name in there if name.endswith(PICKLES)]
        wanted = f"{path}: must hold {' or '.join(FILES)}, or one other .safetensors file"
        raise CheckpointError(
            f"{wanted}; got {', '.join(came[:5]) or 'none'}"
            + (_PICKLE if not found and came else "")
        )
    if path.suffix in PICKLES:
        raise CheckpointError(f"{path}: must be a LoRA in safetensors{_PICKLE}")
    if not path.exists():
        raise CheckpointError(
            f"{path}: must be a LoRA's .safetensors file, or a folder that holds one; it does not "
            "exist. Nothing is downloaded: `hf download NAME --local-dir FOLDER` does that"
        )
    return path


_PICKLE = (
    ". That is pickle, and a pickle can run any code, so it is not opened: convert it where you "
    "trust it, by safetensors.torch.save_file(torch.load(old, weights_only=True), new)"
)


def _matched(file: TensorFile, layers: Mapping[str, nn.Module]) -> dict[str, dict[str, str]]:
    """Match the file's keys to layers and parts: "down", "up", "alpha", "bias"."""
    flat = {name.replace(".", "_"): name for name in layers}
    found: dict[str, dict[str, str]] = {}
    faults: dict[str, list[str]] = {}

    def fault(kind: str, line: str) -> None:
        faults.setdefault(kind, []).append(line)

    for key, entry in file.entries.items():
        match = KEY.fullmatch(key)
        layer = match and _layer(match["layer"], layers, flat)
        other = next((kind for kind, pattern in OTHERS.items() if pattern.match(key)), None)
        if match is None or layer is None or other is not None:
            fault(other or "of no layer of this transformer", short_repr(key)[1:-1])
            continue
        parts, part = found.setdefault(layer, {}), PARTS[match["side"], match["kind"]]
        if part in parts:
            fault("that give a layer twice", f"{key}, beside {parts[part]}")
        elif entry.dtype not in FLOATING:
            fault(f"of a dtype other than {', '.join(FLOATING)}", f"{key}: {entry.dtype}")
        parts[part] = key
    for layer, parts in found.items():
        for kind, line in _misfits(file.entries, layer, layers[layer], parts):
            fault(kind, line)
    if not any("down" in parts for parts in found.values()) and not faults:
        fault("of LoRA", f"lora_A and lora_B of a layer, for example {next(iter(layers))}")
    if faults:
        report = "".join(
            f"\n  {len(lines)} {kind}:{format_list(lines)}" for kind, lines in faults.items()
        )
        raise CheckpointError(
            f"{file.path}: must be a LoRA of this transformer; nothing was loaded. Of its "
            f"{len(file.entries)} keys these cannot be used:{report}"
        )
    return found


def _layer(name: str, layers: Mapping[str, nn.Module], flat: Mapping[str, str]) -> str | None:
    """Translate a layer's name of diffusers, peft, old diffusers or kohya to the model's."""
    name = PREFIX.sub("", name, count=1) if PREFIX.match(name) else name
    name = name.replace(".processor.", ".")
    candidates = (name, f"{name}.0", flat.get(KOHYA.sub("", name, count=1)))
    return next((candidate for candidate in candidates if candidate in layers), None)


def _misfits(
    entries: Mapping[str, Entry], layer: str, module: nn.Module, parts: Mapping[str, str]
) -> list[tuple[str, str]]:
    """List (kind, line) for every part that is missing or misshapen."""
    weight = module.get_parameter("weight")
    shapes = {part: entries[key].shape for part, key in parts.items()}
    missing = [part for part in ("down", "up") if part not in parts]
    if missing:
        key = next(iter(parts.values()))
        return [("without its other half", f"{key}: lora_A and lora_B of {layer} go together")]
    rank = (*shapes["down"], 0)[0]
    ones = (1,) * (weight.dim() - 2)
    wanted = {
        "down": (rank or 1, *weight.shape[1:]),
        "up": (weight.shape[0], rank or 1, *ones),
        "bias": tuple(weight.shape[:1]),
    }
    found = [
        ("of another shape, as for another model", f"{parts[part]}: expected "
         f"{list(shape)}; got {list(shapes[part])}")
        for part, shape in wanted.items()
        if part in shapes and shapes[part] != shape
    ]  # fmt: skip
    if shapes.get("alpha", ()) not in ((), (1,)):
        found.append(("of another shape", f"{parts['alpha']}: expected a number; got "
                      f"{list(shapes['alpha'])}"))  # fmt: skip
    if "bias" in parts and getattr(module, "bias", None) is None:
        found.append(("for a bias that the layer does not have", parts["bias"]))
    if "bias of down" in parts:
        found.append(("that LoRA does not have", parts["bias of down"]))
    return found


def _read(file: TensorFile, key: str) -> Tensor:
    tensor = file.read(key)
    if not tensor.isfinite().all():
        raise CheckpointError(f"{file.path}: {key} must be finite; got NaN or infinity")
    return tensor


def _is_of_peft(key: str) -> bool:
    return key.startswith("base_model.")


def _settings(file: TensorFile) -> dict[str, Any]:
    """peft's settings: from its file beside the weights, or from their metadata."""
    beside = file.path.parent / CONFIG
    of_peft = file.path.name == FILES[1] or any(map(_is_of_peft, file.entries))
    if of_peft and beside.exists():
        where, values = str(beside), read_json(beside, CONFIG_BYTES)
    elif METADATA in file.metadata:
        where = f"{file.path}: {METADATA}"
        values = parse_json(file.metadata[METADATA].encode(), where)
        values = {name.removeprefix("transformer."): value for name, value in values.items()}
    else:
        return {}
    kind = values.get("peft_type", "LORA")
    if kind != "LORA":
        raise CheckpointError(f"{where}: peft_type must be LORA; got {short_repr(kind)}")
    if values.get("use_dora"):
        raise CheckpointError(f"{where}: use_dora must be false: DoRA is not supported")
    start = values.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(CHANGES_BASE):
        raise CheckpointError(
            f"{where}: init_lora_weights must not be {short_repr(start)}, which changes the "
            "weights of the model too: save the adapter with "
            "path_initial_model_for_weight_conversion"
        )
    patterns = values.get("alpha_pattern") or {}
    if not isinstance(patterns, dict):
        raise CheckpointError(
            f"{where}: alpha_pattern must be an object; got {short_repr(patterns)}"
        )
    for name, value in {"lora_alpha": values.get("lora_alpha"), **patterns}.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float))):
            raise CheckpointError(
                f"{where}: {short_repr(name)} must be a number; got {short_repr(value)}"
            )
    return {
        "alpha": values.get("lora_alpha"),
        "patterns": {_pattern(where, name): value for name, value in patterns.items()},
        "root": bool(values.get("use_rslora")),
    }


def _pattern(where: str, text: str) -> re.Pattern[str]:
    """Regular expression of peft's settings, which matches the end of a layer's name.

    Nested or many repetitions, which could backtrack forever, are rejected.
    """
    simple = len(text) <= 200 and len(re.findall(r"[*+?{]", text)) <= 3
    try:
        if simple and not re.search(r"\)[*+?{]|\(\?|\\[1-9]", text):
            return re.compile(rf"(?:.*\.)?(?:{text})")
    except re.error:
        pass
    raise CheckpointError(
        f"{where}: names in alpha_pattern must be those of layers, or simple regular expressions; "
        f"got {short_repr(text)}"
    )


def _scale(
    path: Path, settings: Mapping[str, Any], layer: str, rank: int, alpha: Tensor | None
) -> float:
    given: Any = alpha
    if alpha is None:
        found = (v for p, v in settings.get("patterns", {}).items() if p.fullmatch(layer))
        given = next(found, settings.get("alpha"))
    value = float(rank if given is None else given)
    if not math.isfinite(value):
        raise CheckpointError(f"{path}: alpha of {layer} must be finite; got {value}")
    return value / (math.sqrt(rank) if settings.get("root") else rank)
