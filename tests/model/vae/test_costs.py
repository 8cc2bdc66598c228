"""Costs of the VAE beside diffusers': launches, bytes moved, bytes alive, layouts, caches."""

import pytest
import torch
from diffusers import AutoencoderKLCogVideoX
from torch.utils._python_dispatch import TorchDispatchMode

from cogvx import frames
from cogvx.checkpoint.folder import vae_values
from cogvx.config import PRESETS, VAEConfig
from cogvx.memory import LiveBytes
from cogvx.vae import CausalVAE, DecodeState, FrameCache
from cogvx.vae.blocks import ResnetBlock3D
from cogvx.vae.norm import Flow
from cogvx_kernels import _backend, module_backend

if not (_backend.HAS_TRITON and _backend.INTERPRETED):
    pytest.skip("launches are seen in Triton's interpreter", allow_module_level=True)

from ..costs import Launches, Moved, launches, name_of, programs_left_out  # noqa: E402

pytestmark = pytest.mark.budget

MIB = 1 << 20
SMALL = VAEConfig(
    block_out_channels=(16, 32, 32, 64), latent_channels=4, layers_per_block=3, norm_num_groups=4
)
RELEASED = PRESETS["5b"].vae


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def theirs(config):
    return AutoencoderKLCogVideoX.from_config(vae_values(config)).eval()


# --- launches --------------------------------------------------------------------------------


class Ops(TorchDispatchMode):
    """Ops of torch that compute: as many launches, at least, on a GPU."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += launches(func)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("latents", "chunk"), ((3, "first"), (2, "later")))
def test_launches_of_a_chunk(latents, chunk):
    """The decoder of the released depth; the first chunk of a clip, and one with a cache."""
    config = SMALL
    with module_backend("kernel"):
        vae = CausalVAE(config)
    z = torch.randn(1, latents, 4, 2, 2)
    cache = FrameCache()
    if chunk == "later":
        with programs_left_out():
            vae.decoder(torch.randn(1, 3, 4, 2, 2), cache)
    with programs_left_out(), Launches() as ours:
        vae.decoder(z, cache)
    decoder = theirs(config).decoder
    kept = decoder(torch.randn(1, 4, 3, 2, 2))[1] if chunk == "later" else None
    with Ops() as ops:
        decoder(z.transpose(1, 2), conv_cache=kept)
    assert ops.count > 400
    assert ours.counts.total() <= 0.4 * ops.count, (ours.counts.total(), ops.count, ours.counts)


# --- bytes moved -----------------------------------------------------------------------------


class Passes(Moved):
    """Bytes through memory of all but convolutions. A norm that makes its own statistics reads its
    input once more than its arguments show."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = name_of(func)
        if "convolution" in name:
            return func(*args, **(kwargs or {}))
        if name.startswith("spatial_norm_silu"):
            named = {a.name: x for a, x in zip(func._schema.arguments, args, strict=True)}
            self.bytes["statistics"] += named["x"].nbytes * (named["moments"] is None)
        return super().__torch_dispatch__(func, types, args, kwargs)


def test_bytes_moved_by_a_resnet_block():
    """A block of the last level, eight frames of 480x720 in bf16, with a block before and one
    behind it: 9.5 V, where V is one such tensor.

    Two norms' applications (read, write): 4 V; the second's statistics: 1 V; the sum with the
    statistics of the next norm: 3 V; and for each convolution two frames out of the cache, to the
    head of its input, and two into the cache: 1.5 V. The 7 V of docs/model.md, section 7.2, have
    the sum in the convolution (1 V), statistics in both norms, and count no frame of a cache.
    """
    with torch.device("meta"):
        decoder = CausalVAE(RELEASED).bfloat16().decoder
        block = decoder.up_blocks[3].resnets[1]
        norms = [block.norm1, block.norm2]
        x = torch.empty(1, 128, 8, 480, 720, dtype=torch.bfloat16)
        x = x.contiguous(memory_format=torch.channels_last_3d)
        moments = torch.empty(1, 1, 32, 2)
        zq = torch.empty(1, 16, 2, 60, 90, dtype=torch.bfloat16)
        modulations = block.norm1.modulated(norms, zq)
        cache = FrameCache()
        block(Flow(x, moments), modulations, cache)
        with Passes() as seen:
            block(Flow(x, moments), modulations, cache)
    assert isinstance(block, ResnetBlock3D) and block.feeds_norm
    volume = sum(seen.bytes.values()) / x.nbytes
    assert volume == pytest.approx(9.5, rel=0.02), seen.bytes


# --- layouts ---------------------------------------------------------------------------------


