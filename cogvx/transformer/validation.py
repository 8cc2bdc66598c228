"""Argument validation of the transformer; runs before anything is computed."""

from functools import partial

import torch
from torch import Tensor

from ..autocast import autocast_dtype
from ..config import TransformerConfig
from ..frames import nearest_multiples
from ..validation import describe, dtype_name, invalid
from .embedding import ProjectedText
from .experts import Routing
from .modulation import Modulations

WHERE = "ExpertTransformer"
_invalid = partial(invalid, WHERE)
TEXT = ("batch", "text_len", "text_embed_dim")


def check_arguments(
    config: TransformerConfig,
    dtype: torch.dtype,
    latents: Tensor,
    text: Tensor | ProjectedText,
    timestep: Tensor | None,
    ofs: Tensor | None,
    routing: list[Routing] | None,
    modulations: Modulations | None = None,
) -> None:
    """Check the arguments of `ExpertTransformer.forward`; dtype is the model's.

    Raises TypeError or ValueError, naming the argument, what was wanted and what came.
    """
    _tensor("latents", latents, ("batch", "frames", "channels", "height", "width"))
    projected = isinstance(text, ProjectedText)
    tokens = text.tokens if isinstance(text, ProjectedText) else text
    _tensor("text", tokens, TEXT)
    _latents(config, latents)
    if len(tokens) != len(latents):
        raise ValueError(
            f"{WHERE}: text must have the batch of latents, {len(latents)}; got {len(tokens)}"
        )
    _tokens(config, tokens, projected)
    # Under autocast torch casts the inputs of every layer.
    autocast = autocast_dtype(latents.device) is not None
    if latents.dtype != dtype and not autocast:
        raise _invalid(
            "latents", f"{dtype_name(dtype)} as the model is", dtype_name(latents.dtype), TypeError
        )
    if tokens.dtype != latents.dtype and not autocast:
        wanted = f"{dtype_name(latents.dtype)} as latents are"
        raise _invalid("text", wanted, dtype_name(tokens.dtype), TypeError)
    if tokens.device != latents.device:
        raise _invalid("text", f"on the device of latents, {latents.device}", tokens.device)
    if modulations is None:
        batch = latents.shape[0]
        _numbers("timestep", timestep, [(), (batch,)], "a scalar or (batch,)")
        _ofs(config, ofs, batch)
    else:
        _modulations(config, modulations, timestep, ofs, latents)
    if routing is not None and not isinstance(routing, list):
        raise _invalid("routing", "a list to fill, or None", describe(routing), TypeError)


def check_run(config: TransformerConfig, timesteps: Tensor, ofs: Tensor | None) -> None:
    """Check the arguments of `ExpertTransformer.modulations`."""
    steps = timesteps.numel() if isinstance(timesteps, Tensor) else 0
    _numbers("timesteps", timesteps, [(steps,)], "(steps,)")
    _ofs(config, ofs, steps)


def check_text(config: TransformerConfig, dtype: torch.dtype, text: Tensor) -> None:
    """Check the argument of `ExpertTransformer.project_text`."""
    _tensor("text", text, TEXT)
    _tokens(config, text)
    if text.dtype != dtype and autocast_dtype(text.device) is None:
        wanted = f"{dtype_name(dtype)} as the model is"
        raise _invalid("text", wanted, dtype_name(text.dtype), TypeError)


def _latents(config: TransformerConfig, latents: Tensor) -> None:
    _, frames, channels, height, width = latents.shape
    if channels != config.in_channels:
        raise ValueError(
            f"{WHERE}: latents must have {config.in_channels} channels (batch, frames, channels, "
            f"height, width); got {channels} in {tuple(latents.shape)}"
        )
    for name, size, multiple, rule in (
        ("height", height, config.patch_size, "patch_size"),
        ("width", width, config.patch_size, "patch_size"),
        ("frames", frames, config.patch_size_t or 1, "patch_size_t"),
    ):
        if size < 1 or size % multiple:
            raise ValueError(
                f"{WHERE}: latents must have {name} a positive multiple of {rule} = {multiple}, "
                f"nearest {nearest_multiples(size, multiple)}; got {size} in {tuple(latents.shape)}"
            )
    if config.use_learned_positional_embeddings and (height, width) != (
        config.sample_height,
        config.sample_width,
    ):
        raise ValueError(
            f"{WHERE}: latents must be {config.sample_height}x{config.sample_width} in a model "
            f"with learned positions, which knows no other; got {height}x{width}"
        )


def _tokens(config: TransformerConfig, text: Tensor, projected: bool = False) -> None:
    _, text_len, dim = text.shape
    name, wanted = "text_embed_dim", config.text_embed_dim
    if projected:
        name, wanted = "hidden_size", config.hidden_size
    if dim != wanted:
        raise ValueError(
            f"{WHERE}: text must have {name} = {wanted} values a token; got {dim} in "
            f"{tuple(text.shape)}"
        )
    added = not config.use_rotary_positional_embeddings or config.use_learned_positional_embeddings
    if added and text_len != config.max_text_seq_length:
        raise ValueError(
            f"{WHERE}: text must have max_text_seq_length = {config.max_text_seq_length} tokens in "
            f"a model that adds positions to them; got {text_len} (pad it, as in training)"
        )


def _ofs(config: TransformerConfig, ofs: Tensor | None, batch: int) -> None:
    if config.ofs_embed_dim is None and ofs is not None:
        raise _invalid("ofs", "None in a model without ofs_embed_dim", describe(ofs))
    if config.ofs_embed_dim is not None:
        if ofs is None:
            wanted = "given to a model with ofs_embed_dim, 2.0 in the released one"
            raise _invalid("ofs", wanted, None)
        _numbers("ofs", ofs, [(), (1,), (batch,)], "a scalar, (1,) or (batch,)")


def _modulations(
    config: TransformerConfig,
    modulations: Modulations,
    timestep: Tensor | None,
    ofs: Tensor | None,
    latents: Tensor,
) -> None:
    for name, value in (("timestep", timestep), ("ofs", ofs)):
        if value is not None:
            raise _invalid(name, "None beside modulations, which are made of it", describe(value))
    if not isinstance(modulations, Modulations):
        wanted = "Modulations, as ExpertTransformer.modulations makes them"
        raise _invalid("modulations", wanted, describe(modulations), TypeError)
    values, batch = modulations.values, latents.shape[0]
    rows = (12 * config.num_layers + 2, config.hidden_size)
    if tuple(values.shape[1:]) != rows or len(values) not in (1, batch):
        wanted = f"{(batch, *rows)}, or {(1, *rows)} for all items (`Modulations.at`)"
        raise _invalid("modulations", wanted, tuple(values.shape))
    if values.device != latents.device:
        raise _invalid("modulations", f"on the device of latents, {latents.device}", values.device)


def _tensor(name: str, value: object, dims: tuple[str, ...]) -> None:
    wanted = f"a floating-point tensor ({', '.join(dims)})"
    if not isinstance(value, Tensor) or not value.is_floating_point():
        raise _invalid(name, wanted, describe(value), TypeError)
    if value.dim() != len(dims):
        raise _invalid(name, wanted, describe(value))


def _numbers(name: str, value: object, shapes: list[tuple[int, ...]], words: str) -> None:
    if not isinstance(value, Tensor) or value.dtype is torch.bool or value.is_complex():
        raise _invalid(name, "a tensor of numbers", describe(value), TypeError)
    if tuple(value.shape) not in shapes:
        raise _invalid(name, f"{words} = {shapes[-1]}", tuple(value.shape))
