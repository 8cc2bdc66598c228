"""Validation of a generation's options.

`resolve` turns options and the configs of the models into a `Request`, in which every default is
replaced by a value, or raises with the argument's name. It needs no weights, so that errors come
before they are read.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .. import frames
from ..config import TransformerConfig, VAEConfig
from ..generation import CHOICES, WHERE, GenerationParams
from ..validation import check_integer, check_number, describe, dtype_name, invalid

_invalid = partial(invalid, WHERE)
# What the converter writes into 1.5's config is the bound of a table, not a size to generate.
TABLE_BOUND, SIZE_OF_1_5 = (300, 300), (96, 170)


@dataclass(frozen=True, kw_only=True, eq=False)
class Request(GenerationParams):
    """Checked options, every default replaced by a value.

    mode     "text", "image" or "video": what the video is made from
    shape    of the latents that are denoised: (batch, frames, channels, height, width)
    padding  latent frames at the front that CogVideoX 1.5 needs to make their number a multiple of
             its patch; they are denoised with the others and dropped before they are decoded
    """

    negative_prompt: str | Sequence[str]
    num_frames: int
    height: int
    width: int
    solver: str
    text_length: int
    mode: str
    shape: tuple[int, int, int, int, int]
    padding: int

    @property
    def batch(self) -> int:
        return self.shape[0]

    @property
    def guided(self) -> bool:
        """True with classifier-free guidance: two predictions a step."""
        return self.guidance > 1


def resolve(
    transformer: TransformerConfig,
    vae: VAEConfig,
    params: GenerationParams,
    default_solver: str = "ddim",
    num_train_timesteps: int = 1000,
) -> Request:
    """Check options; image and video are tensors already.

    Raises ValueError or TypeError, naming the argument, what was wanted and what came.
    """
    params = _repeated(replace(params, negative_prompt=params.negative_prompt or ""))
    solver = default_solver if params.solver is None else params.solver
    for name, choices in CHOICES.items():
        choice = solver if name == "solver" else getattr(params, name)
        if choice not in choices:
            raise _invalid(name, f"one of {', '.join(choices)}", repr(choice))
    num_frames, height, width, text_length = (
        size if size is None else check_integer(WHERE, name, size)
        for name in ("num_frames", "height", "width", "text_length")
        for size in [getattr(params, name)]
    )
    steps = check_integer(WHERE, "steps", params.steps)
    guidance, strength = (
        check_number(WHERE, name, getattr(params, name)) for name in ("guidance", "strength")
    )
    mode = _mode(transformer, params)
    strength = strength if mode == "video" else 1.0
    _check_steps(steps, strength, num_train_timesteps)
    if params.tiling is not None:
        params.tiling.check(WHERE, vae.spatial_compression_ratio)
    batch = _batch(params, guidance > 1)
    source = {"image": params.image, "video": params.video}.get(mode)
    if source is not None:
        height, width = _like_source(mode, source, batch, vae, height, width)
    if mode == "video":
        num_frames = _agreed("num_frames", num_frames, params.video.shape[1], "the video's")
    ratio, usual = vae.spatial_compression_ratio, default_size(transformer, vae)
    height = usual[0] if height is None else height
    width = usual[1] if width is None else width
    num_frames = transformer.sample_frames if num_frames is None else num_frames
    frames.check(WHERE, "video" if mode == "video" else "num_frames", num_frames, vae)
    of = None if source is None else mode
    frames.check_size(WHERE, of, height, width, ratio * transformer.patch_size)
    if transformer.use_learned_positional_embeddings and (height, width) != usual:
        only = f"{usual[0]}x{usual[1]}, the only size that this model's learned positions know"
        raise _invalid("height and width", only, f"{height}x{width}")
    length = frames.latent_frames(num_frames, vae)
    padding = -length % (transformer.patch_size_t or 1)
    resolved: dict[str, Any] = {
        **vars(params),
        "num_frames": num_frames,
        "height": height,
        "width": width,
        "solver": solver,
        "text_length": _text_length(transformer, text_length, params.prompt_embeds),
        "strength": strength,
        "steps": steps,
        "guidance": guidance,
    }
    latents = (length + padding, transformer.out_channels, height // ratio, width // ratio)
    request = Request(**resolved, mode=mode, shape=(batch, *latents), padding=padding)
    _check_tensors(transformer, request)
    return request


def _repeated(params: GenerationParams) -> GenerationParams:
    """Repeat what belongs to a prompt `num_videos_per_prompt` times; latents are of all videos."""
    count = check_integer(WHERE, "num_videos_per_prompt", params.num_videos_per_prompt)
    if count < 1:
        raise _invalid("num_videos_per_prompt", "at least 1", f"{count}")
    if count == 1:
        return params
    changed: dict[str, Any] = {"num_videos_per_prompt": 1}
    changed["prompt"] = [text for text in params.prompts for _ in range(count)] or None
    if params.negative_prompt is not None and not isinstance(params.negative_prompt, str):
        changed["negative_prompt"] = [t for t in params.negative_prompt for _ in range(count)]
    for name in ("image", "video", "prompt_embeds", "negative_prompt_embeds"):
        value = getattr(params, name)
        if isinstance(value, Tensor) and value.dim():
            shared = len(value) == 1 and name in ("image", "video")
            changed[name] = value if shared else value.repeat_interleave(count, 0)
    return replace(params, **changed)


def default_size(transformer: TransformerConfig, vae: VAEConfig) -> tuple[int, int]:
    """Default (height, width) of a model's videos, in pixels."""
    height, width = transformer.sample_height, transformer.sample_width
    if (height, width) == TABLE_BOUND:
        height, width = SIZE_OF_1_5
    return height * vae.spatial_compression_ratio, width * vae.spatial_compression_ratio


