"""Streams equal whole clips bit for bit, in constant memory; states are values."""

import contextlib
import copy
import itertools
import threading

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from cogvx import frames
from cogvx.config import VAEConfig
from cogvx.memory import LiveBytes
from cogvx.vae import (
    CausalVAE,
    Decoder,
    DecodeState,
    DiagonalGaussian,
    Encoder,
    EncodeState,
    FrameCache,
)

TINY = dict(
    block_out_channels=(8, 8, 8, 8), latent_channels=4, layers_per_block=1, norm_num_groups=2
)
RELEASED = VAEConfig(**TINY)
FACTORIZED = VAEConfig(
    **TINY, factorized=True, num_sample_frames_batch_size=4, num_latent_frames_batch_size=1
)
PAIRED = VAEConfig(
    **TINY, factorized=True, num_sample_frames_batch_size=8, num_latent_frames_batch_size=2
)
CONFIGS = {"released": RELEASED, "factorized": FACTORIZED, "factorized, by two": PAIRED}


def make(config):
    torch.manual_seed(0)
    vae = CausalVAE(config)
    for parameter in vae.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape)
    return vae


# Two levels: every kind of layer, and few enough convolutions to fail in each.
SMALL = VAEConfig(
    **{**TINY, "block_out_channels": (8, 16)},
    temporal_compression_ratio=2,
    num_sample_frames_batch_size=4,
)
VAES = {name: make(config) for name, config in CONFIGS.items()}
released, factorized, paired = VAES.values()


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def joined(chunks):
    """The clip of a stream's chunks, of either kind."""
    chunks = [c.moments if isinstance(c, DiagonalGaussian) else c for c in chunks]
    return torch.cat(chunks, dim=1)


def both(vae, latents):
    """(whole, stream, input) of encoding and of decoding."""
    side = 2 * vae.config.spatial_compression_ratio
    z = torch.randn(1, latents, 4, 2, 2)
    video = torch.randn(1, frames.video_frames(latents, vae.config), 3, side, side)
    return (
        (vae.decode(z), vae.stream_decode, z),
        (vae.encode(video).moments, vae.stream_encode, video),
    )


def cuts(length, rng):
    """Random pieces of a clip, of 1 frame and more."""
    places = sorted({0, length, *torch.randint(1, length + 1, (4,), generator=rng).tolist()})
    return [end - start for start, end in itertools.pairwise(places)]


@pytest.mark.parametrize("name", VAES)
@pytest.mark.parametrize("latents", (1, 2, 3, 6, 7))
def test_stream_of_a_tensor_equals_whole_bitwise(name, latents):
    for whole, stream, x in both(VAES[name], latents):
        assert torch.equal(joined(stream(x)), whole)


@pytest.mark.parametrize("name", VAES)
def test_stream_of_any_pieces_equals_whole_bitwise(name):
    rng = torch.Generator().manual_seed(1)
    for whole, stream, x in both(VAES[name], 7):
        known = {"total": x.shape[1]} if name == "released" else {}
        for pieces in ([1] * x.shape[1], *(cuts(x.shape[1], rng) for _ in range(4))):
            assert torch.equal(joined(stream(iter(x.split(pieces, dim=1)), **known)), whole), pieces


@pytest.mark.parametrize("latents", (1, 2, 3, 6, 7))
def test_released_chunks_need_no_total(latents):
    z = torch.randn(1, latents, 4, 2, 2)
    pieces = z.split(frames.decode_plan(latents), dim=1)
    assert torch.equal(joined(released.stream_decode(iter(pieces))), released.decode(z))
    video = torch.randn(1, frames.video_frames(latents), 3, 16, 16)
    pieces = video.split(frames.encode_plan(video.shape[1]), dim=1)
    assert torch.equal(joined(released.stream_encode(iter(pieces))), released.encode(video).moments)


