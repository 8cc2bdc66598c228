"""diffusers' CogVideoX VAE as a stream: the video of each chunk of latents as soon as it can be.

`vae.decode` walks a clip in chunks of two latent frames, the first of which also takes what remains
(fact sheet, section 4.7), and holds the whole clip. Here the same chunks go through the same
decoder, and what it remembers between them is held by whoever asks.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import Tensor

from ..streaming import Cache, StreamState, stream
from .api import UnsupportedModelError, model_of
from .cogvideox_vae import FAMILY, Frames


class ConvCache(Cache):
    """What the decoder's convolutions remember: None, or a dict of dicts as the decoder gave it."""

    def __init__(self, of_convs: Any = None) -> None:
        super().__init__()
        self.of_convs = of_convs

    def clear(self) -> None:
        self.of_convs = None

    def tensors(self) -> list[Tensor]:
        found: list[Tensor] = []
        _mapped(self.of_convs, found.append)
        return found

    def mapped(self, function: Callable[[Tensor], Tensor]) -> "ConvCache":
        other = ConvCache(_mapped(self.of_convs, function))
        other.broken = self.broken
        return other


def _mapped(value: Any, function: Callable[[Tensor], Any]) -> Any:
    if isinstance(value, dict):
        return {name: _mapped(x, function) for name, x in value.items()}
    if isinstance(value, Frames):
        return Frames(function(value.read()))
    return None if value is None else function(value)


class DecodeState(StreamState):
    """Between the chunks of latents that are being decoded; counts latent frames."""

    cache: ConvCache

    def new_cache(self) -> ConvCache:
        return ConvCache()


def stream_decode(
    vae: Any,
    latents: Tensor | Iterable[Tensor],
    state: DecodeState | None = None,
    *,
    total: int | None = None,
    last: bool = True,
) -> Iterator[Tensor]:
    """`vae.decode` of a diffusers AutoencoderKLCogVideoX, chunk by chunk, bit for bit the same.

    Under `patch` what is held between two chunks is two frames for each causal convolution, however
    long the clip; without it the VAE's own way holds more than twice that while a chunk is decoded.

    Args:
        vae: the VAE, patched or not; it must not tile what it is given.
        latents: (batch, latent frames, latent_channels, height, width), dtype and device of the
            VAE, already divided by its scaling factor; or pieces of them in order. A pipeline's
            `output_type="latent"` has this order of dims.
        state: where the clip stands, to go on from and to leave behind; None begins a clip.
        total: latent frames of the whole clip. A clip given as one tensor needs none; without it
            pieces must be the VAE's own chunks: 1, 2 or 3 latent frames, then 2 each.
        last: whether the clip ends with these latents; if not, those whose chunk is not full yet
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
    way = _Decoding(vae)
    return stream(way, latents, state, total, last, kind=DecodeState, whose="cogvx_kernels")


class _Decoding:
    """The way through the decoder: see `cogvx_kernels.streaming.Way`."""

    where = "stream_decode"
    name = "latents"
    leads = False

    def __init__(self, vae: Any) -> None:
        model = model_of(vae)
        if model is None or model.family is not FAMILY:
            raise UnsupportedModelError(
                f"stream_decode: vae must be a {FAMILY.models[0]}; got {type(vae).__name__}"
            )
        self.vae = model.module
        self.chunk: int = self.vae.num_latent_frames_batch_size

    def plan(self, frames: int) -> tuple[int, ...]:
        chunks = max(frames // self.chunk, 1)
        return (frames - (chunks - 1) * self.chunk, *[self.chunk] * (chunks - 1))

    def check_frames(self, count: int, name: str | None = None) -> None:
        if count < 1:
            raise ValueError(
                f"{self.where}: {name or self.name} must have at least 1 frame; got {count}"
            )

    def check(self, x: Any) -> Tensor:
        dims = "(batch, frames, channels, height, width)"
        vae, weight = self.vae, self.vae.decoder.conv_in.conv.weight
        if not isinstance(x, Tensor):
            raise self._wrong(TypeError, f"a tensor {dims}", type(x).__name__)
        if x.dim() != 5 or x.shape[2] != vae.config.latent_channels or 0 in x.shape:
            wanted = f"{dims} with {vae.config.latent_channels} channels and nothing empty"
            raise self._wrong(ValueError, wanted, f"{tuple(x.shape)}")
        if x.dtype != vae.dtype:
            raise self._wrong(TypeError, f"{vae.dtype} as the VAE", f"{x.dtype}")
        hook = getattr(vae, "_hf_hook", None)
        device = weight.device if hook is None else x.device  # a hook moves the weights when called
        if x.device != device:
            raise self._wrong(ValueError, f"on {device} as the VAE", f"{x.device}")
        height, width = vae.tile_latent_min_height, vae.tile_latent_min_width
        if vae.use_tiling and (x.shape[3] > height or x.shape[4] > width):
            raise ValueError(
                f"{self.where}: vae must not tile, and cuts latents of more than {height}x{width}; "
                "call vae.disable_tiling()"
            )
        return x

    def coder(self, latents: Tensor, cache: ConvCache) -> Tensor:
        vae = self.vae
        hook = getattr(vae, "_hf_hook", None)
        if hook is not None and hasattr(hook, "pre_forward"):
            hook.pre_forward(vae)  # as `vae.decode` does: offloaded weights come back
        z = latents.transpose(1, 2)
        try:
            if vae.post_quant_conv is not None:
                z = vae.post_quant_conv(z)
            video, cache.of_convs = vae.decoder(z, conv_cache=cache.of_convs)
        except BaseException:
            cache.clear()
            cache.broken = True
            raise
        return video.transpose(1, 2)

    def _wrong(self, kind: type[Exception], wanted: str, came: str) -> Exception:
        return kind(f"{self.where}: {self.name} must be {wanted}; got {came}")