def _check_steps(steps: int, strength: float, most: int) -> None:
    if not 1 <= steps <= most:
        raise _invalid("steps", f"an integer in [1, {most}]", f"{steps}")
    if not 0 < strength <= 1:
        raise _invalid("strength", "above 0 and at most 1", f"{strength}")
    if int(steps * strength) < 1:
        enough = next((n for n in range(steps, most + 1) if int(n * strength) >= 1), None)
        more = "" if enough is None else f", or steps at least {enough}"
        least = "1 for 1 step" if steps == 1 else f"1/{steps} for {steps} steps"
        raise _invalid("strength", f"at least {least}, so that one is made{more}", f"{strength}")


def default_dtype(config: TransformerConfig, device: str | torch.device = "cuda") -> torch.dtype:
    """Default dtype of a model: float16 for 2B, bfloat16 for all others, float32 on a CPU."""
    if torch.device(device).type == "cpu":
        return torch.float32
    return torch.bfloat16 if config.use_rotary_positional_embeddings else torch.float16


def _mode(transformer: TransformerConfig, params: GenerationParams) -> str:
    if params.image is not None and params.video is not None:
        raise _invalid("image", "None where a video is given", "both")
    mode = "image" if params.image is not None else "video" if params.video is not None else "text"
    takes_image = transformer.in_channels == 2 * transformer.out_channels
    if takes_image != (mode == "image"):
        kind = "an image-to-video" if takes_image else "a text- and video-to-video"
        raise _invalid(
            "image",
            "given" if takes_image else "None",
            f"{'none' if takes_image else 'one'}: this is {kind} model, whose transformer has "
            f"{transformer.in_channels} channels in and {transformer.out_channels} out",
        )
    return mode


def _batch(params: GenerationParams, guided: bool) -> int:
    texts = (params.prompt, params.negative_prompt)
    for name, text in zip(("prompt", "negative_prompt"), texts, strict=True):
        words = [text] if isinstance(text, str) or text is None else list(text)
        if any(not isinstance(word, str) for word in words if word is not None):
            raise _invalid(name, "text or a list of texts", f"{text!r:.80}", TypeError)
    if (params.prompt is None) == (params.prompt_embeds is None):
        came = "neither" if params.prompt is None else "both"
        raise _invalid("prompt", "given, or else prompt_embeds", came)
    if params.prompt_embeds is not None:
        batch = len(params.prompt_embeds)
    else:
        batch = len(params.prompts)
    if batch < 1:
        raise _invalid("prompt", "at least one text", "none")
    negative = params.negative_prompt or ""
    if not isinstance(negative, str) and len(negative) != batch:
        raise _invalid("negative_prompt", f"one text, or {batch} as prompts", f"{len(negative)}")
    if params.negative_prompt_embeds is not None and negative:
        raise _invalid("negative_prompt", "empty where negative_prompt_embeds are given", "both")
    some = negative or params.negative_prompt_embeds is not None
    if guided and params.uncond == "zeros" and some:
        raise _invalid("negative_prompt", 'empty with uncond="zeros", which has no words', "one")
    return batch