@pytest.mark.parametrize(
    "pieces", ((4,), (2, 1), (2, 3), (3, 1), (1, 2), (1, 1), (2, 2, 1), (3, 2, 4))
)
def test_latents_that_are_no_chunks_are_refused_without_total(pieces):
    state = DecodeState()
    z = [torch.randn(1, n, 4, 2, 2) for n in pieces]
    for n, piece in enumerate(z[:-1], 1):
        list(released.stream_decode(piece, state, total=None, last=False))
        assert (state.taken, state.chunks) == (sum(pieces[:n]), n)
    with pytest.raises(
        ValueError, match=r"stream_decode: latents must come in the chunks .*total="
    ):
        list(released.stream_decode(iter(z[-1:]), state))
    assert state.taken == sum(pieces[:-1])  # as it was


@pytest.mark.parametrize("pieces", ((2,), (7,), (10,), (8, 9), (9, 1), (1, 8), (8, 4)))
def test_frames_that_are_no_chunks_are_refused_without_total(pieces):
    video = (torch.randn(1, n, 3, 8, 8) for n in pieces)
    with pytest.raises(ValueError, match=r"stream_encode: video must come in the chunks .*total="):
        list(released.stream_encode(video))


def test_factorised_clip_that_ends_within_a_latent_is_refused():
    pieces = torch.randn(1, 7, 3, 8, 8).split(1, dim=1)
    with pytest.raises(ValueError, match=r"must have 1 \+ 4k frames, nearest 5 or 9; got 7"):
        list(factorized.stream_encode(iter(pieces)))


def test_frames_that_contradict_total_are_refused():
    z = torch.randn(1, 5, 4, 2, 2)
    with pytest.raises(ValueError, match="must end after total = 4 frames; got 5"):
        released.stream_decode(z, total=4)
    with pytest.raises(ValueError, match="must end after total = 4 frames; got 5"):
        list(released.stream_decode(iter(z.split(1, 1)), total=4))
    with pytest.raises(ValueError, match="must have total = 6 frames; the clip ended after 5"):
        list(released.stream_decode(iter(z.split(1, 1)), total=6))
    with pytest.raises(ValueError, match="total must have 1, 8k or 8k"):
        released.stream_encode(iter([]), total=10)


@pytest.mark.parametrize("name", VAES)
def test_interleaved_streams_are_independent(name):
    vae = VAES[name]
    a, b = torch.randn(1, 7, 4, 2, 2), torch.randn(1, 6, 4, 3, 2)
    streams = {"a": vae.stream_decode(a, DecodeState()), "b": vae.stream_decode(b, DecodeState())}
    out = {"a": [], "b": []}
    for turn in "abbaababbabaab":
        out[turn] += [chunk for chunk in [next(streams[turn], None)] if chunk is not None]
    assert torch.equal(joined(out["a"]), vae.decode(a))
    assert torch.equal(joined(out["b"]), vae.decode(b))


