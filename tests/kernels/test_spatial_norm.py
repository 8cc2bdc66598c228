"""Properties of `spatial_norm_silu` and `residual_moments`, on every path."""

import contextlib
import importlib
import itertools
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import cogvx_kernels as ck
from cogvx_kernels import _backend
from cogvx_kernels.spatial_norm.opinfo import RESIDUAL_MOMENTS, SPATIAL_NORM_SILU
from cogvx_kernels.spatial_norm.reference import latent_of_frame
from cogvx_kernels.testing import as_tuple, check_close, materialize, to_double

LAST = torch.channels_last_3d
NEEDS_TRITON = pytest.mark.skipif(not _backend.HAS_TRITON, reason="Triton is not installed")
# The reference, the kernels, and the in-place path of the CPU, which has no gradients.
EVERY_PATH = pytest.mark.parametrize(
    "path", ["reference", pytest.param("kernel", marks=NEEDS_TRITON), "cpu"]
)
EVERY_FORM = pytest.mark.parametrize("form", [torch.contiguous_format, LAST], ids=["rows", "last"])
OP = importlib.import_module("cogvx_kernels.spatial_norm.op")
GROUPS = 4


def device():
    return "cpu" if _backend.INTERPRETED or not torch.cuda.is_available() else "cuda"


def video(*shape, seed=0, form=LAST, dtype=torch.float32):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device(), dtype)
    return x.contiguous(memory_format=form) if x.dim() == 5 else x


@contextlib.contextmanager
def backend_of(path):
    """The backend argument that takes this path."""
    if path == "reference":
        with mock.patch.object(OP, "_use_cpu_path", return_value=False):
            yield "reference"
    elif path == "cpu":
        with torch.no_grad():
            yield "reference"
    else:
        yield path


def call(path, op, *arguments, **options):
    """Call a public function on a path."""
    with backend_of(path) as backend:
        return op(*arguments, **options, backend=backend)


def norm(path, *arguments, **options):
    return call(path, ck.spatial_norm_silu, *arguments, **{"num_groups": GROUPS, **options})


def assert_close(name, ours, theirs, fp64):
    comparison = check_close(name, ours, theirs, fp64)
    assert comparison.ok, str(comparison)


# --- values ----------------------------------------------------------------------------------


