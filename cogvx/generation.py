"""Options of a generation. Imports no torch, so that the command line can show them at once."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from .schedulers import Generators
    from .vae import Tiling

PathLike = str | os.PathLike[str]
WHERE = "CogVideoX.generate"  # prefix of error messages
CHOICES: Mapping[str, tuple[str, ...]] = {
    "solver": ("ddim", "dpm"),
    "cfg": ("batch", "two_pass"),
    "uncond": ("prompt", "zeros"),
    "image_latent_scale": ("diffusers", "sat", "train"),
    "output": ("video", "latents"),
}


@dataclass(frozen=True, eq=False)
class GenerationParams:
    """Options of `CogVideoX.generate`, which also takes each of them as a keyword argument.

    Args:
        prompt: one text or several, a video for each; long and in English, as in training.
        negative_prompt: what the video should not show; one, or one for each prompt.
        image: the first frame, (batch or 1, 3, height, width) in [-1, 1], of the video's size; or a
            PIL image or a uint8 array (height, width, 3), which is resized, or a list of them, one
            for each prompt. Required by image-to-video models, refused by others.
        video: the source of video-to-video, (batch or 1, frames, 3, height, width) in [-1, 1]; or a
            list of PIL images or uint8 arrays, or a list of such lists.
        strength: of the change to `video`: the last int(steps·strength) of the steps are run.
        num_frames: by default 49 for CogVideoX, 81 for 1.5, unless the config has another number.
            (diffusers' image-to-video takes 49 for 1.5 too.) See `cogvx.frames`.
        height, width: in pixels, multiples of 16; by default those of the config or the source.
        steps: denoising steps, 1 to 1000.
        guidance: classifier-free guidance scale. At 1 or less there is no second prediction, which
            is twice as fast.
        dynamic_guidance: see `cogvx.schedulers.dynamic_guidance`. False as in diffusers; the 5B
            models are recommended with True and solver="dpm".
        solver: "ddim" or "dpm"; by default the model's own.
        compat: step as diffusers if the number of steps does not divide 1000.
        seed: of all random numbers, which are drawn on the CPU: the same on every device.
        generator: draws the random numbers, in diffusers' order; or a list, one for each video,
            which then does not depend on the others.
        num_videos_per_prompt: videos of each prompt, one after another in the batch.
        prompt_embeds, negative_prompt_embeds: (batch, text_len, text_embed_dim), instead of texts.
        latents: initial noise, padding included, instead of random numbers.
        cfg: "batch" computes both predictions of guidance at once, "two_pass" one by one.
        uncond: "prompt" takes the embeddings of `negative_prompt`, "zeros" zeros, as SAT does.
        image_latent_scale: of 1.5's image-to-video: "diffusers", "sat" or "train"; see
            `cogvx.pipeline.conditioning.image_condition`.
        text_length: tokens of a prompt; by default the config's, 226. SAT has 224 for 1.5.
        tiling: of the VAE, if a clip does not fit into memory; see `cogvx.Tiling`.
        output: "video", or "latents", scaled and still padded, as in diffusers.
        callback: called after each step; see `cogvx.pipeline.denoise.denoise`.
        progress: called with a stage ("text", "encode", "denoise", "decode"), how much of it is
            done and the total (texts, VAE chunks, steps); first with 0 when the stage begins.
        save_latents: file for the latents, written before they are decoded (`decode_saved`).
        checkpoint_every: also write it after every so many steps.
        resume: such a file, to continue from. The result is the same, bit for bit. All other
            options must be as they were.
    """

    prompt: str | Sequence[str] | None = None
    _: KW_ONLY
    negative_prompt: str | Sequence[str] | None = ""
    image: Any = None
    video: Any = None
    strength: float = 0.8
    num_frames: int | None = None
    height: int | None = None
    width: int | None = None
    steps: int = 50
    guidance: float = 6.0
    dynamic_guidance: bool = False
    solver: str | None = None
    compat: bool = False
    seed: int | None = None
    generator: "Generators | None" = None
    num_videos_per_prompt: int = 1
    prompt_embeds: "Tensor | None" = None
    negative_prompt_embeds: "Tensor | None" = None
    latents: "Tensor | None" = None
    cfg: str = "batch"
    uncond: str = "prompt"
    image_latent_scale: str = "diffusers"
    text_length: int | None = None
    tiling: "Tiling | None" = None
    output: str = "video"
    callback: "Callable[[int, int, Tensor], Tensor | None] | None" = None
    progress: Callable[[str, int, int], None] | None = None
    save_latents: PathLike | None = None
    checkpoint_every: int | None = None
    resume: PathLike | None = None

    @property
    def prompts(self) -> list[str]:
        """The prompts as a list; empty without any."""
        return [self.prompt] if isinstance(self.prompt, str) else list(self.prompt or ())
