"""Benchmarks of parts of CogVideoX beside diffusers' on the same weights and arguments.

Beside diffusers as it is, compiled, compiled with cuDNN's attention first, patched, and, of the
VAE, with channels last; ours, of the VAE, also on its ops' references. `python -m benchmarks.model`
runs all of them. Rows have peak bytes of live tensors and the bytes that a forward saves for its
backward, which are the same on any machine.
"""

import copy
import dataclasses
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from cogvx.checkpoint.folder import transformer_values, vae_values
from cogvx.config import PRESETS, TransformerConfig, VAEConfig
from cogvx.transformer import ExpertTransformer
from cogvx.vae import CausalVAE
from cogvx.vae.options import channels_last
from cogvx_kernels import module_backend, patch
from cogvx_kernels._backend import INTERPRETED

from .ops import without_grad
from .registry import MODEL, Benchmark, Case, Check, Entry, Options, register
from .timing import Call

THEIRS, OURS = "diffusers", "cogvx"
COMPILED, CUDNN, AHEAD = "diffusers-compile", "diffusers-compile-cudnn", "cogvx-ahead"
NEAR, COMPILED_NEAR = "diffusers-channels-last", "diffusers-compile-channels-last"
PATCHED, PATCHED_FAST = "diffusers-patched", "diffusers-patched-fast"
ENTRIES = (NEAR, COMPILED, COMPILED_NEAR, CUDNN, PATCHED, PATCHED_FAST, OURS, AHEAD)
ENTRIES += (REFERENCE := "cogvx-reference",)
BACKENDS = ("CUDNN_ATTENTION", "FLASH_ATTENTION", "EFFICIENT_ATTENTION", "MATH")
CUDNN_FIRST = [getattr(SDPBackend, name) for name in BACKENDS]
# What the outputs may differ by, relative to the largest: in fp32 what contract and tests demand;
# in bf16 each is a sum of thousands of roundings of 2^-8, and the tests hold both to fp64.
AGREEMENT = {torch.float32: 1e-5, torch.bfloat16: 5e-2, torch.float16: 5e-2}
# Of the largest of all: a gradient that is smaller is the rounding of greater ones, and its
# difference is measured against this. A bias that attention is blind to has such a gradient.
SMALL = 1e-3