class Layouts(TorchDispatchMode):
    """Convolutions whose tensors have not their channels last, and copies that turn tensors of
    `large` elements round."""

    def __init__(self, large):
        super().__init__()
        self.large, self.wrong, self.convolutions = large, [], 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = name_of(func)
        if "convolution" in name:
            self.convolutions += 1
            for x in (args[0], args[1], out):
                if not channels_last(x):
                    self.wrong.append((name, tuple(x.shape), x.stride()))
        elif name in ("copy_", "clone", "_to_copy") and out.dim() == 5:
            source = args[1] if name == "copy_" else args[0]
            if out.numel() >= self.large and order(source, out) != order(out, source):
                self.wrong.append((name, source.stride(), out.stride()))
        return out


def channels_last(x):
    form = torch.channels_last_3d if x.dim() == 5 else torch.channels_last
    return x.is_contiguous(memory_format=form)


def order(x, other):
    """Dimensions from the slowest to the fastest, as far as both tensors step along them."""
    steps = (d for d in range(5) if x.shape[d] > 1 and x.stride(d) and other.stride(d))
    return sorted(steps, key=lambda d: -x.stride(d))


@pytest.mark.parametrize("half", ("encoder", "decoder"))
@pytest.mark.parametrize("backend", ("kernel", "auto"))
def test_layout_is_never_converted(half, backend):
    """But for a video's three channels as it comes in."""
    with module_backend(backend):
        vae = CausalVAE(SMALL)
    first, later = (3, 2) if half == "decoder" else (9, 8)
    sides = (4, 2, 2) if half == "decoder" else (3, 16, 16)
    cache = FrameCache()
    for count in (first, later):
        with programs_left_out(), Layouts(large=9 * 16 * 16 * 4) as seen:
            getattr(vae, half)(torch.randn(1, count, *sides), cache)
        assert seen.convolutions > 20
        assert not seen.wrong, seen.wrong


# --- bytes alive, and caches -----------------------------------------------------------------


def peaks(config, latents, height, width, dtype, device, chunks=None):
    """(ours, diffusers') most bytes alive in a decode."""
    shape = (1, latents, config.latent_channels, height // 8, width // 8)
    with torch.device(device):
        ours = CausalVAE(config).to(dtype)
        other = theirs(config).to(dtype)
        z = torch.zeros(shape, dtype=dtype)
        flat = z.transpose(1, 2).contiguous()
        found = []
        for run in (lambda: ours.decode(z), lambda: other.decode(flat).sample):
            with LiveBytes() as live:
                run()
            found.append(live.peak)
    return found


def test_peak_memory_of_decode_on_cpu():
    ours, other = peaks(SMALL, 5, 32, 48, torch.float32, "cpu")
    assert ours <= 0.55 * other, ours / other


def test_peak_memory_of_decode_at_released_size():
    """49 frames of 480x720 in bf16, from the shapes of both decoders."""
    ours, other = peaks(RELEASED, 13, 480, 720, torch.bfloat16, "meta")
    assert ours <= 0.45 * other, ours / other


@pytest.mark.parametrize(("height", "width", "most"), ((480, 720, 2679), (768, 1360, 8097)))
def test_cache_size(height, width, most):
    """bf16: as the formula has it, and no more than the least that there can be."""
    with torch.device("meta"):
        vae = CausalVAE(RELEASED).bfloat16()
    state = DecodeState()
    z = torch.empty(1, 3, 16, height // 8, width // 8, dtype=torch.bfloat16, device="meta")
    next(vae.stream_decode(z, state, last=False))
    convs = {
        name.removesuffix(".conv"): conv.in_channels
        for name, conv in vae.decoder.named_modules()
        if isinstance(conv, torch.nn.Conv3d) and conv.kernel_size[0] == 3
    }
    sizes = {}
    for name, frame in state.cache.frames.items():
        level = int(name.split(".")[1]) if name.startswith("up_blocks") else 0
        last = 3 if name == "conv_out" else level
        sides = height * width // 64 * 4**last
        sizes[name] = 2 * 2 * convs[name] * sides
        assert frame.nbytes == sizes[name]
    assert sizes.keys() == convs.keys()
    assert state.nbytes == sum(sizes.values())
    assert round(state.nbytes / MIB) <= most


@pytest.mark.parametrize("batch", (1, 4, 12))
@pytest.mark.parametrize(("height", "width"), ((480, 720), (768, 1360), (1088, 1920), (1536, 2720)))
def test_any_size_decodes_and_encodes(batch, height, width):
    """Chunks that diffusers' convolution cuts into pieces shorter than its kernel."""
    with torch.device("meta"):
        vae = CausalVAE(RELEASED).bfloat16()
        z = torch.empty(batch, 2, 16, height // 8, width // 8, dtype=torch.bfloat16)
        count = frames.video_frames(2, RELEASED)
        assert vae.decode(z).shape == (batch, count, 3, height, width)
        video = torch.empty(batch, 1, 3, height, width, dtype=torch.bfloat16)
        assert vae.encode(video).mean.shape == (batch, 1, *z.shape[2:])
