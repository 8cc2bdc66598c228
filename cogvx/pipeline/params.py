"""The arguments of a generation, checked before anything is computed.

`resolve` turns the arguments of `CogVideoX.generate` and the configs of its models into a
`Request`, where every default has become a number, or raises with the argument's name. It needs no
weights, so that what cannot be is refused before they are read.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from numbers import Real
from operator import index
from typing import Any

import torch
from torch import Tensor

from .. import frames
from ..config import TransformerConfig, VAEConfig
from ..schedulers import SOLVERS
from ..vae import Tiling

WHERE = "CogVideoX.generate"
CHOICES: dict[str, tuple[str, ...]] = {
    "scheduler": tuple(SOLVERS),
    "cfg": ("batch", "two_pass"),
    "uncond": ("prompt", "zeros"),
    "image_latent_scale": ("diffusers", "sat", "train"),
    "output": ("video", "latents"),
}
# What the converter writes into 1.5's config is the bound of a table, not a size to generate.
TABLE_BOUND, SIZE_OF_1_5 = (300, 300), (96, 170)


@dataclass(frozen=True)
class Inputs:
    """Texts and tensors that a generation starts from, as the caller gave them."""

    prompt: str | Sequence[str] | None = None
    negative_prompt: str | Sequence[str] = ""
    image: Tensor | None = None
    video: Tensor | None = None
    prompt_embeds: Tensor | None = None
    negative_prompt_embeds: Tensor | None = None
    latents: Tensor | None = None

    @property
    def prompts(self) -> list[str]:
        return [self.prompt] if isinstance(self.prompt, str) else list(self.prompt or ())

    def repeated(self, count: int) -> "Inputs":
        """Everything of each prompt so many times, one after another; latents are all there."""
        count = _integer("num_videos_per_prompt", count)
        if count < 1:
            raise _wrong("num_videos_per_prompt", "at least 1", f"{count}")
        if count == 1:
            return self
        found: dict[str, Any] = {}
        for name, value in vars(self).items():
            if name == "prompt":
                found[name] = [text for text in self.prompts for _ in range(count)] or None
            elif name == "negative_prompt" and not isinstance(value, str):
                found[name] = [text for text in value for _ in range(count)]
            elif name != "latents" and isinstance(value, Tensor) and value.dim():
                alone = len(value) == 1 and name in ("image", "video")
                found[name] = value if alone else value.repeat_interleave(count, 0)
        return replace(self, **found)


@dataclass(frozen=True, kw_only=True)
class Request:
    """Everything that decides a video besides `Inputs`, the models and the random numbers.

    mode     "text", "image" or "video": what the video is made from
    frames   of the video; height and width in pixels
    shape    of the latents that are denoised: (batch, frames, channels, height, width)
    padding  latent frames at the front that CogVideoX 1.5 needs to make their number a multiple of
             its patch; they are denoised with the others and dropped before they are decoded
    """

    mode: str
    frames: int
    height: int
    width: int
    shape: tuple[int, int, int, int, int]
    padding: int
    text_length: int
    scheduler: str
    compat: bool
    steps: int
    strength: float
    guidance: float
    dynamic_guidance: bool
    cfg: str
    uncond: str
    image_latent_scale: str

    @property
    def batch(self) -> int:
        return self.shape[0]

    @property
    def guided(self) -> bool:
        """Whether there are two predictions, with and without the text, to tell apart."""
        return self.guidance > 1


def resolve(
    transformer: TransformerConfig,
    vae: VAEConfig,
    inputs: Inputs,
    *,
    num_frames: int | None = None,
    height: int | None = None,
    width: int | None = None,
    text_length: int | None = None,
    steps: int = 50,
    strength: float = 0.8,
    guidance: float = 6.0,
    scheduler: str = "ddim",
    compat: bool = False,
    dynamic_guidance: bool = False,
    cfg: str = "batch",
    uncond: str = "prompt",
    image_latent_scale: str = "diffusers",
    output: str = "video",
    tiling: Tiling | None = None,
    num_train_timesteps: int = 1000,
) -> Request:
    """The request that the arguments of `generate` make.

    Raises ValueError or TypeError, naming the argument, what was wanted and what came.
    """
    chosen = {
        "scheduler": scheduler,
        "cfg": cfg,
        "uncond": uncond,
        "image_latent_scale": image_latent_scale,
        "output": output,
    }
    for name, choice in chosen.items():
        if choice not in CHOICES[name]:
            raise _wrong(name, f"one of {', '.join(CHOICES[name])}", repr(choice))
    num_frames, height, width, text_length = (
        size if size is None else _integer(name, size)
        for name, size in (
            ("num_frames", num_frames),
            ("height", height),
            ("width", width),
            ("text_length", text_length),
        )
    )
    steps = _integer("steps", steps)
    guidance, strength = _number("guidance", guidance), _number("strength", strength)
    mode = _mode(transformer, inputs)
    strength = strength if mode == "video" else 1.0
    _check_steps(steps, strength, num_train_timesteps)
    if tiling is not None:
        tiling.check(WHERE, vae.spatial_compression_ratio)
    batch = _batch(inputs, guidance > 1, uncond)
    source = {"image": inputs.image, "video": inputs.video}.get(mode)
    if source is not None:
        height, width = _like_source(mode, source, batch, vae, height, width)
    if inputs.video is not None:
        num_frames = _agreed("num_frames", num_frames, inputs.video.shape[1], "the video's")
    ratio, usual = vae.spatial_compression_ratio, default_size(transformer, vae)
    height = usual[0] if height is None else height
    width = usual[1] if width is None else width
    num_frames = transformer.sample_frames if num_frames is None else num_frames
    frames.check(WHERE, "num_frames" if inputs.video is None else "video", num_frames, vae)
    of = None if source is None else mode
    frames.check_size(WHERE, of, height, width, ratio * transformer.patch_size)
    if transformer.use_learned_positional_embeddings and (height, width) != usual:
        only = f"{usual[0]}x{usual[1]}, the only size that this model's learned positions know"
        raise _wrong("height and width", only, f"{height}x{width}")
    length = frames.latent_frames(num_frames, vae)
    padding = -length % (transformer.patch_size_t or 1)
    channels = transformer.out_channels
    request = Request(
        mode=mode,
        frames=num_frames,
        height=height,
        width=width,
        shape=(batch, length + padding, channels, height // ratio, width // ratio),
        padding=padding,
        text_length=_text_length(transformer, text_length, inputs.prompt_embeds),
        strength=strength,
        steps=steps,
        guidance=guidance,
        dynamic_guidance=dynamic_guidance,
        scheduler=scheduler,
        compat=compat,
        cfg=cfg,
        uncond=uncond,
        image_latent_scale=image_latent_scale,
    )
    _check_tensors(transformer, inputs, request)
    return request


def default_size(transformer: TransformerConfig, vae: VAEConfig) -> tuple[int, int]:
    """(height, width) in pixels of a video that nobody said the size of."""
    height, width = transformer.sample_height, transformer.sample_width
    if (height, width) == TABLE_BOUND:
        height, width = SIZE_OF_1_5
    return height * vae.spatial_compression_ratio, width * vae.spatial_compression_ratio


def _integer(name: str, value: Any) -> int:
    try:
        if not isinstance(value, bool):
            return index(value)
    except TypeError:
        pass
    raise TypeError(f"{WHERE}: {name} must be an integer; got {value!r:.80}")


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{WHERE}: {name} must be a number; got {value!r:.80}")
    if not math.isfinite(value):
        raise _wrong(name, "a finite number", f"{value}")
    return float(value)


def _check_steps(steps: int, strength: float, most: int) -> None:
    if not 1 <= steps <= most:
        raise _wrong("steps", f"an integer in [1, {most}]", f"{steps}")
    if not 0 < strength <= 1:
        raise _wrong("strength", "above 0 and at most 1", f"{strength}")
    if int(steps * strength) < 1:
        enough = next((n for n in range(steps, most + 1) if int(n * strength) >= 1), None)
        more = "" if enough is None else f", or steps at least {enough}"
        least = "1 for 1 step" if steps == 1 else f"1/{steps} for {steps} steps"
        raise _wrong("strength", f"at least {least}, so that one is made{more}", f"{strength}")


def default_dtype(config: TransformerConfig, device: str | torch.device = "cuda") -> torch.dtype:
    """The dtype that a model was published to run in: float16 for 2B, bfloat16 for 5B and 1.5 (and
    whatever is trained anew), float32 on a CPU."""
    if torch.device(device).type == "cpu":
        return torch.float32
    return torch.bfloat16 if config.use_rotary_positional_embeddings else torch.float16


def _mode(transformer: TransformerConfig, inputs: Inputs) -> str:
    if inputs.image is not None and inputs.video is not None:
        raise _wrong("image", "None where a video is given", "both")
    mode = "image" if inputs.image is not None else "video" if inputs.video is not None else "text"
    takes_image = transformer.in_channels == 2 * transformer.out_channels
    if takes_image != (mode == "image"):
        kind = "an image-to-video" if takes_image else "a text- and video-to-video"
        raise _wrong(
            "image",
            "given" if takes_image else "None",
            f"{'none' if takes_image else 'one'}: this is {kind} model, whose transformer has "
            f"{transformer.in_channels} channels in and {transformer.out_channels} out",
        )
    return mode


def _batch(inputs: Inputs, guided: bool, uncond: str) -> int:
    texts = (inputs.prompt, inputs.negative_prompt)
    for name, text in zip(("prompt", "negative_prompt"), texts, strict=True):
        words = [text] if isinstance(text, str) or text is None else list(text)
        if any(not isinstance(word, str) for word in words if word is not None):
            raise TypeError(f"{WHERE}: {name} must be text or a list of texts; got {text!r:.80}")
    if (inputs.prompt is None) == (inputs.prompt_embeds is None):
        came = "neither" if inputs.prompt is None else "both"
        raise _wrong("prompt", "given, or else prompt_embeds", came)
    if inputs.prompt_embeds is not None:
        batch = len(inputs.prompt_embeds)
    else:
        batch = len(inputs.prompts)
    if batch < 1:
        raise _wrong("prompt", "at least one text", "none")
    negative = inputs.negative_prompt
    if not isinstance(negative, str) and len(negative) != batch:
        raise _wrong("negative_prompt", f"one text, or {batch} as prompts", f"{len(negative)}")
    if inputs.negative_prompt_embeds is not None and negative:
        raise _wrong("negative_prompt", "empty where negative_prompt_embeds are given", "both")
    if guided and uncond == "zeros" and (negative or inputs.negative_prompt_embeds is not None):
        raise _wrong("negative_prompt", 'empty with uncond="zeros", which has no words', "one")
    return batch


def _like_source(
    mode: str, source: Tensor, batch: int, vae: VAEConfig, height: int | None, width: int | None
) -> tuple[int, int]:
    """The size of the image or video, which must agree with what else was said."""
    dims = {"image": "(batch, {}, height, width)", "video": "(batch, frames, {}, height, width)"}
    wanted = f"a tensor {dims[mode].format(vae.in_channels)} in [-1, 1]"
    if not isinstance(source, Tensor) or not source.is_floating_point():
        if isinstance(source, Tensor) and source.dtype == torch.uint8:
            hint = f"; {mode}.float() / 127.5 - 1 is that"
        else:
            hint = f"; PIL images are taken too, and cogvx.video.read_{mode} reads a file"
        raise TypeError(f"{WHERE}: {mode} must be {wanted}; got {_came(source)}{hint}")
    if source.dim() != (4 if mode == "image" else 5) or source.shape[-3] != vae.in_channels:
        raise _wrong(mode, wanted, _came(source))
    if len(source) not in (1, batch):
        raise _wrong(mode, f"one, or one for each of {batch} prompts", f"{len(source)}")
    low, high = source.aminmax() if source.numel() else (source.new_zeros(()),) * 2
    if not (low >= -1.001 and high <= 1.001):  # a rounding, not a range of its own
        hint = "; / 127.5 - 1 brings [0, 255] there" if low >= 0 and 1 < high <= 255 else ""
        raise _wrong(mode, "in [-1, 1]", f"values from {low:.4g} to {high:.4g}{hint}")
    return (
        _agreed("height", height, source.shape[-2], f"the {mode}'s"),
        _agreed("width", width, source.shape[-1], f"the {mode}'s"),
    )


def _agreed(name: str, said: int | None, has: int, whose: str) -> int:
    if said not in (None, has):
        raise _wrong(name, f"{whose}, {has} (resize it first), or None", f"{said}")
    return has


def _text_length(transformer: TransformerConfig, said: int | None, embeds: Tensor | None) -> int:
    longest = transformer.max_text_seq_length
    added = (
        transformer.use_learned_positional_embeddings
        or not transformer.use_rotary_positional_embeddings
    )
    usual = longest if embeds is None else embeds.shape[1]
    length = usual if said is None else said
    if length < 1:
        raise _wrong("text_length", "at least 1", f"{length}")
    if added and length != longest:
        raise _wrong(
            "text_length", f"{longest}, because this model adds positions to text", f"{length}"
        )
    return length


def _check_tensors(transformer: TransformerConfig, inputs: Inputs, request: Request) -> None:
    embeds = (request.batch, request.text_length, transformer.text_embed_dim)
    for name in ("prompt_embeds", "negative_prompt_embeds"):
        value = getattr(inputs, name)
        if value is not None and tuple(value.shape) != embeds:
            raise _wrong(name, f"(batch, text_len, text_embed_dim) = {embeds}", _came(value))
    latents = inputs.latents
    if latents is not None and request.mode == "video":
        raise _wrong("latents", "None where a video is given, which they come from", "both")
    if latents is not None and tuple(latents.shape) != request.shape:
        note = f", of which {request.padding} pads" if request.padding else ""
        raise _wrong(
            "latents", f"(batch, frames{note}, channels, height, width) = {request.shape}",
            _came(latents),
        )  # fmt: skip


def _wrong(name: str, wanted: str, came: str) -> ValueError:
    return ValueError(f"{WHERE}: {name} must be {wanted}; got {came}")


def _came(value: object) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"
    return type(value).__name__


def check_finite(tensor: Tensor, stage: str) -> None:
    """Raises FloatingPointError that names the stage if a value is NaN or infinite."""
    low, high = tensor.aminmax()  # NaN is the least and the most; no copy is made
    if not (math.isfinite(low) and math.isfinite(high)):
        dtype = str(tensor.dtype).removeprefix("torch.")
        hint = "; the 5B models overflow in it: use bfloat16" if dtype == "float16" else ""
        raise FloatingPointError(f"{WHERE}: {stage} gave NaN or infinity in {dtype}{hint}")
