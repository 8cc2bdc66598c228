"""Build conditioning tensors from text, image and video; decode latents."""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from ..profiling import annotate
from ..schedulers import Generators, Solver, TimestepSchedule, randn_tensor
from ..text import TextEncoder
from ..vae import CausalVAE, Tiling
from .denoise import each
from .params import Request, check_finite

Progress = Callable[[str, int, int], None]


def embeddings(
    text_encoder: TextEncoder | None, request: Request, progress: Progress
) -> tuple[Tensor, Tensor | None]:
    """Embeddings of the prompts and, with guidance, of the negative prompts.

    Both (batch, text_len, dim). With uncond="zeros" the negative ones are zeros, as in SAT; with
    "prompt" they are those of the negative prompt, by default "", as in diffusers. Each distinct
    text is encoded once.
    """
    text, negative = request.prompt_embeds, request.negative_prompt_embeds
    total = (text is None) + (request.guided and request.uncond == "prompt" and negative is None)
    done = 0
    if total:
        progress("text", done, total)
    if text is None:
        text = _encode(text_encoder, request.prompts, request)
        done += 1
        progress("text", done, total)
    if not request.guided:
        return text, None
    if request.uncond == "zeros":
        return text, torch.zeros_like(text)
    if negative is None:
        words = request.negative_prompt
        texts = [words] if isinstance(words, str) else list(words)
        negative = _encode(text_encoder, texts, request).expand(request.batch, -1, -1)
        progress("text", done + 1, total)
    return text, negative


def _encode(text_encoder: TextEncoder | None, texts: Sequence[str], request: Request) -> Tensor:
    if text_encoder is None:
        raise ValueError(
            "CogVideoX.generate: text_encoder must be there to encode a prompt; got None: load the "
            "model with one, or give prompt_embeds and, for guidance, negative_prompt_embeds"
        )
    distinct = list(dict.fromkeys(texts))
    with annotate("text encoder"):
        states = text_encoder.encode(distinct, request.text_length)
    check_finite(states, "the text encoder")
    if len(distinct) == len(texts):
        return states
    return states[[distinct.index(text) for text in texts]]


def encoded(
    vae: CausalVAE,
    video: Tensor,
    generator: Generators,
    progress: Progress,
    tiling: Tiling | None = None,
) -> Tensor:
    """Unscaled latents of (batch, frames, channels, height, width), sampled from the posterior.

    One item after another, as in diffusers and to save memory, each with its own noise. Of several
    generators each draws for its item, or all for the same one.
    """
    weight = next(vae.parameters())
    latents = []
    generators = each(generator)
    for index, item in enumerate(torch.split(video.to(weight), 1)):
        chunks = partial(_item_progress, progress, index, len(video))
        posterior = vae.encode(item, tiling=tiling, progress=chunks)
        own = generators if len(video) == 1 else [generators[index % len(generators)]]
        latents += [posterior.sample(one) for one in own]
    raw = torch.cat(latents)
    check_finite(raw, "the VAE's encoder")
    return raw


def _item_progress(progress: Progress, item: int, items: int, done: int, total: int) -> None:
    progress("encode", item * total + done, items * total)


def decode(
    vae: CausalVAE,
    latents: Tensor,
    tiling: Tiling | None = None,
    progress: Progress | None = None,
) -> Tensor:
    """Decode scaled latents without padding to a video, float32, clamped to [-1, 1].

    latents   (batch, frames, channels, height, width), any device and dtype
    progress  called with "decode", the number of chunks done, and their total

    Raises FloatingPointError if the VAE gives NaN or infinity.
    """
    weight = next(vae.parameters())
    chunks = None if progress is None else partial(progress, "decode")
    raw = (1 / vae.config.scaling_factor) * latents.to(weight)
    with torch.no_grad():
        video = vae.decode(raw, tiling=tiling, progress=chunks)
    check_finite(video, "decode")
    return video.float().clamp_(-1, 1)


def image_condition(raw: Tensor, vae: CausalVAE, request: Request, like: Tensor) -> Tensor:
    """Condition channels of image-to-video: the image's latents, then zeros.

    For CogVideoX1.5 (a VAE with `invert_scale_latents`) three scales are in use: "diffusers"
    divides by the scaling factor, "sat" leaves the latents as they are, "train" multiplies, as both
    training programs did. 1.0 always multiplies. With padding, the image is in the first padding
    frame, which is dropped in the end. Source: `docs/model.md`, section 6.3.

    raw      (1 or batch, 1, channels, height, width)
    returns  of request.shape, dtype and device of `like`
    """
    scale = vae.config.scaling_factor
    if vae.config.invert_scale_latents:
        scale = {"diffusers": 1 / scale, "sat": 1.0, "train": scale}[request.image_latent_scale]
    condition = torch.zeros(request.shape, dtype=like.dtype, device=like.device)
    condition[:, :1] = scale * raw.to(like)
    return condition


def noisy_video(
    raw: Tensor,
    vae: CausalVAE,
    request: Request,
    solver: Solver,
    timesteps: TimestepSchedule,
    generator: Generators,
    like: Tensor,
) -> Tensor:
    """Initial latents of video-to-video: the video's, noised to the first timestep.

    Padding repeats the first latent, as in the training of CogVideoX1.5. (diffusers refuses clips
    that need padding.) The scale multiplies in every model. Source: `docs/model.md`, section 6.4.

    raw      (1 or batch, frames without padding, channels, height, width)
    returns  of request.shape, dtype and device of `like`
    """
    latents = vae.config.scaling_factor * raw.to(like)
    padding = latents[:, :1].expand(-1, request.padding, -1, -1, -1)
    latents = torch.cat([padding, latents], 1).expand(request.shape)
    noise = randn_tensor(latents, generator)
    return solver.schedule.add_noise(latents, noise, timesteps.timesteps[0])
