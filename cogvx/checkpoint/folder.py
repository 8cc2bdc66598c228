"""Load and save components in diffusers' layout: config.json and weights."""

import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from cogvx_kernels import module_backend

from ..assets import located
from ..config import Config, SchedulerConfig, TransformerConfig, VAEConfig
from ..files import CONFIG_BYTES, CheckpointError, atomic_path, member, read_json, unfinished
from ..transformer import ExpertTransformer
from ..vae import CausalVAE
from ..vae.options import channels_last
from ..validation import short_repr
from .weights import Weights, save

C = TypeVar("C", bound=Config)
M = TypeVar("M", bound=nn.Module)
PathLike = str | os.PathLike[str]

# The version whose keys we write: the first with CogVideoX 1.5.
DIFFUSERS_VERSION = "0.32.0"
TRANSFORMER_CLASSES = ("CogVideoXTransformer3DModel", "ExpertTransformer")
VAE_CLASSES = ("AutoencoderKLCogVideoX", "CausalVAE")
SOLVERS = {"ddim": "CogVideoXDDIMScheduler", "dpm": "CogVideoXDPMScheduler"}
# Keys that diffusers does not know; left out at their default.
OURS = frozenset(
    {
        "mlp_ratio",
        "num_text_experts",
        "num_video_experts",
        "expert_top_k",
        "factorized",
        "num_sample_frames_batch_size",
        "num_latent_frames_batch_size",
    }
)
SHARD_BYTES = 5 * 10**9


def load_transformer(
    path: PathLike,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    backend: str | None = None,
    attention: str = "auto",
    *,
    variant: str | None = None,
    check_finite: bool = False,
    **hub: Any,
) -> ExpertTransformer:
    """Load the transformer of a folder with `config.json` and safetensors, or of its
    `transformer/`.

    path: the folder; or a model on the Hugging Face hub, such as "THUDM/CogVideoX-5b", of which
        only the transformer is downloaded.
    dtype: of the weights; by default that of most of them in the files.
    backend: of the ops, "auto", "kernel" or "reference"; by default that of
        `cogvx_kernels.module_backend`, "auto" outside.
    variant: reads `diffusion_pytorch_model.{variant}.safetensors` instead.
    check_finite: also reject weights with NaN or infinity, naming them.
    hub: revision, token, cache_dir, local_files_only: see `cogvx.assets.located`.

    Names, shapes and dtypes are compared with the config's model before weights are read. At most
    the model and one more tensor are in memory. Files are not memory-mapped: they may be replaced
    while the model is in use.

    Raises CheckpointError for an invalid folder, and the errors of `located` for a name on the hub.
    """
    on_backend = module_backend(backend)
    folder = _component(path, "transformer", "config.json", variant=variant, **hub)
    config = _config(folder, "config.json", TransformerConfig, TRANSFORMER_CLASSES)
    place = _where(dtype, device)
    with Weights(folder, variant) as weights, on_backend:
        experts = max(1, config.num_text_experts + config.num_video_experts)
        attention_and_ffn = config.hidden_size**2 * (4 + config.mlp_ratio * experts)
        _bound(weights, "num_layers", config.num_layers, weights.children("transformer_blocks."))
        _bound(weights, "weights", int(config.num_layers * attention_and_ffn), weights.numel())
        model = empty(folder, lambda: ExpertTransformer(config, attention))
        weights.check(model)
        weights.load_into(model, dtype, place, check_finite)
    return model.eval()


def load_vae(
    path: PathLike,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    backend: str | None = None,
    *,
    variant: str | None = None,
    check_finite: bool = False,
    **hub: Any,
) -> CausalVAE:
    """Load the VAE of a folder with `config.json` and safetensors, or of its `vae/`.

    Arguments and errors: see `load_transformer`.
    """
    on_backend = module_backend(backend)
    folder = _component(path, "vae", "config.json", variant=variant, **hub)
    config = _config(folder, "config.json", VAEConfig, VAE_CLASSES)
    place = _where(dtype, device)
    with Weights(folder, variant) as weights, on_backend:
        levels, blocks = len(config.block_out_channels), "encoder.down_blocks."
        first = weights.children(f"{blocks}0.resnets.")
        _bound(weights, "block_out_channels", levels, weights.children(blocks))
        _bound(weights, "layers_per_block", config.layers_per_block, first)
        model = empty(folder, lambda: CausalVAE(config))
        weights.check(model)
        weights.load_into(model, dtype, place, check_finite)
    channels_last(model)
    return model.eval()


def load_scheduler(path: PathLike, **hub: Any) -> tuple[str, SchedulerConfig]:
    """Load (solver, config) from a folder with `scheduler_config.json`, or from its `scheduler/`.

    The solver is "ddim" or "dpm", by the class in the file. path, hub: see `load_transformer`.
    """
    folder = _component(path, "scheduler", "scheduler_config.json", **hub)
    values = read_json(member(folder, "scheduler_config.json"), CONFIG_BYTES)
    solvers = {name: solver for solver, name in SOLVERS.items()}
    name = values.get("_class_name")
    if not isinstance(name, str) or name not in solvers:
        raise CheckpointError(
            f"{folder / 'scheduler_config.json'}: _class_name must be among "
            f"{', '.join(solvers)}; got {short_repr(name)}"
        )
    return solvers[name], _config(folder, "scheduler_config.json", SchedulerConfig, (name,))


