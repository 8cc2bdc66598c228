"""Convert checkpoints of SAT, in which CogVideoX was trained and first published.

Every tensor of our model is some rows of one of SAT's tensors, given by the tables below.
"""

import dataclasses
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from .checkpoint import save_scheduler
from .checkpoint.folder import SHARD_BYTES, empty, transformer_values, vae_values
from .checkpoint.weights import save
from .config import PRESETS, Config, Preset, TransformerConfig, VAEConfig
from .files import CONFIG_BYTES, CheckpointError, member, open_regular, recognized
from .transformer import ExpertTransformer
from .vae import CausalVAE
from .validation import format_list, short_repr

C = TypeVar("C", bound=Config)
Tensors = dict[str, Tensor]

STATES = "mp_rank_00_model_states.pt"
CONTAINERS = ("model", "module", "state_dict")
TRANSFORMER_PREFIX = "model.diffusion_model."
VAE_PREFIX = "first_stage_model."
# The text encoder, published separately; training losses; tables that follow from sizes.
DROPPED = re.compile(
    r"conditioner\.|(first_stage_model\.)?loss|.*(embed_tokens|freqs_sin|freqs_cos|position_embedding)"
)


class Place(NamedTuple):
    """Location of a tensor: `blocks` of SAT's tensor `key`, split into `of` blocks of rows."""

    key: str
    blocks: tuple[int, ...] = (0,)
    of: int = 1


# Source of both: `docs/model.md`, section 2.5. The twelve blocks of a modulation are shift, scale
# and gate of attention, then of the feed-forward, for video; then the same six for text.
OUTSIDE = {
    "patch_embed.proj": "mixins.patch_embed.proj",
    "patch_embed.text_proj": "mixins.patch_embed.text_proj",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "ofs_embedding.linear_1": "ofs_embed.0",
    "ofs_embedding.linear_2": "ofs_embed.2",
    "norm_final": "transformer.final_layernorm",
    "norm_out.norm": "mixins.final_layer.norm_final",
    "norm_out.linear": "mixins.final_layer.adaLN_modulation.1",
    "proj_out": "mixins.final_layer.linear",
}
BLOCK = {
    "norm1.norm": Place("transformer.layers.{}.input_layernorm"),
    "norm2.norm": Place("transformer.layers.{}.post_attention_layernorm"),
    "norm1.linear": Place("mixins.adaln_layer.adaLN_modulations.{}.1", (0, 1, 2, 6, 7, 8), 12),
    "norm2.linear": Place("mixins.adaln_layer.adaLN_modulations.{}.1", (3, 4, 5, 9, 10, 11), 12),
    "attn1.norm_q": Place("mixins.adaln_layer.query_layernorm_list.{}"),
    "attn1.norm_k": Place("mixins.adaln_layer.key_layernorm_list.{}"),
    "attn1.to_q": Place("transformer.layers.{}.attention.query_key_value", (0,), 3),
    "attn1.to_k": Place("transformer.layers.{}.attention.query_key_value", (1,), 3),
    "attn1.to_v": Place("transformer.layers.{}.attention.query_key_value", (2,), 3),
    "attn1.to_out.0": Place("transformer.layers.{}.attention.dense"),
    "ff.net.0.proj": Place("transformer.layers.{}.mlp.dense_h_to_4h"),
    "ff.net.2": Place("transformer.layers.{}.mlp.dense_4h_to_h"),
}
POSITIONS = "mixins.pos_embed.pos_embedding"


