"""Parts of CogVideoX as a user runs them today, and ours, on the same weights and arguments."""

import copy
import dataclasses
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderKLCogVideoX, CogVideoXPipeline, CogVideoXTransformer3DModel
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from cogvx.checkpoint.folder import transformer_values, vae_values
from cogvx.config import PRESETS, TransformerConfig, VAEConfig
from cogvx.transformer import ExpertTransformer
from cogvx.vae import CausalVAE
from cogvx_kernels import patch

THEIRS, OURS = "diffusers", "cogvx"
COMPILED, CUDNN, AHEAD = "diffusers-compile", "diffusers-compile-cudnn", "cogvx-ahead"
NEAR, COMPILED_NEAR = "diffusers-channels-last", "diffusers-compile-channels-last"
PATCHED, PATCHED_FAST = "diffusers-patched", "diffusers-patched-fast"
REFERENCE = "cogvx-reference"
SIDES = (
    NEAR, COMPILED, COMPILED_NEAR, CUDNN, PATCHED, PATCHED_FAST, OURS, AHEAD, REFERENCE
)  # fmt: skip
CUDNN_FIRST = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]

# What it gives, by name: of a training step the gradients.
Call = Callable[[], Mapping[str, Tensor]]
Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Size:
    """A clip, in frames of video and pixels, and the widths of the models that take it."""

    frames: int
    height: int
    width: int
    vae: VAEConfig
    transformer: TransformerConfig


@dataclass
class Scene:
    """What is run by turns: diffusers' first, by which the others are measured.

    sides     name -> call
    left_out  name -> why it has none
    truth     what all are compared with, if that is not diffusers' side
    forward   of a training step, name -> its forward, of which is weighed what it saves
    weights   parameters, which are not weighed
    """

    title: str
    sides: dict[str, Call]
    left_out: dict[str, str] = field(default_factory=dict)
    truth: Call | None = None
    forward: dict[str, Callable[[], Any]] = field(default_factory=dict)
    weights: list[Tensor] = field(default_factory=list)


# A tenth of the released widths and a clip with every kind of chunk: what a CPU does in a second.
SMALL = Size(
    17,
    64,
    96,
    VAEConfig(block_out_channels=(32, 64, 64, 128), norm_num_groups=8),
    TransformerConfig(
        num_attention_heads=4,
        num_layers=2,
        text_embed_dim=128,
        use_rotary_positional_embeddings=True,
    ),
)
TINY = dataclasses.replace(  # for tests of this program itself
    SMALL,
    frames=9,
    height=32,
    width=48,
    vae=VAEConfig(block_out_channels=(8, 16, 16, 16), norm_num_groups=4),
    transformer=dataclasses.replace(
        SMALL.transformer, num_attention_heads=1, max_text_seq_length=16
    ),
)
SIZES = {
    "tiny": TINY,
    "small": SMALL,
    **{
        f"{name}-{p.height}x{p.width}-{p.frames}f": Size(
            p.frames, p.height, p.width, p.vae, p.transformer
        )
        for name, p in PRESETS.items()
    },
}

# --- the VAE ---------------------------------------------------------------------------------


def _vae_decode(size: Size, dtype: torch.dtype, device: torch.device) -> Iterable[Scene]:
    latents = _noise((1, *_latents(size)), dtype, device)

    def theirs(vae: Any, x: Tensor) -> Mapping[str, Tensor]:
        return {"video": vae.decode(x).sample.transpose(1, 2)}

    def ours(vae: CausalVAE) -> Mapping[str, Tensor]:
        return {"video": vae.decode(latents)}

    yield _vae_scene("vae-decode", "decoder", theirs, ours, latents, size)


def _vae_encode(size: Size, dtype: torch.dtype, device: torch.device) -> Iterable[Scene]:
    video = _noise((1, size.frames, 3, size.height, size.width), dtype, device)

    def theirs(vae: Any, x: Tensor) -> Mapping[str, Tensor]:
        return {"mean": vae.encode(x).latent_dist.mean.transpose(1, 2)}

    def ours(vae: CausalVAE) -> Mapping[str, Tensor]:
        return {"mean": vae.encode(video).mean}

    yield _vae_scene("vae-encode", "encoder", theirs, ours, video, size)