Results = Mapping[str, Tensor]  # of a training step the gradients
Compute = Callable[[], Results]
Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Size:
    """A clip, in frames of video and pixels, and the configs of the models that take it."""

    frames: int
    height: int
    width: int
    vae: VAEConfig
    transformer: TransformerConfig

    @property
    def latents(self) -> tuple[int, int, int, int]:
        """(frames, channels, height, width) of a clip's latents."""
        frames = (self.frames - 1) // self.vae.temporal_compression_ratio + 1
        ratio = self.vae.spatial_compression_ratio
        return frames, self.vae.latent_channels, self.height // ratio, self.width // ratio

    @property
    def padded(self) -> tuple[int, int, int, int]:
        """The same as the transformer takes them: whole patches of frames, an image beside them."""
        frames, _, height, width = self.latents
        patch = self.transformer.patch_size_t or 1
        return -(-frames // patch) * patch, self.transformer.in_channels, height, width


# A tenth of the released widths and a clip with every kind of chunk: what a CPU does in a second.
_HEADS = TransformerConfig(
    num_attention_heads=4, num_layers=2, text_embed_dim=128, use_rotary_positional_embeddings=True
)
_HEAD = dataclasses.replace(_HEADS, num_attention_heads=1, max_text_seq_length=16)
_VAE = VAEConfig(block_out_channels=(32, 64, 64, 128), norm_num_groups=8)
_TINY_VAE = VAEConfig(block_out_channels=(8, 16, 16, 16), norm_num_groups=4)
SIZES = {
    "small": Size(17, 64, 96, _VAE, _HEADS),
    "tiny": Size(9, 32, 48, _TINY_VAE, _HEAD),  # for tests of this program itself
} | {
    f"{name}-{p.height}x{p.width}-{p.frames}f": Size(
        p.frames, p.height, p.width, p.vae, p.transformer
    )
    for name, p in PRESETS.items()
}


# --- cases -----------------------------------------------------------------------------------


def make_case(
    part: str,
    entries: Mapping[str, Compute],
    options: Options,
    which: str = "forward",
    convention: str = MODEL,
    left_out: Mapping[str, str] | None = None,
    reference: Compute | None = None,
    forward: Mapping[str, Call] | None = None,
    weights: tuple[Tensor, ...] = (),
) -> Case:
    """A case, diffusers' entry first.

    reference  what all are compared with, if that is not diffusers
    forward    of a training step: name -> its forward
    weights    parameters, which are not counted as saved
    """
    forward = forward or {}

    def wrapped(compute: Compute) -> Compute:
        return compute if forward else without_grad(compute)

    def expected() -> dict[str, Tensor]:
        """Computed for the first entry, and held until the last."""
        if not kept:
            found = wrapped(reference or entries[THEIRS])()
            kept.update({name: x.detach().clone() for name, x in found.items()})
        return kept

    kept: dict[str, Tensor] = {}

    def entry(name: str) -> Entry:
        compute = wrapped(entries[name])

        def check(which: str) -> list[Check]:
            wanted, found = expected(), compute()
            largest = SMALL * max(float(x.abs().max()) for x in wanted.values())
            checks = []
            for key, x in wanted.items():
                error = float((found[key].detach().double() - x.double()).abs().max())
                error /= max(float(x.abs().max()), largest)
                # diffusers may itself be off by more from a reference in fp32
                ok = error <= AGREEMENT[options.dtype] or name == THEIRS
                checks.append(Check(ok, error, f"{key} differs by {error:.2g}"))
            return checks

        ours = name.startswith((OURS, PATCHED))
        interpreted = "kernels are interpreted, and never timed" if ours and INTERPRETED else ""
        return Entry(
            name, check, lambda which, count: [compute], (which,), ours=name == OURS,
            untimed=interpreted, forward=forward.get(name),
        )  # fmt: skip

    names = [n for n in entries if n == THEIRS or n in (options.providers or entries)]
    of = "diffusers in fp32" if reference else "diffusers"
    return Case(
        part, convention, [entry(name) for name in names], (which,), f"every element with {of}",
        left_out=dict(left_out or {}), memory=True, weights=weights,
    )  # fmt: skip


def _vae(half: str, size: Size, options: Options) -> Iterator[Case]:
    """Either half of the VAE, on (batch, frames, channels, height, width)."""
    encode = half == "encoder"
    shape = (size.frames, 3, size.height, size.width) if encode else size.latents
    x, name = _noise((1, *shape), options), "mean" if encode else "video"

    def theirs(vae: Any, x: Tensor) -> Results:
        out = vae.encode(x).latent_dist.mean if encode else vae.decode(x).sample
        return {name: out.transpose(1, 2)}

    def ours(vae: CausalVAE) -> Results:
        return {name: vae.encode(x).mean if encode else vae.decode(x)}

    their_vae = _randomly("AutoencoderKLCogVideoX", vae_values(size.vae), options)
    our_vae = _with_weights_of(their_vae, lambda: CausalVAE(size.vae))
    flat = x.transpose(1, 2).contiguous()  # as diffusers has it
    near = channels_last(copy.deepcopy(their_vae))
    near_flat = flat.contiguous(memory_format=torch.channels_last_3d)
    entries = {THEIRS: partial(theirs, their_vae, flat), NEAR: partial(theirs, near, near_flat)}
    left_out = {}
    if x.is_cuda:
        entries[COMPILED] = partial(theirs, half_compiled(their_vae, half), flat)
        entries[COMPILED_NEAR] = partial(theirs, half_compiled(near, half), near_flat)
    else:
        left_out[COMPILED] = "every kind of chunk takes a CPU minutes to compile"
    with module_backend("reference"):
        reference = _with_weights_of(their_vae, lambda: CausalVAE(size.vae))
    entries |= {
        PATCHED: partial(theirs, patched(their_vae), flat),
        PATCHED_FAST: partial(theirs, patched(their_vae, "fast"), flat),
        OURS: partial(ours, our_vae),
        REFERENCE: partial(ours, reference),
    }
    yield make_case(f"vae-{half[:-1]}", entries, options, left_out=left_out)


def _transformer(size: Size, options: Options) -> Iterator[Case]:
    """One denoising step under guidance: a batch of two."""
    config, device = size.transformer, options.device
    theirs, ours = _transformers(config, options)
    latents = _noise((2, *size.padded), options)
    text = _noise((2, config.max_text_seq_length, config.text_embed_dim), options)
    timestep = torch.tensor([999, 999], device=device)
    ofs = None if config.ofs_embed_dim is None else torch.full((1,), 2.0, device=device)
    rotary = _rotary(theirs, size, latents.shape[1], device)

    def step(model: Callable[..., Any]) -> Results:
        out = model(latents, text, timestep, ofs=ofs, image_rotary_emb=rotary, return_dict=False)
        return {"v": out[0]}

    with torch.no_grad():  # as the pipelines do, once before a run
        ahead = {
            "text": ours.project_text(text),
            "modulations": ours.modulations(timestep[:1], ofs),
        }
    entries = {
        THEIRS: partial(step, theirs),
        COMPILED: partial(step, compiled(theirs)),
        PATCHED: partial(step, patched(theirs)),
        OURS: lambda: {"v": ours(latents, text, timestep, ofs)},
        AHEAD: lambda: {"v": ours(latents, **ahead)},
    }
    entries, left_out = _with_cudnn(entries, partial(step, compiled(theirs)), device)
    convention = f"{config.num_layers} blocks"
    yield make_case("transformer", entries, options, convention=convention, left_out=left_out)


def _block(size: Size, options: Options) -> Iterator[Case]:
    """One block, from stream to stream: its forward, and then a training step of it."""
    config = dataclasses.replace(size.transformer, num_layers=1)
    their_model, our_model = _transformers(config, options)
    theirs, ours = their_model.transformer_blocks[0], our_model.transformer_blocks[0]
    with_kernels = patched(their_model).transformer_blocks[0]
    frames, _, height, width = size.padded
    patch = config.patch_size_t or 1, config.patch_size, config.patch_size
    video_len = frames // patch[0] * (height // patch[1]) * (width // patch[2])
    text_len, dim = config.max_text_seq_length, config.hidden_size
    x = _noise((2, text_len + video_len, dim), options)
    apart = tuple(part.contiguous() for part in x.split((text_len, video_len), 1))
    temb = _noise((2, config.time_embed_dim), options)
    rotary = _rotary(their_model, size, frames, options.device)
    tables = our_model.tables.rope(frames, height, width, options.device).unbind(0)
    del their_model, our_model

    def call_theirs(
        block: Callable[..., Any], text: Tensor, video: Tensor, temb: Tensor = temb
    ) -> Pair:
        return block(video, text, temb, image_rotary_emb=rotary)[::-1]

    def call_ours(x: Tensor) -> Pair:
        out, _ = ours.whole(x, F.silu(temb), *tables, text_len)
        return out[:, :text_len], out[:, text_len:]

    blocks = {
        THEIRS: _Block(partial(call_theirs, theirs), apart, theirs, text_len),
        COMPILED: _Block(partial(call_theirs, compiled(theirs)), apart, theirs, text_len),
        PATCHED: _Block(partial(call_theirs, with_kernels), apart, with_kernels, text_len),
        OURS: _Block(call_ours, (x,), ours, text_len),
    }
    cudnn = _Block(partial(call_theirs, compiled(theirs)), apart, theirs, text_len)
    forward = {name: block.outputs for name, block in blocks.items()}
    entries, left_out = _with_cudnn(forward, cudnn.outputs, options.device)
    yield make_case("block", entries, options, left_out=left_out)
    for trained in (theirs, ours, x, *apart):
        trained.requires_grad_(True)
    douts = tuple(_noise(tuple(part.shape), options) for part in apart)

    def in_fp32() -> Results:
        """Gradients in fp32: each entry of 16-bit sums of 16-bit numbers has its own error."""
        block = copy.deepcopy(theirs).float()
        inputs = tuple(part.detach().float().requires_grad_(True) for part in apart)
        call = partial(call_theirs, block, temb=temb.float())
        return _Block(call, inputs, block, text_len).gradients(tuple(x.float() for x in douts))

    yield make_case(
        "block",
        {name: partial(block.gradients, douts) for name, block in blocks.items()},
        options,
        "forward and backward",
        reference=in_fp32,
        forward=forward,
        weights=(*theirs.parameters(), *ours.parameters()),
    )


@dataclass(frozen=True)
class _Block:
    """One implementation of a block.

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
        """Gradients of the two streams and of every parameter."""
        names, parameters = zip(*self.block.named_parameters(), strict=True)
        of = torch.autograd.grad(self.call(*self.inputs), (*self.inputs, *parameters), douts)
        streams, weights = of[: len(self.inputs)], of[len(self.inputs) :]
        if len(streams) == 1:
            streams = streams[0][:, : self.text_len], streams[0][:, self.text_len :]
        return dict(zip(("text", "video", *names), (*streams, *weights), strict=True))


# --- variants of diffusers' modules ----------------------------------------------------------


def half_compiled(vae: Any, half: str) -> Any:
    """diffusers' VAE with its encoder or decoder compiled, chunk by chunk, on the same weights."""
    other = copy.copy(vae)
    other._modules = {**vae._modules, half: compiled(getattr(vae, half))}
    return other


def compiled(module: nn.Module) -> Callable[..., Any]:
    """torch.compile of a module, in default mode, that shares nothing with another one's.

    Compiled code is kept by code and backend: with torch's own backend a second one, of the same
    code under another order of attention, would be handed the first.
    """

    def inductor(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        from torch._inductor.compile_fx import compile_fx

        return compile_fx(graph, inputs)

    return torch.compile(module, backend=inductor, fullgraph=True, dynamic=False)


def patched(model: Any, mode: str = "exact") -> Any:
    """diffusers' model with the kernels in it, on the same weights."""
    own = {id(x): x for x in (*model.parameters(), *model.buffers())}
    other = copy.deepcopy(model, own)
    patch(other, mode=mode)
    return other


def _with_cudnn(
    entries: dict[str, Compute], call: Compute, device: torch.device
) -> tuple[dict[str, Compute], dict[str, str]]:
    """The compiled entry once more with cuDNN's attention before the others; or why not."""
    if device.type != "cuda" or not torch.backends.cudnn.is_available():
        return entries, {CUDNN: "there is no cuDNN attention here"}

    def cudnn_first() -> Results:
        with sdpa_kernel(CUDNN_FIRST, set_priority=True):
            return call()

    before_ours = {n: c for n, c in entries.items() if not n.startswith(OURS)}
    return {**before_ours, CUDNN: cudnn_first, **entries}, {}


# --- weights and arguments -------------------------------------------------------------------


def _rotary(theirs: Any, size: Size, frames: int, device: torch.device) -> Any:
    """diffusers' tables of a clip, or None for a model without."""
    from diffusers import CogVideoXPipeline

    if not theirs.config.use_rotary_positional_embeddings:
        return None
    maker = CogVideoXPipeline.__new__(CogVideoXPipeline)
    maker.transformer = theirs
    maker.vae_scale_factor_spatial = size.vae.spatial_compression_ratio
    return maker._prepare_rotary_positional_embeddings(size.height, size.width, frames, device)


def _transformers(config: TransformerConfig, options: Options) -> tuple[Any, ExpertTransformer]:
    theirs = _randomly("CogVideoXTransformer3DModel", transformer_values(config), options)
    return theirs, _with_weights_of(theirs, lambda: ExpertTransformer(config))


def _randomly(name: str, config: Mapping[str, Any], options: Options) -> Any:
    """diffusers' model of a config with random weights."""
    import diffusers

    torch.manual_seed(0)
    diffusers.utils.logging.set_verbosity_error()
    with torch.device(options.device):
        model = getattr(diffusers, name).from_config(config)
    return model.to(options.dtype).requires_grad_(False).eval()


def _with_weights_of(theirs: nn.Module, make: Callable[[], Any]) -> Any:
    with torch.device("meta"):
        ours = make()
    ours.load_state_dict(theirs.state_dict(), assign=True)
    if isinstance(ours, CausalVAE):
        channels_last(ours)
    return ours.requires_grad_(False).eval()


def _noise(shape: tuple[int, ...], options: Options) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(shape, generator=generator).to(options.device, options.dtype)


# --- registered ------------------------------------------------------------------------------


def _cases(make: Callable[[Size, Options], Iterator[Case]], options: Options) -> Iterator[Case]:
    if INTERPRETED:
        from cogvx_kernels.tools import interpreter

        interpreter.install()
    size = SIZES[options.size]
    if options.frames:
        size = dataclasses.replace(size, frames=options.frames)
    if options.layers:
        config = dataclasses.replace(size.transformer, num_layers=options.layers)
        size = dataclasses.replace(size, transformer=config)
    return make(size, options)


PARTS = {
    "vae-decode": partial(_vae, "decoder"),
    "vae-encode": partial(_vae, "encoder"),
    "transformer": _transformer,
    "block": _block,
}
for _name, _make in PARTS.items():
    register(
        Benchmark(
            _name, partial(_cases, _make), lambda: (THEIRS, *ENTRIES), lambda: [MODEL],
            tuple(SIZES), budget=12.0, repeats={"cuda": 6, "cpu": 6}, group="model",
        )
    )  # fmt: skip

if __name__ == "__main__":
    from .__main__ import main

    sys.exit(main(group="model"))