def convert(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    dtype: torch.dtype | None = None,
    *,
    vae: str | os.PathLike[str] | None = None,
    preset: str | Preset | None = None,
    max_shard_bytes: int = SHARD_BYTES,
) -> Preset:
    """Convert a SAT checkpoint to `transformer/`, `vae/` and `scheduler/` in `target`.

    source: a file of SAT, or its folder (with `latest`, or with one folder inside): a transformer,
        a VAE, or both.
    vae: the VAE's file, if it is separate.
    dtype: of the weights; by default unchanged.
    preset: settings that do not follow from the shapes (training sizes, latent scale, noise
        schedule): a name of `PRESETS`, or a `Preset`. By default recognised by the transformer,
        which is then required.

    Returns the preset with the two configs that were written. Nothing is written unless tensors and
    model match exactly. Checkpoints are read with `weights_only`: a pickle that would run code is
    rejected. They are memory-mapped meanwhile: if another process truncates one, this one is killed
    (SIGBUS).

    Raises CheckpointError, naming keys, for an invalid checkpoint, and ValueError if the preset is
    needed and cannot be recognised.
    """
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise TypeError(f"convert: dtype must be a floating torch.dtype or None; got {dtype!r}")
    transformer, autoencoder = _read([Path(path) for path in (source, vae) if path is not None])
    found = _preset(preset, transformer)
    folder = Path(target)
    made = []
    if transformer:
        config = transformer_config(transformer, found.transformer)
        found = dataclasses.replace(found, transformer=config)
        if not config.use_rotary_positional_embeddings:
            transformer.pop(POSITIONS, None)  # 2B's: sines and cosines, which we make
        model: nn.Module = empty("convert", lambda: ExpertTransformer(config))
        places = {name: transformer_place(name) for name in model.state_dict()}
        taken = _taken("transformer", model, transformer, places)
        made.append(("transformer", transformer_values(config), taken))
    if autoencoder:
        latent = vae_config(autoencoder, found.vae)
        found = dataclasses.replace(found, vae=latent)
        model = empty("convert", lambda: CausalVAE(latent))
        places = {n: vae_place(n, len(latent.block_out_channels)) for n in model.state_dict()}
        taken = _taken("vae", model, autoencoder, places)
        made.append(("vae", vae_values(latent), taken))
    for name, values, tensors in made:
        save(folder / name, values, tensors, max_shard_bytes, dtype)
    save_scheduler(found.scheduler, folder / "scheduler", found.solver)
    return found


def transformer_place(name: str) -> Place:
    """Location in SAT's checkpoint of the transformer's tensor `name`."""
    if name == "patch_embed.pos_embedding":
        return Place(POSITIONS)
    stem, kind = name.rsplit(".", 1)
    block = re.fullmatch(r"transformer_blocks\.(\d+)\.(.+)", stem)
    if block:
        place = BLOCK[block[2]]
        return place._replace(key=f"{place.key.format(block[1])}.{kind}")
    return Place(f"{OUTSIDE[stem]}.{kind}")


def vae_place(name: str, levels: int) -> Place:
    """Location in SAT's checkpoint of the VAE's tensor. Source: `docs/model.md`, section 4.11."""
    name = re.sub(r"mid_block\.resnets\.(\d+)", lambda m: f"mid.block_{int(m[1]) + 1}", name)
    # SAT counts the levels of the decoder from the pixels, we from the latents
    name = re.sub(r"up_blocks\.(\d+)", lambda m: f"up.{levels - 1 - int(m[1])}", name)
    for ours, theirs in (
        ("down_blocks.", "down."),
        ("resnets.", "block."),
        ("conv_shortcut.", "nin_shortcut."),
        ("downsamplers.0.", "downsample."),
        ("upsamplers.0.", "upsample."),
    ):
        name = name.replace(ours, theirs)
    return Place(name)


def transformer_config(tensors: Mapping[str, Tensor], like: TransformerConfig) -> TransformerConfig:
    """Config of a SAT transformer: sizes from its shapes, the rest from `like`."""
    dim, text_embed_dim = _shape(tensors, "mixins.patch_embed.text_proj.weight", 2)
    (headdim,) = _shape(tensors, "mixins.adaln_layer.query_layernorm_list.0.weight", 1)
    time_embed_dim, _ = _shape(tensors, "time_embed.0.weight", 2)
    ffn_dim, _ = _shape(tensors, "transformer.layers.0.mlp.dense_h_to_4h.weight", 2)
    values, _ = _shape(tensors, "mixins.final_layer.linear.weight", 2)
    patch = _shape(tensors, "mixins.patch_embed.proj.weight", 2, 4)
    if len(patch) == 4:
        patch_size, patch_size_t, in_channels = patch[2], None, patch[1]
    else:
        patch_size, patch_size_t = like.patch_size, like.patch_size_t or 2
        in_channels = patch[1] // (patch_size**2 * patch_size_t)
    ofs = any(key.startswith("ofs_embed.") for key in tensors)
    ofs_embed_dim = _shape(tensors, "ofs_embed.0.weight", 2)[1] if ofs else None
    return _replaced(
        like,
        num_attention_heads=dim // max(headdim, 1),
        attention_head_dim=headdim,
        in_channels=in_channels,
        out_channels=values // max(patch_size**2 * (patch_size_t or 1), 1),
        time_embed_dim=time_embed_dim,
        ofs_embed_dim=ofs_embed_dim,
        text_embed_dim=text_embed_dim,
        num_layers=_count(tensors, r"transformer\.layers\.(\d+)\."),
        patch_size=patch_size,
        patch_size_t=patch_size_t,
        mlp_ratio=ffn_dim / max(dim, 1),
        num_text_experts=0,
        num_video_experts=0,
    )


