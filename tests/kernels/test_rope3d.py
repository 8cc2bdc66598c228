"""Properties of `rope3d` and `qk_norm_rope3d`; those of the tables are in test_rope3d_tables.py."""

import dataclasses
import importlib

import pytest
import torch

import cogvx_kernels as ck
from cogvx_kernels import _backend
from cogvx_kernels.testing import OPS, SIZES, check_close, compare, evaluate, materialize

BACKENDS = ["reference", "kernel"]


def tables(grid=(2, 3, 4), split=(16, 24, 24)):
    return ck.rope3d_tables(ck.slice_positions(grid), split)


# --- the rotation ----------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("interleaved", [True, False])
def test_rotation_keeps_lengths(backend, interleaved, device):
    cos, sin = (t.to(device) for t in tables())
    x = torch.randn(2, 24, 2, 64, device=device)
    out = ck.rope3d(x, cos, sin, interleaved=interleaved, backend=backend)
    torch.testing.assert_close(out.norm(dim=-1), x.norm(dim=-1))
    assert not torch.allclose(out, x)


@pytest.mark.parametrize("backend", BACKENDS)
def test_scores_depend_on_differences_of_position(backend, device):
    """q·k after the rotation depends only on the difference of positions."""
    q, k = torch.randn(2, 1, 1, 1, 64, device=device).double().float()
    grid = ck.slice_positions((3, 3, 3))
    scores = []
    for shift in (0.0, 5.0):
        cos, sin = (t.to(device) for t in ck.rope3d_tables([p + shift for p in grid], (16, 24, 24)))
        rotated = [
            ck.rope3d(x.expand(1, 27, 1, 64), cos, sin, backend=backend)[0, :, 0] for x in (q, k)
        ]
        scores.append(rotated[0] @ rotated[1].T)
    torch.testing.assert_close(*scores, rtol=0, atol=2e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_text_keeps_its_bits_even_if_not_finite(backend, device):
    cos, sin = (t.to(device) for t in tables())
    x = torch.randn(1, 27, 2, 64, device=device)
    x[0, 0, 0, 0], x[0, 1, 0, 3], x[0, 2, 1, 5] = float("nan"), float("inf"), -0.0
    out = ck.rope3d(x, cos, sin, text_len=3, backend=backend)
    assert torch.equal(out[:, :3].view(torch.int32), x[:, :3].view(torch.int32))
    assert out[:, 3:].isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("interleaved", [True, False])
def test_dims_past_rotary_dim_keep_their_bits(backend, interleaved, device):
    cos, sin = (t.to(device) for t in tables(split=(4, 6, 6)))
    x = torch.randn(1, 24, 2, 40, device=device)
    out = ck.rope3d(x, cos, sin, interleaved=interleaved, backend=backend)
    assert torch.equal(out[..., 16:], x[..., 16:])
    assert not torch.equal(out[0, -1, :, :16], x[0, -1, :, :16])


@pytest.mark.parametrize("interleaved", [True, False])
def test_head_of_two_dims(interleaved, device):
    """One pair; not in the fuzz test, because Triton 3.6's interpreter makes it a scalar."""
    angles_of = torch.randn(3, 1, device=device)
    x = torch.randn(2, 5, 3, 2, device=device)
    call = (x, angles_of.cos(), angles_of.sin())
    ours = ck.rope3d(*call, text_len=2, interleaved=interleaved, backend="kernel")
    expected = ck.rope3d_reference(*call, text_len=2, interleaved=interleaved)
    torch.testing.assert_close(ours, expected)


def test_half_split_is_interleaved_with_permuted_dims(device):
    cos, sin = (t.to(device) for t in tables())
    x = torch.randn(1, 24, 2, 64, device=device)
    halves = x.unflatten(-1, (32, 2)).transpose(-1, -2).flatten(-2)
    out = ck.rope3d(x, cos, sin, backend="kernel")
    split = ck.rope3d(halves, cos, sin, interleaved=False, backend="kernel")
    assert torch.equal(split.unflatten(-1, (2, 32)).transpose(-1, -2).flatten(-2), out)


def test_packed_q_and_k_rotate_in_one_call(device):
    cos, sin = (t.to(device) for t in tables())
    qkv = torch.randn(2, 24, 3, 2, 64, device=device)
    both = ck.rope3d(qkv.flatten(2, 3)[:, :, :4], cos, sin, backend="kernel")
    for i in range(2):
        alone = ck.rope3d(qkv[:, :, i], cos, sin, backend="kernel")
        assert torch.equal(both[:, :, 2 * i : 2 * i + 2], alone)


def test_nan_stays_in_its_row(device):
    """A NaN in one head of one token changes no bit of another row."""
    cos, sin = (t.to(device) for t in tables())
    q, k = torch.randn(2, 2, 26, 3, 64, device=device)
    before = ck.qk_norm_rope3d(q, k, *[None] * 4, cos, sin, text_len=2, backend="kernel")
    q = q.clone()
    q[1, 4, 2, 7] = float("nan")
    after = ck.qk_norm_rope3d(q, k, *[None] * 4, cos, sin, text_len=2, backend="kernel")
    assert after[0][1, 4, 2].isnan().all()
    after[0][1, 4, 2] = before[0][1, 4, 2]
    assert torch.equal(after[0], before[0]) and torch.equal(after[1], before[1])


@pytest.mark.parametrize("norm", ["layer", "rms"])
@pytest.mark.parametrize("scale, offset", [(0.0, 0.0), (1e-30, 0.0), (1e15, 0.0), (1e-2, 1e4)])
def test_ill_conditioned_rows(norm, scale, offset, device):
    """All zero, tiny, huge, a deviation far below the mean: as close as the reference."""
    cos, sin = (t.to(device) for t in tables((1, 1, 4)))
    x = torch.randn(1, 4, 64, 64, device=device) * scale + offset
    call = (x, x, *[None] * 4, cos, sin)
    ours, _ = ck.qk_norm_rope3d(*call, norm=norm, backend="kernel")
    reference, _ = ck.qk_norm_rope3d_reference(*call, norm=norm)
    wide = [None if t is None else t.double() for t in call]
    fp64, _ = ck.qk_norm_rope3d_reference(*wide, norm=norm)
    comparison = check_close("q", ours, reference, fp64)
    assert comparison.ok, str(comparison)


# --- the backward's strips, and bytes --------------------------------------------------------


@pytest.mark.parametrize("programs", [1, 2, 3, 7])
def test_backward_strips_cover_every_token_once(programs, monkeypatch, device):
    """With more tokens than programs the gradients are the same up to the order of the sums."""
    kernel = importlib.import_module("cogvx_kernels.rope3d.kernel")
    info = OPS["qk_norm_rope3d"]
    monkeypatch.setattr(kernel, "BACKWARD_PROGRAMS", programs)
    for sample in info.samples[:2]:
        comparisons = compare(info, sample, torch.float32, device=device)
        assert all(v.ok for v in comparisons), [str(v) for v in comparisons if not v.ok]


@pytest.mark.skipif(not _backend.INTERPRETED, reason="bytes are counted in the interpreter")
@pytest.mark.parametrize("size", ["2b-480x720-49f", "5b-480x720-49f", "card-480x720-49f"])
def test_requested_bytes_are_near_the_minimum(size, monkeypatch):
    """Counted on a few tokens with the model's heads: at most 1.05 times the op's cost."""
    from tests.harness.observe import observe

    kernel = importlib.import_module("cogvx_kernels.rope3d.kernel")
    monkeypatch.setattr(kernel, "BACKWARD_PROGRAMS", 1)  # each program loads the weights
    info, full = OPS["qk_norm_rope3d"], SIZES[size]
    requested = {}
    for tokens in (2, 4):
        few = dataclasses.replace(full, frames=1, height=1, width=tokens, text_len=0, batch=1)
        arguments = materialize(info.at_size(few), torch.bfloat16)
        with observe() as seen:
            info.launch(kernel, arguments)
        assert len(seen.launches) == 2
        requested[tokens] = [launch.bytes_read + launch.bytes_written for launch in seen.launches]
    meta = materialize(info.at_size(full), torch.bfloat16, device="meta")
    for i, cost in enumerate(info.cost(meta)):
        per_token = (requested[4][i] - requested[2][i]) / 2
        assert per_token * full.batch * full.seqlen <= 1.05 * cost.bytes


@pytest.mark.parametrize("changed", ["q", "k_weight"])
def test_input_changed_before_the_backward_raises(changed, device):
    arguments = materialize(OPS["qk_norm_rope3d"].samples[0], torch.float32, device=device)
    leaf = arguments[changed].requires_grad_()
    moved = leaf * 1
    out = ck.qk_norm_rope3d(**{**arguments, changed: moved}, backend="kernel")
    moved.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (out[0].sum() + out[1].sum()).backward()


# --- in place, modules, arguments ------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_in_place_on_a_packed_projection(backend, dtype, device):
    """Only q and k are overwritten, with the same bits as out of place."""
    cos, sin = (t.to(device) for t in tables())
    weights = torch.randn(4, 40, device=device).to(dtype)
    cos, sin = cos[:, :20].contiguous(), sin[:, :20].contiguous()
    qkv = torch.randn(2, 26, 3, 3, 40, device=device).to(dtype)
    before = qkv.clone()
    call = (*weights, cos, sin)
    expected = ck.qk_norm_rope3d(*before.unbind(2)[:2], *call, text_len=2, backend=backend)
    q, k, v = qkv.unbind(2)
    out = ck.qk_norm_rope3d(q, k, *call, text_len=2, inplace=True, backend=backend)
    assert out[0] is q and out[1] is k
    assert torch.equal(q, expected[0]) and torch.equal(k, expected[1])
    assert torch.equal(v, before[:, :, 2])


@pytest.mark.filterwarnings("ignore")  # of the compiler's own
@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_in_place_compiled_changes_the_same_memory(compiler, device):
    """The compiled graph writes to the caller's views of the packed projection."""
    torch._dynamo.reset()
    cos, sin = (t.to(device) for t in tables())
    qkv = torch.randn(1, 26, 3, 2, 64, device=device)
    expected = qkv.clone()

    def step(qkv):
        q, k, v = qkv.unbind(2)
        q, k = ck.qk_norm_rope3d(
            q, k, *[None] * 4, cos, sin, text_len=2, inplace=True, backend="kernel"
        )
        return (q * k).sum(-1), v

    with torch.no_grad():
        plain = step(expected)
        compiled = torch.compile(step, fullgraph=True, backend=compiler)(qkv)
    assert torch.equal(qkv, expected)
    torch.testing.assert_close(compiled, plain)


def test_autocast_keeps_equal_dtypes(device):
    """Results and gradients have the arguments' dtypes, as without autocast."""
    info = OPS["qk_norm_rope3d"]
    arguments = materialize(info.samples[0], torch.bfloat16, device=device)
    for name in ("q_weight", "k_bias"):  # parameters stay fp32 under autocast
        arguments[name] = arguments[name].float()
    grad_outputs = tuple(torch.ones_like(arguments[name]) for name in ("q", "k"))
    call = (info.op, arguments, info.differentiable, grad_outputs)
    plain = evaluate(*call, backend="kernel")
    with torch.autocast(device, torch.float16):
        cast = evaluate(*call, backend="kernel")
    for name, x in cast.items():
        assert x.dtype == (arguments[name[1:]] if name[0] == "d" else arguments["q"]).dtype
        assert torch.equal(x, plain[name]), name


@pytest.mark.parametrize("wants", ["q", "k", "q_weight", "k_bias"])
def test_in_place_refuses_under_grad(wants):
    cos, sin = tables()
    arguments = {name: torch.randn(1, 24, 2, 64) for name in ("q", "k")}
    arguments |= {n: torch.randn(64) for n in ("q_weight", "q_bias", "k_weight", "k_bias")}
    arguments[wants].requires_grad_()
    before = arguments["q"].clone()
    with pytest.raises(RuntimeError, match=f"inplace=True overwrites .* got {wants} with requires"):
        ck.qk_norm_rope3d(**arguments, cos=cos, sin=sin, inplace=True)
    assert torch.equal(arguments["q"], before)
    with torch.no_grad():
        ck.qk_norm_rope3d(**arguments, cos=cos, sin=sin, inplace=True)
    assert not torch.equal(arguments["q"], before)


def test_in_place_refuses_overlapping_elements():
    cos, sin = tables()
    q = torch.randn(1, 24, 1, 64).expand(2, 24, 3, 64)
    with pytest.raises(ValueError, match=r"needs q to have each element in a place .* strides \(0"):
        ck.qk_norm_rope3d(q, q.clone(), *[None] * 4, cos, sin, inplace=True)


@pytest.mark.parametrize("norm", ["layer", "rms"])
@pytest.mark.parametrize("affine", [True, False])
def test_module_equals_the_function_and_has_diffusers_keys(norm, affine, device):
    module = ck.QKNormRoPE3D(40, norm=norm, affine=affine).to(device)
    names = {"layer": ["weight", "bias"], "rms": ["weight"]}[norm] if affine else []
    expected = [f"norm_{x}.{name}" for x in "qk" for name in names]
    assert list(module.state_dict()) == expected
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter)
    cos, sin = (t[:, :20].contiguous().to(device) for t in tables())
    q, k = torch.randn(2, 1, 26, 2, 40, device=device)
    ours = module(q, k, cos, sin, text_len=2)
    theirs = [
        ck.rope3d_reference(norm_of(x), cos, sin, text_len=2)
        for norm_of, x in ((module.norm_q, q), (module.norm_k, k))
    ]
    torch.testing.assert_close(list(ours), theirs, rtol=1e-5, atol=1e-5)
    if affine:
        ours[0].sum().backward()
        assert all(p.grad is not None for p in module.norm_q.parameters())
    assert "interleaved=True" in repr(module)