def _vae_scene(
    title: str,
    half: str,
    theirs: Callable[[Any, Tensor], Mapping[str, Tensor]],
    ours: Callable[[CausalVAE], Mapping[str, Tensor]],
    x: Tensor,
    size: Size,
) -> Scene:
    """Either half of the VAE: diffusers' in both layouts and compiled, ours in both backends.

    x: what goes in, (batch, frames, channels, height, width)
    """
    their_vae, our_vae = _vaes(size, x.dtype, x.device)
    flat = x.transpose(1, 2).contiguous()  # as diffusers has it
    near = channels_last(copy.deepcopy(their_vae))
    near_flat = flat.contiguous(memory_format=torch.channels_last_3d)
    scene = Scene(
        title,
        {THEIRS: partial(theirs, their_vae, flat), NEAR: partial(theirs, near, near_flat)},
    )
    if x.is_cuda:
        scene.sides[COMPILED] = partial(theirs, half_compiled(their_vae, half), flat)
        scene.sides[COMPILED_NEAR] = partial(theirs, half_compiled(near, half), near_flat)
    else:
        scene.left_out[COMPILED] = "every kind of chunk takes a CPU minutes to compile"
    scene.sides[PATCHED] = partial(theirs, patched(their_vae), flat)
    scene.sides[PATCHED_FAST] = partial(theirs, patched(their_vae, "fast"), flat)
    scene.sides[OURS] = partial(ours, our_vae)
    reference = _with_weights_of(their_vae, lambda: CausalVAE(size.vae, backend="reference"))
    scene.sides[REFERENCE] = partial(ours, reference)
    return scene


def channels_last(module: Any) -> Any:
    """The same module, its convolutions' weights with their channels side by side."""
    for child in module.modules():
        if isinstance(child, (nn.Conv2d, nn.Conv3d)):
            three = isinstance(child, nn.Conv3d)
            near = torch.channels_last_3d if three else torch.channels_last
            child.weight.data = child.weight.data.contiguous(memory_format=near)
    return module


def half_compiled(vae: Any, half: str) -> Any:
    """diffusers' VAE with its encoder or decoder compiled, chunk by chunk, on the same weights."""
    other = copy.copy(vae)
    other._modules = {**vae._modules, half: compiled(getattr(vae, half))}
    return other


# --- the transformer -------------------------------------------------------------------------


def _transformer(size: Size, dtype: torch.dtype, device: torch.device) -> Iterable[Scene]:
    """One denoising step under guidance: a batch of two."""
    config = size.transformer
    theirs, ours = _transformers(config, dtype, device)
    latents = _noise((2, *_padded(size)), dtype, device)
    text = _noise((2, config.max_text_seq_length, config.text_embed_dim), dtype, device)
    timestep = torch.tensor([999, 999], device=device)
    ofs = None if config.ofs_embed_dim is None else torch.full((1,), 2.0, device=device)
    rotary = _rotary(theirs, size, latents.shape[1], device)

    def step(model: Callable[..., Any]) -> Mapping[str, Tensor]:
        out = model(latents, text, timestep, ofs=ofs, image_rotary_emb=rotary, return_dict=False)
        return {"v": out[0]}

    with torch.no_grad():  # as the pipelines do, once before a run
        ahead = {
            "text": ours.project_text(text),
            "modulations": ours.modulations(timestep[:1], ofs),
        }
    scene = Scene(
        f"transformer, {config.num_layers} blocks",
        {
            THEIRS: partial(step, theirs),
            COMPILED: partial(step, compiled(theirs)),
            PATCHED: partial(step, patched(theirs)),
            OURS: lambda: {"v": ours(latents, text, timestep, ofs)},
            AHEAD: lambda: {"v": ours(latents, **ahead)},
        },
    )
    yield _with_cudnn(scene, partial(step, compiled(theirs)), device)


