"""A patched VAE's peak of live bytes, and diffusers' VAE as a stream."""

import gc

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from diffusers import AutoencoderKL, AutoencoderKLCogVideoX

import cogvx_kernels as ck
from cogvx.config import VAEConfig
from cogvx.memory import LiveBytes
from cogvx.vae import CausalVAE
from tests.harness.selection import rest
from tests.patching.small import latents, vae

SMALL = VAEConfig(
    block_out_channels=(8, 8, 8, 8), latent_channels=4, layers_per_block=1, norm_num_groups=2
)


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def peak(run):
    gc.collect()
    with LiveBytes() as live:
        run()
    return live.peak


def stream(model, z, **options):
    """The clip z (batch, channels, frames, ...) as the stream's chunks, joined."""
    chunks = ck.stream_decode(model, z.transpose(1, 2), **options)
    return torch.cat(list(chunks), 1).transpose(1, 2)


# --- bytes -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("frames", "height", "width"), [(13, 60, 90), rest(21, 96, 170)])
def test_peak_memory_of_decode_at_released_size(frames, height, width):
    """49x480x720 and 81x768x1360 in bf16, counted from shapes."""
    with torch.device("meta"):
        model = AutoencoderKLCogVideoX().bfloat16().eval()
        z = torch.empty(1, 16, frames, height, width, dtype=torch.bfloat16)
    before = peak(lambda: model.decode(z))
    with ck.patched(model):
        assert peak(lambda: model.decode(z)) <= 0.6 * before
    with ck.patched(model, ["cache"]):
        assert peak(lambda: model.decode(z)) <= 0.75 * before


def test_peak_memory_of_decode_on_cpu():
    torch.manual_seed(0)
    model = AutoencoderKLCogVideoX(
        block_out_channels=(16, 32, 32, 64), norm_num_groups=4, latent_channels=4
    ).eval()
    z = torch.randn(1, 4, 5, 6, 8)
    before = peak(lambda: model.decode(z))
    with ck.patched(model):
        assert peak(lambda: model.decode(z)) <= 0.6 * before


def test_stream_memory_does_not_grow_with_the_clip():
    model = vae()
    ck.patch(model)

    def needed(frames):
        z = latents(frames).transpose(1, 2)
        return peak(lambda: sum(len(chunk) for chunk in ck.stream_decode(model, z)))

    assert needed(21) == needed(7)


def test_state_size():
    with torch.device("meta"):
        model = AutoencoderKLCogVideoX().bfloat16().eval()
        z = torch.empty(1, 3, 16, 60, 90, dtype=torch.bfloat16)
    ck.patch(model)
    state = ck.DecodeState()
    list(ck.stream_decode(model, z, state, last=False))
    assert 2600 * 2**20 < state.nbytes <= 2680 * 2**20
    ck.unpatch(model)
    stock = ck.DecodeState()
    list(ck.stream_decode(model, z, stock, last=False))
    assert stock.nbytes > 1.7 * state.nbytes


# --- streams ---------------------------------------------------------------------------------


@pytest.mark.parametrize("patched", [False, True])
@pytest.mark.parametrize("frames", [1, 2, 3, 4, 7])
def test_stream_equals_decode_bitwise(frames, patched):
    model, z = vae(), latents(frames, batch=2)
    if patched:
        ck.patch(model)
    wanted = model.decode(z).sample
    assert torch.equal(stream(model, z), wanted)
    state, chunks = ck.DecodeState(), []
    for piece in z.transpose(1, 2).split(1, 1):
        chunks += ck.stream_decode(model, piece, state, total=frames, last=False)
    assert torch.equal(torch.cat(chunks, 1).transpose(1, 2), wanted)
    assert state.ended and state.nbytes == 0


def test_interleaved_cloned_and_moved_states_are_independent():
    model = vae()
    ck.patch(model)
    one, two = latents(7), -latents(7)
    wanted = [model.decode(z).sample for z in (one, two)]
    states = [ck.DecodeState(), ck.DecodeState()]
    found = [[], []]
    for part in (slice(0, 3), slice(3, 5), slice(5, 7)):
        for z, state, chunks in zip((one, two), states, found, strict=True):
            piece = z.transpose(1, 2)[:, part]
            chunks += ck.stream_decode(model, piece, state, total=7, last=False)
        states = [state.clone() if part.start == 0 else state.to("cpu") for state in states]
    for chunks, clip in zip(found, wanted, strict=True):
        assert torch.equal(torch.cat(chunks, 1).transpose(1, 2), clip)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("at", range(0, 25, 6))
def test_an_exception_breaks_the_state_until_reset(at, error):
    model, z = vae(), latents(5)
    ck.patch(model)
    wanted = model.decode(z).sample
    convs = [m for m in model.decoder.modules() if type(m).__name__ == "CogVideoXSafeConv3d"]

    def fail(*of):
        raise error("planned")

    state = ck.DecodeState()
    chunks = ck.stream_decode(model, z.transpose(1, 2), state)
    next(chunks)
    handle = convs[at].register_forward_pre_hook(fail)
    with pytest.raises(error, match="planned"):
        next(chunks)
    handle.remove()
    with pytest.raises(RuntimeError, match=r"left in the middle of a chunk.*reset\(\)"):
        list(ck.stream_decode(model, z.transpose(1, 2)[:, 3:], state))
    state.reset()
    assert torch.equal(stream(model, z, state=state), wanted)


def test_offload_hooks_are_called():
    model, z = vae(), latents(5)
    wanted = model.decode(z).sample
    calls = []

    class Fetch(AlignDevicesHook):
        def pre_forward(self, module, *args, **kwargs):
            calls.append(1)
            return super().pre_forward(module, *args, **kwargs)

    add_hook_to_module(model, Fetch("cpu"))
    assert torch.equal(stream(model, z), wanted) and len(calls) == 2


def test_invalid_stream_arguments_are_refused():
    model, z = vae(), latents(5).transpose(1, 2)
    other = AutoencoderKL(block_out_channels=(8,), norm_num_groups=2)
    cases = [
        ((other, z), {}, ck.UnsupportedModelError, "vae must be a AutoencoderKLCogVideoX"),
        ((model, z.transpose(1, 2)), {}, ValueError, "latents must be .* with 4 channels"),
        ((model, z.double()), {}, TypeError, "latents must be torch.float32 as the weights"),
        ((model, z), {"state": 3}, TypeError, "state must be a DecodeState"),
        ((model, z), {"total": 3}, ValueError, "must end after total = 3 frames; got 5"),
        ((model, 5), {}, TypeError, "latents must be a tensor or an iterable"),
    ]
    for arguments, options, error, message in cases:
        with pytest.raises(error, match=f"stream_decode: .*{message}"):
            ck.stream_decode(*arguments, **options)
    state = ck.DecodeState()
    next(CausalVAE(SMALL).stream_decode(torch.randn(1, 3, 4, 2, 2), state, last=False))
    with pytest.raises(ValueError, match="clip of this AutoencoderKL.*; got .* Decoder"):
        ck.stream_decode(model, z, state)
    with pytest.raises(ValueError, match="must come in the chunks that the VAE is defined by"):
        ck.stream_decode(model, z, last=False)
    model.enable_tiling(16, 16)
    with pytest.raises(ValueError, match=r"must not tile.*disable_tiling\(\)"):
        ck.stream_decode(model, z)
