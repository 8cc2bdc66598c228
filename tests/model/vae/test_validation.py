"""Wrong arguments are refused before any work, by the name of the argument and the rule."""

import pytest
import torch

from cogvx.config import VAEConfig
from cogvx.vae import (
    CausalVAE,
    DecodeState,
    EncodeState,
    decode,
    encode,
    stream_decode,
    stream_encode,
)

TINY = dict(
    block_out_channels=(8, 8, 8, 8), latent_channels=4, layers_per_block=1, norm_num_groups=2
)
vae = CausalVAE(VAEConfig(**TINY))
factorized = CausalVAE(
    VAEConfig(
        **TINY, factorized=True, num_sample_frames_batch_size=4, num_latent_frames_batch_size=1
    )
)


@pytest.fixture(autouse=True)
def no_work(monkeypatch):
    """No chunk is ever begun."""

    def fail(*_):
        raise AssertionError("work was done before the check")

    for coder in (vae.encoder, vae.decoder, factorized.encoder, factorized.decoder):
        monkeypatch.setattr(coder, "forward", fail)


def empty(*shape, **options):
    return torch.zeros(shape, **options)


@pytest.mark.parametrize("count", [n for n in range(2, 34) if n % 8 > 1])
def test_invalid_frame_counts_are_refused_with_the_nearest(count):
    below, above = count // 8 * 8 + 1, count // 8 * 8 + 8
    for call in (vae.encode, vae.stream_encode):
        with pytest.raises(ValueError, match=rf"8k \+ 1 frames, nearest {below} or {above}; got"):
            call(empty(1, count, 3, 16, 16))


@pytest.mark.parametrize("count", (2, 3, 4, 6, 8, 16))
def test_invalid_frame_counts_of_the_factorised_vae_are_refused(count):
    with pytest.raises(ValueError, match=rf"encode: video must have 1 \+ 4k frames.*got {count}"):
        factorized.encode(empty(1, count, 3, 16, 16))


@pytest.mark.parametrize(
    "shape, message",
    (
        ((1, 9, 3, 20, 16), "height that is a multiple of 8, nearest 16 or 24; got 20x16"),
        ((1, 9, 3, 16, 4), "width that is a multiple of 8, nearest 8; got 16x4"),
        ((1, 3, 9, 16, 16), "with 3 channels; got .* 9 channels"),
        ((9, 3, 16, 16), "be 5-dimensional .batch, frames, channels"),
        ((0, 9, 3, 16, 16), "nothing empty"),
        ((1, 0, 3, 16, 16), "nothing empty"),
        ((1, 9, 3, 0, 16), "nothing empty"),
    ),
)
def test_wrong_video_shape_is_refused(shape, message):
    for call in (vae.encode, vae.stream_encode):
        with pytest.raises(ValueError, match=f"video must .*{message}"):
            call(empty(*shape))


@pytest.mark.parametrize("shape", ((1, 4, 3, 2, 2), (4, 3, 2, 2), (1, 0, 4, 2, 2), (1, 3, 4, 2, 0)))
def test_wrong_latents_shape_is_refused(shape):
    for call in (vae.decode, vae.stream_decode):
        with pytest.raises(ValueError, match="latents must be "):
            call(empty(*shape))


@pytest.mark.parametrize("dtype", (torch.float64, torch.bfloat16, torch.uint8))
def test_wrong_dtype_is_refused(dtype):
    for call, shape in ((vae.encode, (1, 9, 3, 16, 16)), (vae.stream_decode, (1, 3, 4, 2, 2))):
        with pytest.raises(TypeError, match=f"must be torch.float32 as the weights; got {dtype}"):
            call(empty(*shape, dtype=dtype))


def test_under_autocast_integers_are_refused():
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(TypeError, match="got torch.uint8"):
        vae.encode(empty(1, 9, 3, 16, 16, dtype=torch.uint8))


def test_wrong_device_is_refused():
    with pytest.raises(ValueError, match="latents must be on cpu as the weights; got meta"):
        vae.decode(empty(1, 3, 4, 2, 2, device="meta"))


@pytest.mark.parametrize("value", (None, [[1.0]], 3))
def test_non_tensor_is_refused(value):
    with pytest.raises(TypeError, match="video must be a tensor .*got "):
        vae.encode(value)


def test_neither_tensor_nor_pieces_is_refused():
    with pytest.raises(TypeError, match="a tensor or an iterable of tensors; got int"):
        vae.stream_decode(3)
    with pytest.raises(TypeError, match="latents must be a tensor .*got str"):
        next(vae.stream_decode(["a"], total=1))


def test_swapped_encoder_and_decoder_are_refused():
    for call, module, message in (
        (encode, vae.decoder, "encode: encoder must be an Encoder; got Decoder"),
        (stream_encode, vae, "stream_encode: encoder must be an Encoder; got CausalVAE"),
        (decode, vae.encoder, "decode: decoder must be a Decoder; got Encoder"),
        (stream_decode, None, "stream_decode: decoder must be a Decoder; got NoneType"),
    ):
        with pytest.raises(TypeError, match=message):
            call(module, empty(1, 9, 3, 16, 16))


def test_swapped_states_are_refused():
    with pytest.raises(TypeError, match="state must be a DecodeState; got EncodeState"):
        vae.stream_decode(empty(1, 3, 4, 2, 2), EncodeState())
    with pytest.raises(TypeError, match="state must be a EncodeState; got DecodeState"):
        vae.stream_encode(empty(1, 9, 3, 16, 16), DecodeState())


@pytest.mark.parametrize("total, error", ((True, TypeError), (9.0, TypeError), (0, ValueError)))
def test_invalid_total_is_refused(total, error):
    with pytest.raises(error, match="total must "):
        vae.stream_decode(iter([]), total=total)


def test_a_refused_piece_leaves_the_state_unchanged():
    state = DecodeState()
    list(vae.stream_decode(empty(1, 1, 4, 2, 2), state, total=4, last=False))
    before = (state.nbytes, state.waiting)
    for other in (empty(1, 1, 4, 2, 3), empty(2, 1, 4, 2, 2)):
        with pytest.raises(ValueError, match="must continue the clip"):
            list(vae.stream_decode(other, state, last=False))
    assert (state.nbytes, state.waiting) == before