def _block(size: Size, dtype: torch.dtype, device: torch.device) -> Iterable[Scene]:
    """One block, from stream to stream: without a gradient, and then there and back."""
    config = dataclasses.replace(size.transformer, num_layers=1)
    their_model, our_model = _transformers(config, dtype, device)
    theirs, ours = their_model.transformer_blocks[0], our_model.transformer_blocks[0]
    with_kernels = patched(their_model).transformer_blocks[0]
    frames, _, height, width = _padded(size)
    patch = config.patch_size_t or 1, config.patch_size, config.patch_size
    video_len = frames // patch[0] * (height // patch[1]) * (width // patch[2])
    text_len, dim = config.max_text_seq_length, config.hidden_size
    x = _noise((2, text_len + video_len, dim), dtype, device)
    apart = tuple(part.contiguous() for part in x.split((text_len, video_len), 1))
    temb = _noise((2, config.time_embed_dim), dtype, device)
    rotary = _rotary(their_model, size, frames, device)
    tables = our_model.tables.rope(frames, height, width, device).unbind(0)
    del their_model, our_model

    def their_way(
        block: Callable[..., Any], text: Tensor, video: Tensor, temb: Tensor = temb
    ) -> Pair:
        return block(video, text, temb, image_rotary_emb=rotary)[::-1]

    def our_way(x: Tensor) -> Pair:
        out, _ = ours.whole(x, F.silu(temb), *tables, text_len)
        return out[:, :text_len], out[:, text_len:]

    ways = {
        THEIRS: _Way(partial(their_way, theirs), apart, theirs, text_len),
        COMPILED: _Way(partial(their_way, compiled(theirs)), apart, theirs, text_len),
        PATCHED: _Way(partial(their_way, with_kernels), apart, with_kernels, text_len),
        OURS: _Way(our_way, (x,), ours, text_len),
    }
    cudnn = _Way(partial(their_way, compiled(theirs)), apart, theirs, text_len)
    forth = Scene("block, forward", {name: way.outputs for name, way in ways.items()})
    yield _with_cudnn(forth, cudnn.outputs, device)
    for trained in (theirs, ours, x, *apart):
        trained.requires_grad_(True)
    douts = tuple(_noise(tuple(part.shape), dtype, device) for part in apart)

    def in_fp32() -> Mapping[str, Tensor]:
        """Of 16-bit sums of 16-bit numbers each side has its own."""
        way = copy.deepcopy(ways[THEIRS].block).float()
        inputs = tuple(part.detach().float().requires_grad_(True) for part in apart)
        call = partial(their_way, way, temb=temb.float())
        return _Way(call, inputs, way, text_len).gradients(tuple(x.float() for x in douts))

    yield Scene(
        "block, both ways",
        {name: partial(way.gradients, douts) for name, way in ways.items()},
        truth=in_fp32,
        forward={name: way.outputs for name, way in ways.items()},
        weights=[*theirs.parameters(), *ours.parameters()],
    )


@dataclass(frozen=True)
class _Way:
    """A block as one side runs it.

    call    inputs -> (text, video)
    inputs  (text, video), or both in one
    """

    call: Callable[..., Pair]
    inputs: tuple[Tensor, ...]
    block: nn.Module
    text_len: int

    def outputs(self) -> dict[str, Tensor]:
        return dict(zip(("text", "video"), self.call(*self.inputs), strict=True))

    def gradients(self, douts: Pair) -> dict[str, Tensor]:
        """Of the two streams and of every parameter."""
        names, parameters = zip(*self.block.named_parameters(), strict=True)
        of = torch.autograd.grad(self.call(*self.inputs), (*self.inputs, *parameters), douts)
        streams, weights = of[: len(self.inputs)], of[len(self.inputs) :]
        if len(streams) == 1:
            streams = streams[0][:, : self.text_len], streams[0][:, self.text_len :]
        return dict(zip(("text", "video", *names), (*streams, *weights), strict=True))


PARTS: dict[str, Callable[[Size, torch.dtype, torch.device], Iterable[Scene]]] = {
    "vae-decode": _vae_decode,
    "vae-encode": _vae_encode,
    "transformer": _transformer,
    "block": _block,
}