def vae_config(tensors: Mapping[str, Tensor], like: VAEConfig) -> VAEConfig:
    """Config of a SAT VAE: sizes from its shapes, the rest from `like`."""
    levels = _count(tensors, r"encoder\.down\.(\d+)\.")
    widths = [f"encoder.down.{level}.block.0.conv2.conv.weight" for level in range(levels)]
    return _replaced(
        like,
        in_channels=_shape(tensors, "encoder.conv_in.conv.weight", 5)[1],
        out_channels=_shape(tensors, "decoder.conv_out.conv.weight", 5)[0],
        latent_channels=_shape(tensors, "decoder.conv_in.conv.weight", 5)[1],
        block_out_channels=tuple(_shape(tensors, key, 5)[0] for key in widths),
        layers_per_block=_count(tensors, r"encoder\.down\.0\.block\.(\d+)\."),
        factorized=False,
    )


def _replaced(like: C, **changes: Any) -> C:
    try:
        return dataclasses.replace(like, **changes)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"convert: the shapes do not make a model: {error}") from error


def _preset(preset: str | Preset | None, transformer: Tensors) -> Preset:
    """The given preset, or the one recognised by the transformer's shapes."""
    if isinstance(preset, Preset):
        return preset
    if preset is None:
        preset = _recognised(transformer)
    if preset is None or preset not in PRESETS:
        raise ValueError(
            f"convert: preset must be one of {', '.join(PRESETS)}, and it cannot be recognised "
            f"by the checkpoint; got {preset!r}"
        )
    return PRESETS[preset]


def _recognised(transformer: Tensors) -> str | None:
    patch = transformer.get("mixins.patch_embed.proj.weight")
    if patch is None or patch.dim() not in (2, 4):
        return None
    values, _ = _shape(transformer, "mixins.final_layer.linear.weight", 2)
    image = patch.shape[1:].numel() == 2 * values  # noisy latents and the image's
    if patch.dim() == 2:
        return "1.5-5b-i2v" if image else "1.5-5b"
    if image:
        return "5b-i2v"
    heads = patch.shape[0] // 64
    return {30: "2b", 48: "5b"}.get(heads)


