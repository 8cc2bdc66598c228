"""Chunks of a VAE in relay, and tiles on ranks: bit for bit the result of one process."""

import functools
from collections import Counter

import pytest
import torch
import torch.distributed as dist

from cogvx import frames, parallel
from cogvx.config import VAEConfig
from cogvx.vae import CausalVAE, DecodeState, EncodeState, Tiling
from cogvx_kernels import module_backend
from tests.harness.selection import rest

from . import ranks

# Two levels: every kind of layer.
SMALL = dict(
    block_out_channels=(8, 16),
    latent_channels=2,
    layers_per_block=1,
    norm_num_groups=2,
    temporal_compression_ratio=2,
    num_sample_frames_batch_size=4,
)
CONFIGS = {
    "released": VAEConfig(**SMALL),
    "factorized": VAEConfig(**SMALL, factorized=True),
    "factorized, by one": VAEConfig(
        **{**SMALL, "num_sample_frames_batch_size": 2},
        factorized=True,
        num_latent_frames_batch_size=1,
    ),
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
TILING = Tiling(6, 8, 1 / 3, 1 / 4)  # four tiles of 3 x 4 latents
UNCUT = Tiling(8, 12)


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


@functools.cache
def make(name, dtype="fp32"):
    torch.manual_seed(0)
    with module_backend("reference"):
        vae = CausalVAE(CONFIGS[name])
    for parameter in vae.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape)
    return vae.to(DTYPES[dtype]).eval()


def latents_of(vae, length, batch=1):
    generator = torch.Generator().manual_seed(length)
    z = torch.randn(batch, length, 2, 4, 6, generator=generator)
    return z.to(next(vae.parameters()).dtype)


def video_of(vae, length, batch=1):
    generator = torch.Generator().manual_seed(length)
    count = frames.video_frames(length, vae.config)
    video = torch.randn(batch, count, 3, 8, 12, generator=generator)
    return video.to(next(vae.parameters()).dtype)


@functools.cache
def expected(name, dtype, length, tiling):
    """(video of latents, moments of a video), from one process."""
    assert not dist.is_initialized()
    return both(name, dtype, length, tiling)


def both(name, dtype, length, tiling):
    vae = make(name, dtype)
    z, video = latents_of(vae, length), video_of(vae, length)
    return vae.decode(z, tiling=tiling), vae.encode(video, tiling=tiling).moments


def differing(cases, gather):
    """Cases whose result on this rank is not that of one process."""
    found = []
    for case in cases:
        method = "relay" if case[-1] is None else "tiles"
        parallel.vae_parallel(make(*case[:2]), dist.group.WORLD, method=method, gather=gather)
        video, moments = both(*case)
        whole, wanted = expected(*case)
        if dist.get_rank() and gather == "first":
            whole = whole[:, :0]
        if not (torch.equal(video, whole) and torch.equal(moments, wanted)):
            found.append(case)
    return found


def assert_same(size, cases, gather):
    for case in cases:
        expected(*case)  # once, before the fork
    assert ranks.run(differing, size, cases, gather) == [[]] * size


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lengths", [(1, 5, 8), (2, 3, 13)])
@pytest.mark.parametrize(
    "size, gather",
    [(1, "first"), (2, "all"), rest(3, "first"), (4, "first"), rest(2, "first"), rest(4, "all")],
)
def test_a_relay_has_the_bits_of_one_process(size, gather, lengths, dtype):
    """With fewer ranks than chunks, as many, and more."""
    assert_same(size, [(n, dtype, length, None) for n in CONFIGS for length in lengths], gather)


@pytest.mark.parametrize("length", [3, 1])
@pytest.mark.parametrize(
    "size, gather, dtype",
    [
        (1, "all", "fp32"),
        (2, "first", "bf16"),
        (3, "all", "fp32"),
        rest(4, "first", "fp32"),
        rest(4, "all", "bf16"),
    ],
)
def test_tiles_on_ranks_have_the_bits_of_the_tiled_result(size, gather, dtype, length):
    cases = [(name, dtype, length, TILING) for name in CONFIGS]
    assert_same(size, [*cases, (*cases[0][:-1], UNCUT)], gather)