# --- compiled --------------------------------------------------------------------------------


def compiled(module: nn.Module) -> Callable[..., Any]:
    """torch.compile of a module, in default mode, that shares nothing with another one's.

    What is compiled is kept by code and backend: with torch's own backend a second one, of the
    same code under another order of attention, would be handed the first.
    """
    from torch._inductor.compile_fx import compile_fx

    def inductor(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        return compile_fx(graph, inputs)

    return torch.compile(module, backend=inductor, fullgraph=True, dynamic=False)


def patched(model: Any, mode: str = "exact") -> Any:
    """diffusers' model with the kernels in it, on the same weights."""
    own = {id(x): x for x in (*model.parameters(), *model.buffers())}
    other = copy.deepcopy(model, own)
    patch(other, mode=mode)
    return other


def _with_cudnn(scene: Scene, call: Call, device: torch.device) -> Scene:
    """The scene, and the compiled side once more with cuDNN's attention before the others."""
    if device.type != "cuda" or not torch.backends.cudnn.is_available():
        scene.left_out[CUDNN] = "there is no cuDNN attention here"
        return scene

    def cudnn_first() -> Mapping[str, Tensor]:
        with sdpa_kernel(CUDNN_FIRST, set_priority=True):
            return call()

    before_ours = {n: c for n, c in scene.sides.items() if not n.startswith(OURS)}
    scene.sides = {**before_ours, CUDNN: cudnn_first, **scene.sides}
    return scene


# --- weights and arguments -------------------------------------------------------------------


def _latents(size: Size) -> tuple[int, int, int, int]:
    """(frames, channels, height, width) of a clip's latents."""
    vae = size.vae
    frames = (size.frames - 1) // vae.temporal_compression_ratio + 1
    ratio = vae.spatial_compression_ratio
    return frames, vae.latent_channels, size.height // ratio, size.width // ratio


def _padded(size: Size) -> tuple[int, int, int, int]:
    """The same as the transformer takes them: whole patches of frames, an image beside them."""
    frames, _, height, width = _latents(size)
    patch = size.transformer.patch_size_t or 1
    return -(-frames // patch) * patch, size.transformer.in_channels, height, width


def _rotary(theirs: Any, size: Size, frames: int, device: torch.device) -> Any:
    """diffusers' tables of a clip, or None for a model without."""
    if not theirs.config.use_rotary_positional_embeddings:
        return None
    maker = CogVideoXPipeline.__new__(CogVideoXPipeline)
    maker.transformer = theirs
    maker.vae_scale_factor_spatial = size.vae.spatial_compression_ratio
    return maker._prepare_rotary_positional_embeddings(size.height, size.width, frames, device)


def _vaes(size: Size, dtype: torch.dtype, device: torch.device) -> tuple[Any, CausalVAE]:
    theirs = _randomly(
        lambda: AutoencoderKLCogVideoX.from_config(vae_values(size.vae)), dtype, device
    )
    return theirs, _with_weights_of(theirs, lambda: CausalVAE(size.vae))


def _transformers(
    config: TransformerConfig, dtype: torch.dtype, device: torch.device
) -> tuple[Any, ExpertTransformer]:
    theirs = _randomly(
        lambda: CogVideoXTransformer3DModel.from_config(transformer_values(config)), dtype, device
    )
    return theirs, _with_weights_of(theirs, lambda: ExpertTransformer(config))


def _randomly(make: Callable[[], nn.Module], dtype: torch.dtype, device: torch.device) -> Any:
    torch.manual_seed(0)
    diffusers.utils.logging.set_verbosity_error()
    with torch.device(device):
        return make().to(dtype).requires_grad_(False).eval()


def _with_weights_of(theirs: nn.Module, make: Callable[[], Any]) -> Any:
    with torch.device("meta"):
        ours = make()
    ours.load_state_dict(theirs.state_dict(), assign=True)
    if isinstance(ours, CausalVAE):
        ours.lay_channels_last()
    return ours.requires_grad_(False).eval()


def _noise(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(shape, generator=generator).to(device, dtype)