def save_transformer(
    model: ExpertTransformer, path: PathLike, max_shard_bytes: int = SHARD_BYTES
) -> None:
    """Save a transformer to a folder, in several files if larger than `max_shard_bytes`.

    `load_transformer` reads it, and diffusers if it is of the released family. The folder may be
    the one that the model came from. A save that fails or is killed leaves the old or the new
    model, whole. (If the two configs differ, the folder has no config between two renames.)
    """
    if not isinstance(model, ExpertTransformer):
        raise TypeError(f"save_transformer: model must be an ExpertTransformer; got {type(model)}")
    config = transformer_values(model.config)
    save(Path(path), config, model.state_dict(), max_shard_bytes)


def save_vae(model: CausalVAE, path: PathLike, max_shard_bytes: int = SHARD_BYTES) -> None:
    """Save a VAE to a folder; see `save_transformer`."""
    if not isinstance(model, CausalVAE):
        raise TypeError(f"save_vae: model must be a CausalVAE; got {type(model)}")
    save(Path(path), vae_values(model.config), model.state_dict(), max_shard_bytes)


def save_scheduler(config: SchedulerConfig, path: PathLike, solver: str = "ddim") -> None:
    """Write `scheduler_config.json` to a folder; solver: "ddim" or "dpm"."""
    if solver not in SOLVERS:
        raise ValueError(
            f"save_scheduler: solver must be one of {', '.join(SOLVERS)}; got {solver!r}"
        )
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    values = _values(config, (SOLVERS[solver], SOLVERS[solver]))
    with atomic_path(folder / "scheduler_config.json") as part:
        part.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def transformer_values(config: TransformerConfig) -> dict[str, Any]:
    """Contents of a transformer's config.json."""
    return _values(config, TRANSFORMER_CLASSES)


def vae_values(config: VAEConfig) -> dict[str, Any]:
    """Contents of a VAE's config.json."""
    levels = len(config.block_out_channels)
    return {
        "down_block_types": ["CogVideoXDownBlock3D"] * levels,
        "up_block_types": ["CogVideoXUpBlock3D"] * levels,
        **_values(config, VAE_CLASSES),
    }


def _values(config: Config, classes: tuple[str, ...]) -> dict[str, Any]:
    """Contents of config.json, with diffusers' class name if it can build the model."""
    usual = {field.name for field in dataclasses.fields(config) if field.name in OURS}
    usual = {name for name in usual if getattr(config, name) == _default(config, name)}
    released = usual == OURS & {field.name for field in dataclasses.fields(config)}
    values = {name: value for name, value in config.to_dict().items() if name not in usual}
    name = classes[0] if released else classes[1]
    return {"_class_name": name, "_diffusers_version": DIFFUSERS_VERSION, **values}


def _default(config: Config, name: str) -> Any:
    return next(field.default for field in dataclasses.fields(config) if field.name == name)


def _component(path: PathLike, name: str, config: str, **hub: Any) -> Path:
    """Folder of a component: `path`, or the folder of that name in it."""
    folder = located(path, parts=[name], **hub)
    try:
        inner = folder / name
        if inner.is_dir():
            return inner
        if folder.is_dir():
            if (folder / config).is_file():
                return folder
            raise CheckpointError(
                f"{folder}: must hold {config}, or a folder {name}/ that does{unfinished(folder)}"
            )
    except (OSError, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{short_repr(str(path))}: cannot be looked into: {error}") from error
    kind = "a file" if os.path.exists(folder) else "not there"
    raise CheckpointError(
        f"{folder}: must be a folder, with {config} or {name}/ in it, or a model's name on the "
        f"Hugging Face hub, such as THUDM/CogVideoX-5b; it is {kind}"
    )


def _config(folder: Path, name: str, kind: type[C], classes: tuple[str, ...]) -> C:
    path = member(folder, name)
    values = read_json(path, CONFIG_BYTES)
    if values.get("_class_name", classes[0]) not in classes:
        raise CheckpointError(
            f"{path}: _class_name must be {' or '.join(classes)}; got "
            f"{short_repr(values['_class_name'])}"
        )
    try:
        return kind.from_dict(values)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: {error}") from error


def _bound(weights: Weights, name: str, value: int, held: int) -> None:
    """Check a size in the config against the files, before an empty model is built."""
    if value > held:
        raise CheckpointError(
            f"{weights.folder / 'config.json'}: {name} must be at most {held:,}, which is what "
            f"{weights.files[0].path.name} and its like hold; got {value:,}"
        )


def empty(where: object, build: Callable[[], M]) -> M:
    """Build a model on the meta device."""
    try:
        with torch.device("meta"):
            return build()
    except (RuntimeError, OverflowError, ValueError) as error:  # a size beyond 64 bits, say
        raise CheckpointError(f"{where}: cannot be built: {error}") from error


def _where(dtype: torch.dtype | None, device: str | torch.device) -> torch.device:
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise TypeError(f"dtype must be a floating torch.dtype or None; got {dtype!r}")
    return torch.device(device)