def relay(vae, **options):
    parallel.vae_parallel(vae, dist.group.WORLD, **options)
    return vae


def test_clips_of_a_batch_one_by_one_or_together_under_autocast():
    vae = make("released")
    z = latents_of(vae, 5, batch=2)

    def results():
        with torch.autocast("cpu", torch.bfloat16):
            return [vae.decode(z, slicing=slicing) for slicing in (False, True)]

    wanted = results()
    for one in ranks.run(lambda: relay(vae, gather="all") and results(), 3):
        assert all(map(torch.equal, one, wanted))


def pieces_of(clip):
    """Single frames, each in the memory of the one before."""
    memory = clip[:, :1].clone()
    for frame in clip.split(1, 1):
        yield memory.copy_(frame)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_stream_comes_in_order_to_the_first_rank(name):
    vae = make(name)
    z = latents_of(vae, 5)
    wanted = list(vae.stream_decode(z))

    def stream():
        return list(relay(vae).stream_decode(pieces_of(z), total=5))

    first, other = ranks.run(stream, 2)
    assert len(first) == len(other) and all(map(torch.equal, first, wanted))
    assert all(piece.shape == (1, 0, *wanted[0].shape[2:]) for piece in other)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_stream_of_a_stream_takes_turns(name):
    """The source of the decoder's chunks is the encoder's relay on the same ranks."""
    vae = make(name)
    video = video_of(vae, 5)
    wanted = vae(video)

    def stream():
        relay(vae, gather="all")
        latents = (posterior.mode() for posterior in vae.stream_encode(video))
        return torch.cat(list(vae.stream_decode(latents, total=5)), 1)

    assert all(torch.equal(one, wanted) for one in ranks.run(stream, 2))


def test_kernels_see_the_frames_of_the_rank_before():
    """Triton's kernels, interpreted without a GPU."""
    config = VAEConfig(**{**SMALL, "block_out_channels": (4, 4), "norm_num_groups": 1})
    with module_backend("kernel"):
        vae = CausalVAE(config)
    z = torch.randn(1, 4, 2, 2, 2)
    wanted = vae.decode(z)
    [first, _] = ranks.run(lambda: relay(vae).decode(z), 2)
    assert torch.equal(first, wanted)


def counted(vae, x, call):
    """Messages and bytes that this rank sends while `call` runs, by function."""
    sent = Counter()

    def counting(name):
        function = getattr(dist, name)

        def send(tensor, *args, **options):
            sent[name] += 1
            sent[f"bytes of {name}"] += tensor.nbytes
            return function(tensor, *args, **options)

        return send

    relay(vae)
    for name in ("isend", "send", "broadcast"):
        setattr(dist, name, counting(name))
    getattr(vae, call)(x)
    return sent


@pytest.mark.parametrize("name", CONFIGS)
def test_messages_and_bytes_are_those_of_the_caches(name):
    """A message for each convolution that keeps frames, and chunk but the last; one a result."""
    vae, size = make(name), 3
    z = latents_of(vae, 13)
    plan = frames.decode_plan(13, vae.config)
    state = DecodeState()
    list(vae.stream_decode(z[:, : plan[0]], state, total=13, last=False))
    convolutions, nbytes = len(state.cache.tensors()), state.nbytes
    video = vae.decode(z)
    first = video[:, : frames.video_frames(plan[0], vae.config)]
    others = [i for i in range(1, len(plan)) if i % size]
    later = (video.nbytes - first.nbytes) // (len(plan) - 1)
    total = sum(ranks.run(counted, size, vae, z, "decode"), Counter())
    assert total == {
        "isend": convolutions * (len(plan) - 1),
        "bytes of isend": nbytes * (len(plan) - 1),
        "send": len(others),
        "bytes of send": later * len(others),
    }