def test_threads_are_independent():
    clips = [torch.randn(1, 6, 4, 2, 2) for _ in range(2)]
    alone = [released.decode(z) for z in clips]
    out = [None, None]

    def work(i):
        with torch.no_grad():
            out[i] = joined(released.stream_decode(clips[i]))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for mine, expected in zip(out, alone, strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", VAES)
def test_an_abandoned_clip_does_not_affect_the_next(name):
    vae = VAES[name]
    a, b = torch.randn(1, 7, 4, 2, 2), torch.randn(1, 7, 4, 2, 2)
    expected = copy.deepcopy(vae).decode(b)
    next(vae.stream_decode(a))
    assert torch.equal(vae.decode(b), expected)
    assert torch.equal(joined(vae.stream_decode(b)), expected)


@pytest.mark.parametrize("name", VAES)
def test_a_state_continues_its_clip(name):
    for whole, stream, x in both(VAES[name], 7):
        state = EncodeState() if x.shape[2] == 3 else DecodeState()
        plan = frames.encode_plan if x.shape[2] == 3 else frames.decode_plan
        pieces = x.split(plan(x.shape[1], VAES[name].config), dim=1)
        chunks = [c for p in pieces[:-1] for c in stream(p, state, last=False)]
        assert state.nbytes > 0 and not state.ended
        chunks += stream(pieces[-1], state)
        assert torch.equal(joined(chunks), whole)
        assert state.ended and state.nbytes == 0
        with pytest.raises(RuntimeError, match="ended after .* reset"):
            stream(x, state)
        state.reset()
        assert torch.equal(joined(stream(x, state)), whole)


def test_a_cloned_state_is_independent():
    z = torch.randn(1, 6, 4, 2, 2)
    other = torch.cat([z[:, :4], torch.randn(1, 2, 4, 2, 2)], dim=1)
    state = DecodeState()
    begun = list(released.stream_decode(z[:, :2], state, last=False))
    begun += released.stream_decode(z[:, 2:4], state, last=False)
    clone = state.clone()
    assert clone.nbytes == state.nbytes
    held = {x.data_ptr() for x in state.cache.frames.values()}
    assert not held & {x.data_ptr() for x in clone.cache.frames.values()}
    moved = state.to("cpu")
    a = list(released.stream_decode(z[:, 4:], state))
    b = list(copy.deepcopy(released).stream_decode(other[:, 4:], clone))
    c = list(released.stream_decode(z[:, 4:], moved))
    assert torch.equal(joined(begun + a), released.decode(z))
    assert torch.equal(joined(begun + b), released.decode(other))
    assert torch.equal(joined(begun + c), released.decode(z))


def test_a_state_moves_to_another_device():
    state = DecodeState()
    list(released.stream_decode(torch.randn(1, 2, 4, 2, 2), state, last=False))
    there = state.to("meta")
    assert all(x.device.type == "meta" for x in there.cache.frames.values())
    vae = copy.deepcopy(released).to("meta")
    z = torch.empty(1, 2, 4, 2, 2, device="meta")
    assert joined(vae.stream_decode(z, there)).shape == (1, 8, 3, 16, 16)


def test_only_temporal_convolutions_have_a_cache():
    for coder, x in (
        (released.encoder, torch.randn(1, 8, 3, 16, 16)),
        (released.decoder, torch.randn(1, 2, 4, 2, 2)),
    ):
        cache = FrameCache()
        coder(x, cache)
        kernels = {
            name.removesuffix(".conv"): conv.in_channels
            for name, conv in coder.named_modules()
            if isinstance(conv, nn.Conv3d) and conv.kernel_size == (3, 3, 3)
        }
        assert set(cache.frames) == set(kernels)
        assert all(x.shape[1:3] == (kernels[name], 2) for name, x in cache.frames.items())


@pytest.mark.parametrize("coder", (Encoder, Decoder))
def test_coders_can_be_called_with_a_cache(coder):
    vae = released
    whole, _, x = both(vae, 5)[coder is Encoder]
    plan = frames.encode_plan if coder is Encoder else frames.decode_plan
    module = vae.encoder if coder is Encoder else vae.decoder
    cache = FrameCache()
    chunks = [module(chunk, cache) for chunk in x.split(plan(x.shape[1]), dim=1)]
    assert torch.equal(joined(chunks), whole)


class Cut(Exception):
    pass


class Convolutions(TorchDispatchMode):
    """Counts the convolutions inside it, and stops before the one of number `stop`."""

    def __init__(self, stop=None):
        super().__init__()
        self.count, self.stop = 0, stop

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "convolution" in func.name():
            if self.count == self.stop:
                raise Cut
            self.count += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("half", ("encoder", "decoder"))
def test_an_exception_in_a_chunk_breaks_the_state(half):
    vae = make(SMALL)
    whole, stream, x = both(vae, 4)[half == "encoder"]
    kind = EncodeState if half == "encoder" else DecodeState
    with Convolutions() as second:
        running = stream(x, kind())
        next(running)
        second.count = 0
        next(running)
    assert second.count >= 10
    for stop in range(second.count):
        state = kind()
        running = stream(x, state)
        next(running)
        with pytest.raises(Cut), Convolutions(stop):
            next(running)
        assert not state.cache.frames
        with pytest.raises(RuntimeError, match="in the middle of a chunk .* reset"):
            stream(x, state)
        state.reset()
        assert torch.equal(joined(stream(x, state)), whole)


@pytest.mark.parametrize("half", ("encoder", "decoder"))
def test_an_exception_before_the_first_layer_breaks_the_state(half):
    """A chunk that has been taken from the input is lost with it."""
    vae = make(SMALL)
    _, stream, x = both(vae, 4)[half == "encoder"]
    state = EncodeState() if half == "encoder" else DecodeState()
    running = stream(x, state)
    next(running)

    def fail(*_):
        raise Cut

    handle = getattr(vae, half).register_forward_pre_hook(fail)
    with pytest.raises(Cut):
        next(running)
    handle.remove()
    with pytest.raises(RuntimeError, match="in the middle of a chunk"):
        next(running)


@pytest.mark.parametrize("half", ("encoder", "decoder"))
def test_an_exception_does_not_affect_the_next_clip(half):
    vae = make(SMALL)
    whole, stream, x = both(vae, 2)[half == "encoder"]
    run = vae.encode if half == "encoder" else vae.decode
    with Convolutions() as all_of_them:
        run(x)
    for stop in range(all_of_them.count):
        with LiveBytes() as live, contextlib.suppress(Cut), Convolutions(stop):
            run(x)
            raise AssertionError("the convolution was not reached")
        assert live.now == 0
    assert torch.equal(joined(stream(x)), whole)


@pytest.mark.parametrize("name", VAES)
@pytest.mark.parametrize("half", ("encode", "decode"))
def test_memory_does_not_grow_with_the_clip(name, half):
    vae = VAES[name]

    def peak(latents):
        count = frames.video_frames(latents, vae.config)
        with LiveBytes() as live:
            if half == "decode":
                pieces = (torch.randn(1, 1, 4, 2, 2) for _ in range(latents))
                for _ in vae.stream_decode(pieces, total=latents):
                    pass
            else:
                pieces = (torch.randn(1, 1, 3, 16, 16) for _ in range(count))
                for _ in vae.stream_encode(pieces, total=count):
                    pass
        return live.peak

    short, long = peak(7), peak(15)
    assert abs(long / short - 1) < 0.01


def test_a_source_may_reuse_its_buffer():
    video = torch.randn(1, 9, 3, 16, 16)

    def reader():
        buffer = torch.empty(1, 3, 3, 16, 16)
        for piece in video.split(3, dim=1):
            yield buffer.copy_(piece)

    out = joined(released.stream_encode(reader(), total=9))
    assert torch.equal(out, released.encode(video).moments)


@pytest.mark.parametrize("name", VAES)
def test_gradients_flow_through_the_cache(name):
    """From the last frames of a clip to the first, across chunks."""
    vae = VAES[name]
    with torch.enable_grad():
        z = torch.randn(1, 5, 4, 2, 2, requires_grad=True)
        vae.decode(z)[:, -1].square().sum().backward()
        assert z.grad[:, 0].abs().max() > 0
        video = torch.randn(1, 17, 3, 16, 16, requires_grad=True)
        vae.encode(video).mean[:, -1].square().sum().backward()
        assert video.grad[:, 0].abs().max() > 0
    vae.zero_grad()


@pytest.mark.parametrize("name", VAES)
def test_checkpointing_keeps_values_and_gradients(name):
    results = []
    video = torch.randn(1, 17, 3, 16, 16)
    for on in (False, True):
        vae = copy.deepcopy(VAES[name])
        vae.gradient_checkpointing = on
        assert vae.encoder.gradient_checkpointing is on and vae.decoder.gradient_checkpointing is on
        with torch.enable_grad():
            with LiveBytes() as live:
                out = vae(video)
            held = live.now
            out.square().mean().backward()
        results.append((out.detach(), {n: p.grad for n, p in vae.named_parameters()}, held))
    (out, grads, held), (again, grads_again, held_again) = results
    assert torch.equal(out, again)
    assert held_again < 0.7 * held
    for key, grad in grads.items():
        assert torch.equal(grad, grads_again[key]), key