def test_rope_module(device):
    cos, sin = (t.to(device) for t in tables())
    x = torch.randn(1, 24, 2, 64, device=device)
    for interleaved in (True, False):
        module = ck.RoPE3D(interleaved)
        assert not module.state_dict()
        expected = ck.rope3d_reference(x, cos, sin, interleaved=interleaved)
        torch.testing.assert_close(module(x, cos, sin), expected)


def test_fp64_runs_the_reference():
    cos, sin = tables()
    x = torch.randn(1, 24, 2, 64, dtype=torch.float64)
    assert torch.equal(ck.rope3d(x, cos, sin), ck.rope3d_reference(x, cos, sin))
    message = "cannot run: x is float64; the kernel takes float32, float16, bfloat16. Use backend="
    with pytest.raises(RuntimeError, match=message):
        ck.rope3d(x, cos, sin, backend="kernel")


def test_tables_refuse_a_gradient():
    cos, sin = tables()
    with pytest.raises(RuntimeError, match=r"rope3d: sin is not differentiable .* sin\.detach\(\)"):
        ck.rope3d(torch.randn(1, 24, 2, 64), cos, sin.requires_grad_())


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"cos": torch.ones(23, 32)}, ValueError,
         r"cos must be \(video_len, rotary_dim // 2\) = \(24, 32\) for x of shape "
         r"\(1, 26, 2, 64\) and text_len=2; got \(23, 32\)"),
        ({"cos": torch.ones(24, 64), "sin": torch.ones(24, 64)}, ValueError,
         r"cos must have 1 to headdim // 2 = 32 columns"),
        ({"sin": torch.ones(24, 16)}, ValueError, r"sin must be the shape of cos = \(24, 32\)"),
        ({"cos": torch.ones(24, 32, dtype=torch.bfloat16)}, TypeError,
         r"cos must be float32; got bfloat16"),
        ({"text_len": 27}, ValueError, r"text_len must be in \[0, 26\] .*; got 27"),
        ({"text_len": 2.0}, TypeError, r"text_len must be an integer; got 2.0"),
        ({"text_len": True}, TypeError, r"text_len must be an integer; got True"),
        ({"interleaved": 1}, TypeError, r"interleaved must be True or False; got 1"),
        ({"backend": "triton"}, ValueError, r'backend must be one of "auto", "kernel"'),
        ({"x": torch.ones(1, 26, 128)}, ValueError,
         r"x must have 4 dimensions \(batch, seqlen, nheads, headdim\); got float32 \(1, 26,"),
    ],
)  # fmt: skip
def test_error_messages(change, error, message):
    cos, sin = tables()
    arguments = {"x": torch.randn(1, 26, 2, 64), "cos": cos, "sin": sin, "text_len": 2} | change
    with pytest.raises(error, match="rope3d: " + message):
        ck.rope3d(**arguments)