def _taken(what: str, model: nn.Module, tensors: Tensors, places: Mapping[str, Place]) -> Tensors:
    """Extract the model's tensors; all of SAT's must be used."""
    faults = []
    taken = {}
    for name, wanted in model.state_dict().items():
        key, blocks, of = places[name]
        tensor = tensors.get(key)
        if tensor is None:
            faults.append(f"{key}: expected, for {name}; got nothing")
            continue
        rows = tensor.shape[0] // of if tensor.dim() else 0
        shape = (rows * len(blocks), *tensor.shape[1:])
        if tensor.dim() == 0 or tensor.shape[0] % of or shape != tuple(wanted.shape):
            full = (wanted.shape[0] * of // len(blocks), *wanted.shape[1:])
            faults.append(f"{key}: expected {list(full)}, for {name}; got {list(tensor.shape)}")
        elif not tensor.is_floating_point():
            faults.append(f"{key}: expected a floating dtype; got {tensor.dtype}")
        elif of == 1:
            taken[name] = tensor
        else:
            parts = tensor.unflatten(0, (of, rows))
            taken[name] = torch.cat([parts[block] for block in blocks])
    used = {place.key for place in places.values()}
    faults += [
        f"{short_repr(key)}: expected nothing; got {list(tensor.shape)}"
        for key, tensor in tensors.items()
        if key not in used
    ]
    if faults:
        raise CheckpointError(f"convert: the {what} does not fit its shapes:{format_list(faults)}")
    return taken


def _read(paths: list[Path]) -> tuple[Tensors, Tensors]:
    """Read tensors of (transformer, VAE) by SAT's names without prefix; either may be empty."""
    transformer: Tensors = {}
    vae: Tensors = {}
    for path in paths:
        file = _states(path)
        strange = []
        for key, tensor in _load(file).items():
            if not isinstance(key, str) or not isinstance(tensor, Tensor):
                strange.append(f"{short_repr(key)}: {type(tensor).__name__}")
            elif tensor.numel() * tensor.itemsize > tensor.untyped_storage().nbytes():
                strange.append(
                    f"{short_repr(key)}: {list(tensor.shape)}, of which most is not there"
                )
            elif DROPPED.match(key):
                continue
            elif key.startswith(TRANSFORMER_PREFIX):
                transformer[key.removeprefix(TRANSFORMER_PREFIX)] = tensor
            elif key.startswith((VAE_PREFIX, "encoder.", "decoder.")):
                vae[key.removeprefix(VAE_PREFIX)] = tensor
            else:
                strange.append(f"{short_repr(key)}: {list(tensor.shape)}")
        if strange:
            raise CheckpointError(
                f"{file}: must hold {TRANSFORMER_PREFIX}… or a VAE; got also:{format_list(strange)}"
            )
    if not transformer and not vae:
        raise CheckpointError(f"{paths[0]}: must hold {TRANSFORMER_PREFIX}… or a VAE; got neither")
    return transformer, vae


def _states(path: Path) -> Path:
    """File of a checkpoint: the path, or the one in a folder, by its `latest`."""
    if not path.is_dir():
        return path
    if (path / "latest").exists():
        with open_regular(member(path, "latest")) as file:
            tag = file.read(CONFIG_BYTES).decode("utf-8", "replace").strip()
        if not re.fullmatch(r"[A-Za-z0-9_-]{1,100}", tag):
            raise CheckpointError(f"{path / 'latest'}: must name a folder; got {short_repr(tag)}")
        folder = path / tag
    else:
        folders = sorted(file.parent for file in path.glob(f"*/{STATES}"))
        if len(folders) > 1 or not folders and not (path / STATES).exists():
            raise CheckpointError(
                f"{path}: must hold `latest`, or one folder with {STATES}; got {len(folders)}"
            )
        folder = folders[0] if folders else path
    if (folder / STATES.replace("00", "01")).exists():
        raise CheckpointError(f"{folder}: must be one file; this model is split over several ranks")
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: is no folder, but {path / 'latest'} names it")
    return member(folder, STATES)


def _load(path: Path) -> dict[Any, Any]:
    with open_regular(path) as file:
        start = file.read(512)
    came = "" if start.startswith((b"PK", b"\x80")) else recognized(start)
    if came:
        raise CheckpointError(f"{path}: must be a checkpoint, as torch.save writes it; got {came}")
    try:
        value = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:  # a hostile or broken file can raise anything
        raise CheckpointError(
            f"{path}: must be a checkpoint of plain tensors, as torch.save of today writes it; "
            f"nothing in it was run: {str(error).splitlines()[0] if str(error) else error!r}"
        ) from error
    while isinstance(value, dict):
        inner = [key for key in CONTAINERS if isinstance(value.get(key), dict)]
        if not inner:
            return value
        value = value[inner[0]]
    raise CheckpointError(f"{path}: must hold tensors by name; got {type(value).__name__}")


def _shape(tensors: Mapping[str, Tensor], key: str, *dims: int) -> tuple[int, ...]:
    """Shape of a required tensor with one of these numbers of dimensions."""
    tensor = tensors.get(key)
    if tensor is None or tensor.dim() not in dims:
        came = "nothing" if tensor is None else list(tensor.shape)
        raise CheckpointError(
            f"convert: {key} must have {' or '.join(map(str, dims))} dimensions, because the "
            f"config is read off it; got {came}"
        )
    return tuple(tensor.shape)


def _count(tensors: Mapping[str, Tensor], pattern: str) -> int:
    return len({found[1] for found in map(re.compile(pattern).match, tensors) if found})
