"""diffusers' CogVideoX VAE as a stream: the video of each chunk of latents as soon as it can be.

`vae.decode` runs a clip in chunks of two latent frames, the first of which also takes the remainder
(`docs/model.md`, section 4.7), and holds the whole clip. Here the same chunks go through the same
decoder, and its caches are in a state that the caller holds.
"""

from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor

from ..chunks import Chunking
from ..streaming import CoderSpec, DecodeState
from .api import UnsupportedModelError, model_of

MODEL = "AutoencoderKLCogVideoX"


def stream_decode(
    vae: Any,
    latents: Tensor | Iterable[Tensor],
    state: DecodeState | None = None,
    *,
    total: int | None = None,
    last: bool = True,
) -> Iterator[Tensor]:
    """`vae.decode` of a diffusers AutoencoderKLCogVideoX, chunk by chunk, bit for bit the same.

    Under `patch` two frames are held between two chunks for each causal convolution, however long
    the clip; without it the VAE holds more than twice that while a chunk is decoded.

    Args:
        vae: the VAE, patched or not; it must not tile its input.
        latents: (batch, latent frames, latent_channels, height, width), dtype and device of the
            VAE, already divided by its scaling factor; or pieces of them in order. A pipeline's
            `output_type="latent"` has this order of dims.
        state: position in the clip, continued and updated; None begins a clip.
        total: latent frames of the whole clip. A clip given as one tensor needs none; without it
            pieces must be the VAE's own chunks: 1, 2 or 3 latent frames, then 2 each.
        last: True if the clip ends with these latents; if not, those whose chunk is not full yet
            wait in the state.

    Yields:
        (batch, frames, 3, 8 · height, 8 · width) for each chunk, values in about [-1, 1]. Under
        `torch.no_grad()` peak memory does not grow with the clip.

    Raises:
        UnsupportedModelError: another VAE.
        TypeError, ValueError: an argument, or a piece when it comes, is not as above. The state is
            as it was before that piece.
        RuntimeError: the state's clip has ended, or was lost to an exception in a chunk.
    """
    model = model_of(vae)
    if model is None or MODEL not in model.family.models:
        raise UnsupportedModelError(
            f"stream_decode: vae must be a {MODEL}; got {type(vae).__name__}"
        )
    vae = model.module
    hook = getattr(vae, "_hf_hook", None)
    spec = CoderSpec(
        "stream_decode",
        name="latents",
        coder=MODEL,
        chunking=Chunking(vae.num_latent_frames_batch_size),
        channels=vae.config.latent_channels,
        dtype=vae.dtype,
        # A hook moves the weights when the VAE is called.
        device=vae.decoder.conv_in.conv.weight.device if hook is None else None,
    )
    opened = spec.open(state)
    if vae.use_tiling:
        if isinstance(latents, Tensor):
            _check_untiled(vae, latents)
        elif isinstance(latents, Iterable):
            latents = (_check_untiled(vae, piece) for piece in latents)

    def run(chunk: Tensor) -> Tensor:
        z, cache = chunk.transpose(1, 2), opened.cache
        with opened.running(chunk.shape[1]), cache.chunk(leads=False):
            if hook is not None and hasattr(hook, "pre_forward"):
                hook.pre_forward(vae)  # as `vae.decode` does: offloaded weights come back
            if vae.post_quant_conv is not None:
                z = vae.post_quant_conv(z)
            video, cache.frames = vae.decoder(z, conv_cache=cache.frames or None)
        return video.transpose(1, 2)

    return map(run, spec.chunks(latents, opened, total, last))


def _check_untiled(vae: Any, latents: Any) -> Any:
    height, width = vae.tile_latent_min_height, vae.tile_latent_min_width
    too_large = (
        isinstance(latents, Tensor)
        and latents.dim() == 5
        and (latents.shape[3] > height or latents.shape[4] > width)
    )
    if too_large:
        raise ValueError(
            f"stream_decode: vae must not tile, and cuts latents of more than {height}x{width}; "
            "call vae.disable_tiling()"
        )
    return latents