def test_the_released_vae_passes_what_the_documentation_says():
    with torch.device("meta"):
        vae = CausalVAE(VAEConfig()).bfloat16()
        z = torch.empty(1, 3, 16, 60, 90, dtype=torch.bfloat16)
        video = torch.empty(1, 9, 3, 480, 720, dtype=torch.bfloat16)
    decoding, encoding = DecodeState(), EncodeState()
    list(vae.stream_decode(z, decoding, total=13, last=False))
    list(vae.stream_encode(video, encoding, total=49, last=False))
    assert [len(state.cache.tensors()) for state in (decoding, encoding)] == [38, 30]
    assert [round(state.nbytes / 1e9, 2) for state in (decoding, encoding)] == [2.81, 1.80]


def test_a_mesh_shares_a_clip_among_all_its_ranks_but_those_of_data():
    vae = make("released")
    clips = [latents_of(vae, 5), latents_of(vae, 8)]
    wanted = [vae.decode(z) for z in clips]

    def decode():
        mesh = dist.init_device_mesh(
            "cpu", (2, 1, 2), mesh_dim_names=("data", "guidance", "context")
        )
        parallel.vae_parallel(vae, mesh, gather="all")
        return vae.decode(clips[mesh["data"].get_local_rank()])

    results = ranks.run(decode, 4)
    assert all(map(torch.equal, results, [wanted[0], wanted[0], wanted[1], wanted[1]]))


def test_none_undoes_it():
    vae = make("released")
    z = latents_of(vae, 3)
    wanted = vae.decode(z)

    def decode():
        relay(vae)
        parallel.vae_parallel(vae, None)
        return vae.decode(z)

    assert all(torch.equal(one, wanted) for one in ranks.run(decode, 2))


def refused(vae, call):
    try:
        call(vae)
    except Exception as error:
        return f"{type(error).__name__}: {error}"


REFUSED = {
    "gradients": (
        lambda vae: torch.enable_grad()(relay(vae).decode)(latents_of(vae, 3)),
        "RuntimeError: decode: gradients must be off for a VAE on 2 ranks",
    ),
    "tiling": (
        lambda vae: relay(vae).decode(latents_of(vae, 3), tiling=TILING),
        "ValueError: decode: tiling must be None for a VAE whose chunks are on 2 ranks, in relay",
    ),
    "no tiling": (
        lambda vae: relay(vae, method="tiles").encode(video_of(vae, 3)),
        "ValueError: encode: tiling must be given for a VAE whose tiles are on 2 ranks",
    ),
    "a stream of tiles": (
        lambda vae: relay(vae, method="tiles").stream_decode(latents_of(vae, 3)),
        "ValueError: stream_decode: tiling must be given for a VAE whose tiles are on 2 ranks",
    ),
    "a state": (
        lambda vae: relay(vae).stream_decode(latents_of(vae, 3), DecodeState()),
        "ValueError: stream_decode: latents must be a whole clip, a tensor or with total=",
    ),
    "no total": (
        lambda vae: relay(vae).stream_encode(iter([video_of(vae, 3)])),
        "ValueError: stream_encode: video must be a whole clip, a tensor or with total=",
    ),
    "other latents": (
        lambda vae: relay(vae).decode(latents_of(vae, 3) + dist.get_rank()),
        "ValueError: decode: latents must be the same on every rank; got",
    ),
    "other tiled latents": (
        lambda vae: relay(vae, method="tiles").decode(
            latents_of(vae, 3 + dist.get_rank()), tiling=TILING
        ),
        "ValueError: decode: latents must be the same on every rank; got ((1, 3, 2, 4, 6)",
    ),
    "a method": (
        lambda vae: relay(vae, method="ring"),
        'ValueError: vae_parallel: method must be one of "relay", "tiles"; got \'ring\'',
    ),
    "a module": (
        lambda vae: relay(vae.decoder.conv_in),
        "TypeError: vae_parallel: target must be a pipeline, CausalVAE, Encoder or Decoder; got",
    ),
}


def test_what_cannot_be_shared_is_refused_on_every_rank():
    vae = make("released")

    def all_of_them():
        return {name: refused(vae, call) for name, (call, _) in REFUSED.items()}

    for found in ranks.run(all_of_them, 2):
        for name, (_, message) in REFUSED.items():
            assert found[name] is not None and found[name].startswith(message), name