@EVERY_PATH
@EVERY_FORM
@pytest.mark.parametrize("frames", [1, 2, 4, 5, 9])
def test_equals_the_norm_of_diffusers(path, form, frames):
    """With its weights, its keys and its rule for odd numbers of frames; then SiLU."""
    vae = pytest.importorskip("diffusers.models.autoencoders.autoencoder_kl_cogvideox")
    torch.manual_seed(1)
    theirs = vae.CogVideoXSpatialNorm3D(8, 6, groups=GROUPS).to(device())
    ours = ck.SpatialNormSiLU(GROUPS, 8, zq_channels=6).to(device())
    for parameter in theirs.parameters():
        nn.init.normal_(parameter)
    assert ours.load_state_dict(theirs.state_dict()).missing_keys == []
    x = video(2, 8, frames, 6, 16, form=form)
    zq = video(2, 6, -(-frames // 2) if frames % 2 else frames // 2, 3, 8, seed=2)
    with torch.no_grad():
        baseline = F.silu(theirs(x, zq)[0])
        fp64 = F.silu(theirs.double()(x.double(), zq.double())[0])
        with backend_of(path) as ours.backend:
            out = ours(x, zq)
    assert out.is_contiguous(memory_format=form)
    assert_close(f"{frames} frames", out, baseline, fp64)


@EVERY_PATH
@EVERY_FORM
@pytest.mark.parametrize("silu", [True, False])
def test_without_latents_it_is_a_group_norm(path, form, silu):
    x, weight, bias = video(2, 12, 3, 5, 7, form=form), video(12, seed=1), video(12, seed=2)
    out = norm(path, x, weight, bias, eps=1e-5, silu=silu)
    after = F.silu if silu else lambda z: z
    baseline, fp64 = (
        after(F.group_norm(a, GROUPS, b, c, 1e-5))
        for a, b, c in ((x, weight, bias), (x.double(), weight.double(), bias.double()))
    )
    assert_close("group norm", out, baseline, fp64)


def test_the_module_has_the_keys_of_diffusers():
    plain, modulated = ck.SpatialNormSiLU(4, 8), ck.SpatialNormSiLU(4, 8, zq_channels=3)
    assert set(plain.state_dict()) == set(nn.GroupNorm(4, 8).state_dict())
    names = ("norm_layer", "conv_y.conv", "conv_b.conv")
    assert set(modulated.state_dict()) == {f"{n}.{p}" for n in names for p in ("weight", "bias")}
    with pytest.raises(ValueError, match="zq must be given"):
        modulated(torch.randn(1, 8, 1, 2, 2))


GOLDEN = (
    (1, 1, True, [0]),
    (1, 3, True, [0]),
    (5, 3, True, [0, 1, 1, 2, 2]),
    (9, 3, True, [0, 1, 1, 1, 1, 2, 2, 2, 2]),
    (8, 2, False, [0, 0, 0, 0, 1, 1, 1, 1]),
    (8, 2, True, [0, 1, 1, 1, 1, 1, 1, 1]),
    (3, 2, False, [0, 0, 1]),
    (2, 5, False, [0, 2]),
    (3, 6, True, [0, 1, 3]),
)


@pytest.mark.parametrize(("frames", "latents", "leads", "expected"), GOLDEN)
@EVERY_PATH
def test_a_pixel_reads_the_nearest_latent(path, frames, latents, leads, expected):
    """A weight of zero leaves b alone: numbers of latent frames, rows and columns."""
    assert latent_of_frame(frames, latents, leads) == expected
    x, zero = video(1, 2, frames, 6, 12), torch.zeros(2, device=device())
    t, h, w = torch.meshgrid(*map(torch.arange, (latents, 2, 4)), indexing="ij")
    b = (100 * t + 10 * h + w).expand(1, 2, latents, 2, 4).float().to(device())
    out = norm(path, x, zero, zero, None, b, num_groups=1, leads=leads, silu=False)
    rows, cols = torch.arange(6) // 3, torch.arange(12) // 3
    wanted = 100 * torch.tensor(expected)[:, None, None] + 10 * rows[:, None] + cols
    assert torch.equal(out.cpu(), wanted.expand(1, 2, -1, -1, -1).float())


@EVERY_PATH
@EVERY_FORM
def test_modulation_at_latent_resolution_equals_that_of_every_pixel(path, form):
    """Bit for bit: a 1x1 convolution commutes with nearest-neighbour upsampling."""
    x, zq = video(1, 8, 4, 6, 16, form=form), video(1, 3, 2, 2, 4, seed=1)
    weights = [video(8, 3, 1, 1, 1, seed=seed, form=torch.contiguous_format) for seed in (2, 3)]
    large = F.interpolate(zq, size=(4, 6, 16))
    small_maps, large_maps = ([F.conv3d(z, w) for w in weights] for z in (zq, large))
    for small, wide in zip(small_maps, large_maps, strict=True):
        assert torch.equal(F.interpolate(small, size=(4, 6, 16)), wide)
    assert torch.equal(
        norm(path, x, None, None, *small_maps), norm(path, x, None, None, *large_maps)
    )


# --- statistics ------------------------------------------------------------------------------


@EVERY_PATH
@pytest.mark.parametrize("per_frame", [True, False])
def test_statistics_per_frame_depend_on_that_frame_only(path, per_frame):
    x = video(1, 8, 4, 3, 8)
    other = x.clone()
    other[:, :, 2] += 1 + torch.rand_like(other[:, :, 2])
    before, after = (norm(path, z, None, None, per_frame=per_frame) for z in (x, other))
    kept = [torch.equal(before[:, :, f], after[:, :, f]) for f in range(4)]
    assert kept == ([True, True, False, True] if per_frame else [False] * 4)


@EVERY_PATH
@EVERY_FORM
@pytest.mark.parametrize("per_frame", [True, False])
def test_a_large_mean_costs_no_digits(path, form, per_frame):
    """A mean of 10,000 and a deviation of 0.01: sums of squares would lose all digits."""
    x = 1e4 + 0.01 * video(2, 8, 2, 40, 48, form=form)
    h = torch.zeros_like(x)
    wanted = {"num_groups": GROUPS, "per_frame": per_frame}
    fp64 = ck.residual_moments_reference(x.double(), h.double(), **wanted)[1]
    theirs = ck.residual_moments_reference(x, h, **wanted)[1]
    ours = call(path, ck.residual_moments, x, h, **wanted)[1]
    for i, name in enumerate(("mean", "variance")):
        assert_close(name, ours[..., i], theirs[..., i], fp64[..., i])
    assert_close(
        "norm",
        norm(path, x, None, None, per_frame=per_frame),
        ck.spatial_norm_silu_reference(x, None, None, **wanted),
        ck.spatial_norm_silu_reference(x.double(), None, None, **wanted),
    )


@EVERY_PATH
@pytest.mark.parametrize("value", [0.0, 3.7, -1e4])
def test_a_constant_is_normalized_to_zero(path, value):
    out = norm(path, torch.full((1, 8, 2, 9, 16), value), None, None, silu=False)
    assert out.abs().max() < 2.0  # rounding of the mean, over sqrt(eps)
    assert value or not out.any()


@EVERY_PATH
@EVERY_FORM
@pytest.mark.parametrize("per_frame", [True, False])
def test_given_statistics_equal_computed_ones(path, form, per_frame):
    """Bit for bit, for a residual sum as for any video."""
    x, h = (video(2, 8, 3, 20, 24, seed=s, form=form, dtype=torch.bfloat16) for s in (0, 1))
    offset, weight = video(8, seed=2), video(8, seed=3)
    options = {"num_groups": GROUPS, "per_frame": per_frame}
    total, moments = call(path, ck.residual_moments, x, h, offset, **options)
    wanted = (x.float() + h.float() + offset[:, None, None, None]).bfloat16()
    assert torch.equal(total, wanted) and total.is_contiguous(memory_format=form)
    assert moments.shape == (2, 3 if per_frame else 1, GROUPS, 2)
    computed, given = (
        norm(path, total, weight, None, per_frame=per_frame, moments=m) for m in (None, moments)
    )
    assert torch.equal(computed, given)


@EVERY_PATH
@EVERY_FORM
def test_an_offset_is_a_bias_added_first(path, form):
    x, offset = video(2, 8, 3, 5, 8, form=form), video(8, seed=1)
    y = video(2, 8, 1, 5, 2, seed=2)
    expected = norm(path, x + offset[:, None, None, None], None, None, y)
    out = norm(path, x, None, None, y, None, offset)
    if path == "cpu":  # torch sums a view of a frame in another order than a frame
        torch.testing.assert_close(out, expected, rtol=1e-6, atol=2e-6)
    else:
        assert torch.equal(out, expected)


def test_gradients_through_given_statistics(device):
    """residual_moments and its norm, in two calls, have the gradients of the norm of a sum."""
    x, h = (video(2, 8, 3, 4, 8, seed=s) for s in (0, 1))
    offset, weight = video(8, seed=2), video(8, seed=3)
    dout = video(2, 8, 3, 4, 8, seed=4)
    path = "kernel" if _backend.HAS_TRITON else "reference"

    def gradients(function, *leaves):
        leaves = [leaf.detach().requires_grad_() for leaf in leaves]
        return torch.autograd.grad(function(*leaves), leaves, dout.to(leaves[0].dtype))

    def in_two(x, h, offset, weight):
        total, moments = ck.residual_moments(x, h, offset, num_groups=GROUPS, backend=path)
        return norm(path, total, weight, None, moments=moments)

    def at_once(x, h, offset, weight):
        return norm("reference", x + h + offset[:, None, None, None], weight, None)

    leaves = (x, h, offset, weight)
    fp64 = gradients(at_once, *(leaf.double() for leaf in leaves))
    names = ("x", "h", "offset", "weight")
    results = gradients(in_two, *leaves), gradients(at_once, *leaves), fp64
    for name, ours, theirs, true in zip(names, *results, strict=True):
        comparison = check_close(name, ours, theirs, true, summed=True)
        assert comparison.ok, str(comparison)


# --- with a cache ----------------------------------------------------------------------------


@EVERY_PATH
@EVERY_FORM
@pytest.mark.parametrize("kept", [0, 2, 4])
@pytest.mark.parametrize("start", [None, "replicate", "zeros"])
def test_the_result_follows_the_cached_frames(path, form, kept, start):
    """Chunks longer and shorter than the cache: the bits of torch.cat. A clip that begins does not
    read the cache, here full of NaN."""
    weight, y = video(6, seed=8), video(2, 6, 2, 2, 2, seed=9)
    cache = video(2, 6, kept, 4, 6, seed=7, form=LAST)
    past = cache.clone()
    if start is not None:
        cache.fill_(float("nan"))
    for chunk, frames in enumerate((4, 2, 1, 3, 1)):
        x = video(2, 6, frames, 4, 6, seed=chunk, form=form)
        options = {"num_groups": 3, "leads": frames == 3}
        with torch.no_grad():
            out = norm(path, x, weight, None, y, **options)
            begins = None if chunk else start
            joined = norm(path, x, weight, None, y, **options, cache=cache, start=begins)
        if begins is not None:
            past = out[:, :, :1].expand_as(past) if begins == "replicate" else 0 * past
        wanted = torch.cat([past, out], 2)
        past = wanted[:, :, frames:].clone()
        assert torch.equal(joined, wanted) and joined.is_contiguous(memory_format=form)
        assert torch.equal(cache, past)


@NEEDS_TRITON
@pytest.mark.parametrize("frames", [1, 3])
@pytest.mark.parametrize("start", [None, "replicate", "zeros"])
def test_only_the_cache_is_overwritten(frames, start):
    """A cache that is a view of a larger tensor, in fenced memory, programs in random order."""
    if not _backend.INTERPRETED:
        pytest.skip("needs the interpreter")
    fence, observe = (
        getattr(importlib.import_module(f"tests.harness.{module}"), name)
        for module, name in (("fence", "Fence"), ("observe", "observe"))
    )
    with fence() as guarded:
        home = guarded.new((2, 5, 3, 7, 12)).fill_(3.0)  # rows of 12, of which 9 are the cache's
        cache = home[:, 1:, :2, 2:6, 2:11]
        before = home.clone()
        x = guarded.new((2, 4, frames, 4, 9)).copy_(video(2, 4, frames, 4, 9))
        with guarded.allocations(), observe(shuffle=frames) as seen, torch.no_grad():
            joined = norm("kernel", x, None, None, num_groups=2, cache=cache, start=start)
        assert not seen.faults(), seen.faults()
        out = norm("kernel", x, None, None, num_groups=2)
        assert torch.equal(joined[:, :, 2:], out) and not joined.isnan().any()
        assert torch.equal(cache, joined[:, :, -2:])
        cache.fill_(3.0)
        assert torch.equal(home, before)
    if frames > 2:
        assert [launch.kernel for launch in seen.launches][-1] == "_apply_kernel"
        assert len(seen.launches) == 3  # statistics, merge, apply: no separate copies


@NEEDS_TRITON
def test_the_cache_is_declared_as_mutated(device):
    cache, x, y = video(1, 4, 2, 2, 4), video(1, 4, 3, 2, 4, seed=1), video(1, 4, 1, 1, 2, seed=2)
    version = cache._version
    with torch.no_grad():
        norm("kernel", x, None, None, y, cache=cache)
    assert cache._version > version
    none = (None,) * 2
    op = torch.ops.cogvx.spatial_norm_silu_.default
    for start, frames in itertools.product(("", "replicate"), (1, 3)):
        arguments = (cache, x[:, :, :frames], *none, y, *none, None, 2, 1e-6, False, False, True)
        torch.library.opcheck(op, (*arguments, start))


@NEEDS_TRITON
@pytest.mark.filterwarnings("ignore")
def test_compiles_in_one_graph_with_a_cache(device):
    x, y = video(1, 4, 3, 2, 4, seed=1), video(1, 4, 1, 1, 2, seed=2)

    def step(x, cache):
        return norm("kernel", x, None, None, y, cache=cache) * 2

    results = []
    for wrap in (lambda f: f, lambda f: torch.compile(f, fullgraph=True)):
        torch._dynamo.reset()
        cache = video(1, 4, 2, 2, 4)
        with torch.no_grad():
            results.append((wrap(step)(x, cache), cache))
    for ours, theirs in zip(*results, strict=True):
        assert torch.equal(ours, theirs)


# --- CPU path --------------------------------------------------------------------------------


@pytest.mark.parametrize("info", [SPATIAL_NORM_SILU, RESIDUAL_MOMENTS], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_cpu_path_is_within_tolerance(info, dtype):
    """On every sample, and in the memory format of the kernels."""
    for sample in info.samples:
        arguments = materialize(sample, dtype)
        with torch.no_grad():
            ours = as_tuple(call("cpu", info.op, **arguments))
            by_reference = as_tuple(call("reference", info.op, **arguments))
            fp64 = as_tuple(info.reference(**to_double(arguments)))
        for i, (out, expected, true) in enumerate(zip(ours, by_reference, fp64, strict=True)):
            forms = (torch.contiguous_format, LAST) if out.dim() == 5 else ()
            for form in forms:
                same = [z.is_contiguous(memory_format=form) for z in (out, expected)]
                assert same[0] == same[1], sample.reason
            between = info.rounds_between
            comparison = check_close(
                f"{sample.reason}: out{i}", out, expected, true, rounds_between=between
            )
            assert comparison.ok, str(comparison)


def test_the_cpu_path_allocates_one_video():
    """A frame at a time; the reference allocates several videos in fp32."""
    x, y = video(1, 8, 16, 16, 32), video(1, 8, 2, 4, 8, seed=1)
    allocated = []
    with torch.profiler.profile(profile_memory=True) as profile:
        norm("cpu", x, None, None, y, y)
    allocated = [e.cpu_memory_usage for e in profile.events() if e.cpu_memory_usage > 0]
    size = x.numel() * 4
    assert sum(a >= size for a in allocated) <= 2  # the result, seen by its op and by its caller
    assert all(a <= size / 4 for a in allocated if a < size)


# --- argument checks -------------------------------------------------------------------------

WRONG = (
    ("x must have 5 dimensions", {"x": torch.randn(2, 8, 3, 4)}),
    ("x must be a floating-point", {"x": torch.ones(1, 8, 3, 4, 8, dtype=torch.int64)}),
    ("num_groups must divide", {"num_groups": 3}),
    (r"num_groups must be in \[1, 8\]", {"num_groups": 0}),
    ("weight must be .*channels.* = .8,.", {"weight": torch.randn(7)}),
    ("bias must be float32", {"bias": torch.randn(8).half()}),
    ("offset must be a tensor", {"offset": 3.0}),
    ("y must have a height that divides", {"y": torch.randn(1, 8, 1, 3, 4)}),
    ("b must have a width that divides", {"b": torch.randn(1, 8, 1, 4, 3)}),
    ("y must have a height", {"y": torch.randn(1, 8, 1, 0, 4)}),
    ("y must have at least 1 latent frames", {"y": torch.randn(1, 8, 0, 4, 4)}),
    ("y must have at least 2 latent frames", {"y": torch.randn(1, 8, 1, 4, 4), "leads": True}),
    ("y must be .batch, channels", {"y": torch.randn(1, 7, 1, 4, 4)}),
    ("b must be the shape of y",
     {"y": torch.randn(1, 8, 1, 4, 4), "b": torch.randn(1, 8, 1, 4, 8)}),
    ("eps must be positive", {"eps": 0.0}),
    ("silu must be True or False", {"silu": "yes"}),
    ("per_frame must be True or False", {"per_frame": 1}),
    ("moments must be .batch, frames or 1", {"moments": torch.rand(1, 3, 4, 2)}),
    ("moments must be float32", {"moments": torch.rand(1, 1, 4, 2).half()}),
    ("start must be None without a cache", {"start": "zeros"}),
    ("start must be one of", {"start": "reflect", "cache": torch.zeros(1, 8, 2, 4, 8)}),
    ("cache must be .batch, channels, kept", {"cache": torch.zeros(1, 8, 2, 4, 7)}),
    ("cache must be float32", {"cache": torch.zeros(1, 8, 2, 4, 8).half()}),
    ("cache must have each element", {"cache": torch.zeros(1, 8, 1, 4, 8).expand(1, 8, 2, 4, 8)}),
    ('start="replicate" needs a frame',
     {"x": torch.randn(1, 8, 0, 4, 8), "cache": torch.zeros(1, 8, 2, 4, 8),
      "start": "replicate"}),
)  # fmt: skip


@pytest.mark.parametrize(("message", "wrong"), WRONG, ids=[message for message, _ in WRONG])
def test_a_wrong_argument_is_named(message, wrong):
    arguments = {"x": torch.randn(1, 8, 3, 4, 8), "weight": None, "bias": None, "num_groups": 4}
    with pytest.raises((TypeError, ValueError), match=f"spatial_norm_silu: {message}"):
        ck.spatial_norm_silu(**{**arguments, **wrong})


def test_a_wrong_residual_is_named():
    x = torch.randn(1, 8, 3, 4, 8)
    for message, h in (("h must be the shape", x[:, :, :2]), ("h must be float32", x.half())):
        with pytest.raises((TypeError, ValueError), match=f"residual_moments: {message}"):
            ck.residual_moments(x, h, num_groups=4)


@pytest.mark.parametrize("name", ["x", "weight", "y", "offset", "cache"])
def test_a_cache_refuses_gradients(name):
    tensors = {
        "x": video(1, 8, 3, 4, 8), "weight": video(8), "bias": None, "y": video(1, 8, 1, 2, 4),
        "b": None, "offset": video(8), "cache": video(1, 8, 2, 4, 8),
    }  # fmt: skip
    tensors[name].requires_grad_()
    with pytest.raises(RuntimeError, match=f"cache is overwritten.*{name} with requires_grad"):
        ck.spatial_norm_silu(**tensors, num_groups=4)