def _like_source(
    mode: str, source: Tensor, batch: int, vae: VAEConfig, height: int | None, width: int | None
) -> tuple[int, int]:
    """Check the image or video; returns its (height, width)."""
    dims = {"image": "(batch, {}, height, width)", "video": "(batch, frames, {}, height, width)"}
    wanted = f"a tensor {dims[mode].format(vae.in_channels)} in [-1, 1]"
    if not isinstance(source, Tensor) or not source.is_floating_point():
        if isinstance(source, Tensor) and source.dtype == torch.uint8:
            hint = f"; {mode}.float() / 127.5 - 1 is that"
        else:
            hint = f"; PIL images are taken too, and cogvx.video.read_{mode} reads a file"
        got = describe(source) if isinstance(source, Tensor) else type(source).__name__
        raise _invalid(mode, wanted, got + hint, TypeError)
    if source.dim() != (4 if mode == "image" else 5) or source.shape[-3] != vae.in_channels:
        raise _invalid(mode, wanted, describe(source))
    if len(source) not in (1, batch):
        raise _invalid(mode, f"one, or one for each of {batch} prompts", f"{len(source)}")
    low, high = source.aminmax() if source.numel() else (source.new_zeros(()),) * 2
    if not (low >= -1.001 and high <= 1.001):  # a rounding, not a range of its own
        hint = "; / 127.5 - 1 brings [0, 255] there" if low >= 0 and 1 < high <= 255 else ""
        raise _invalid(mode, "in [-1, 1]", f"values from {low:.4g} to {high:.4g}{hint}")
    return (
        _agreed("height", height, source.shape[-2], f"the {mode}'s"),
        _agreed("width", width, source.shape[-1], f"the {mode}'s"),
    )


def _agreed(name: str, given: int | None, actual: int, whose: str) -> int:
    if given not in (None, actual):
        raise _invalid(name, f"{whose}, {actual} (resize it first), or None", f"{given}")
    return actual


def _text_length(transformer: TransformerConfig, given: int | None, embeds: Tensor | None) -> int:
    longest = transformer.max_text_seq_length
    added = (
        transformer.use_learned_positional_embeddings
        or not transformer.use_rotary_positional_embeddings
    )
    usual = longest if embeds is None else embeds.shape[1]
    length = usual if given is None else given
    if length < 1:
        raise _invalid("text_length", "at least 1", f"{length}")
    if added and length != longest:
        raise _invalid(
            "text_length", f"{longest}, because this model adds positions to text", f"{length}"
        )
    return length


def _check_tensors(transformer: TransformerConfig, request: Request) -> None:
    embeds = (request.batch, request.text_length, transformer.text_embed_dim)
    for name in ("prompt_embeds", "negative_prompt_embeds"):
        value = getattr(request, name)
        if value is not None and tuple(value.shape) != embeds:
            raise _invalid(name, f"(batch, text_len, text_embed_dim) = {embeds}", describe(value))
    latents = request.latents
    if latents is not None and request.mode == "video":
        raise _invalid("latents", "None where a video is given, which they come from", "both")
    if latents is not None and tuple(latents.shape) != request.shape:
        note = f", of which {request.padding} pads" if request.padding else ""
        raise _invalid(
            "latents", f"(batch, frames{note}, channels, height, width) = {request.shape}",
            describe(latents),
        )  # fmt: skip


def check_finite(tensor: Tensor, stage: str) -> None:
    """Raises FloatingPointError, naming the stage, if a value is NaN or infinite."""
    if tensor.numel() == 0:  # the video is on another rank
        return
    low, high = tensor.aminmax()  # NaN is the least and the most; no copy is made
    if not (math.isfinite(low) and math.isfinite(high)):
        dtype = dtype_name(tensor.dtype)
        hint = "; the 5B models overflow in it: use bfloat16" if dtype == "float16" else ""
        raise FloatingPointError(f"{WHERE}: {stage} gave NaN or infinity in {dtype}{hint}")
