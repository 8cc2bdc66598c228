"""Properties of `expert_ffn`, and its GEMM backends."""

import importlib
import sys
from functools import partial

import pytest
import torch
from torch.nn import functional as F

import cogvx_kernels as ck
from cogvx_kernels.expert_ffn.routing import sort_by_expert
from cogvx_kernels.testing import OPS, compare, evaluate, materialize

from .feed_forwards import (
    BACKENDS,
    BATCH,
    DIM,
    FFN_DIM,
    SEQLEN,
    TEXT,
    TRITON,
    device,
    experts,
    index,
    normal,
    tokens,
)

# --- tokens and their experts ----------------------------------------------------------------


@BACKENDS
def test_each_modality_has_its_own_expert(backend):
    """The other's weights do not count, not even NaN."""
    x, own = tokens(), experts(2)
    y = ck.expert_ffn(x, *own, text_len=TEXT, backend=backend)
    for expert, part in ((0, slice(0, TEXT)), (1, slice(TEXT, None))):
        others = [w.clone() for w in own]
        for w in others:
            w[1 - expert] = float("nan")
        changed = ck.expert_ffn(x, *others, text_len=TEXT, backend=backend)
        assert torch.equal(changed[:, part], y[:, part])
        alone = [w[expert : expert + 1] for w in own]
        part_alone = ck.expert_ffn(x[:, part], *alone, backend=backend)
        torch.testing.assert_close(part_alone, y[:, part], rtol=1e-5, atol=1e-6)


@BACKENDS
def test_token_ignores_experts_it_did_not_choose(backend):
    x, own, where = tokens(), experts(3), index(3, top_k=2)
    y = ck.expert_ffn(x, *own, where, backend=backend)
    own[0][2] = float("inf")
    changed = ck.expert_ffn(x, *own, where, backend=backend)
    others = ~(where == 2).any(-1)
    assert others.any() and not others.all()
    assert torch.equal(changed[others], y[others])
    assert not changed[~others].isfinite().all(-1).any()


@BACKENDS
def test_text_and_video_are_two_experts_with_an_index(backend):
    x, own = tokens(), experts(2)
    where = (torch.arange(SEQLEN, device=x.device) >= TEXT).long().expand(BATCH, -1)[..., None]
    by_length = ck.expert_ffn(x, *own, text_len=TEXT, backend=backend)
    by_index = ck.expert_ffn(x, *own, where, backend=backend)
    torch.testing.assert_close(by_index, by_length, rtol=1e-6, atol=1e-6)


@BACKENDS
def test_permuted_experts_give_the_same_bits(backend):
    """The result, and each expert's gradient."""
    x, own, where = tokens(), [w.requires_grad_() for w in experts(4)], index(4)
    weight = normal(BATCH, SEQLEN, 1)
    order = torch.tensor([2, 0, 3, 1], device=x.device)
    y = ck.expert_ffn(x, *own, where, weight, backend=backend)
    gradients = torch.autograd.grad(y, own, tokens(5))
    moved = [w.detach()[order].requires_grad_() for w in own]
    renamed = order.argsort()[where]
    z = ck.expert_ffn(x, *moved, renamed, weight, backend=backend)
    assert torch.equal(y, z)
    for moved_gradient, gradient in zip(
        torch.autograd.grad(z, moved, tokens(5)), gradients, strict=True
    ):
        assert torch.equal(moved_gradient, gradient[order])


@BACKENDS
def test_upcycled_equals_shared(backend):
    """Copies of one expert, with any index, equal that expert."""
    x, one = tokens(), experts(1)
    shared = ck.expert_ffn(x, *one, backend=backend)
    copies = [w.expand(3, *w.shape[1:]) for w in one]
    routed = ck.expert_ffn(x, *copies, index(3), backend=backend)
    torch.testing.assert_close(routed, shared, rtol=1e-6, atol=1e-6)
    share = torch.tensor([0.25, 0.75], device=x.device).expand(BATCH, SEQLEN, 2)
    of_two = ck.expert_ffn(x, *copies, index(3, 2), share.contiguous(), backend=backend)
    torch.testing.assert_close(of_two, shared, rtol=1e-5, atol=2e-6)


@BACKENDS
def test_no_token_is_dropped_if_all_choose_one_expert(backend):
    x, own = tokens(), experts(4)
    all_of_them = torch.full((BATCH, SEQLEN, 1), 3, device=x.device)
    y = ck.expert_ffn(x, *own, all_of_them, backend=backend)
    alone = ck.expert_ffn(x, *(w[3:] for w in own), backend=backend)
    torch.testing.assert_close(y, alone, rtol=1e-6, atol=1e-6)


@BACKENDS
def test_expert_without_tokens_has_zero_gradients(backend):
    x, own = tokens(), [w.requires_grad_() for w in experts(3)]
    y = ck.expert_ffn(x, *own, index(2), backend=backend)
    for gradient in torch.autograd.grad(y.square().sum(), own):
        assert not gradient[2].any()
        assert gradient[0].abs().sum() > 0


@BACKENDS
def test_index_out_of_range_adds_nothing(backend):
    x, own, where = tokens(), experts(2), index(2)
    nobody = torch.tensor([-1, 2, 10**9], device=x.device)
    with_nobody = torch.cat(
        [where, nobody[torch.arange(SEQLEN) % 3].expand(BATCH, -1)[..., None]], 2
    )
    y = ck.expert_ffn(x, *own, where, backend=backend)
    assert torch.equal(ck.expert_ffn(x, *own, with_nobody, backend=backend), y)
    none = ck.expert_ffn(x, *own, torch.full_like(where, -1), backend=backend)
    assert not none.any()


@BACKENDS
def test_single_token_equals_the_token_in_a_batch(backend):
    x, own, where = tokens(), experts(3), index(3)
    y = ck.expert_ffn(x, *own, where, backend=backend)
    for place in (0, TEXT, SEQLEN - 1):
        part = slice(place, place + 1)
        alone = ck.expert_ffn(x[:, part], *own, where[:, part], backend=backend)
        torch.testing.assert_close(alone, y[:, part], rtol=1e-6, atol=1e-6)


@BACKENDS
def test_result_scales_with_the_weights(backend):
    """By a power of two, exactly."""
    x, own, where = tokens(), experts(3), index(3, 2)
    weight = normal(BATCH, SEQLEN, 2)
    once, four = (
        ck.expert_ffn(x, *own, where, times * weight, backend=backend) for times in (1, 4)
    )
    assert torch.equal(4 * once, four)
    assert not ck.expert_ffn(x, *own, where, 0 * weight, backend=backend).any()


# --- backends and options ----------------------------------------------------------------------

FFN = OPS["expert_ffn"]
RUNS = [s for s in FFN.samples if s.arguments["index"] is None]


def check(info, sample, dtype, **options):
    function = partial(info.op, backend="kernel", **options)
    wrong = [str(v) for v in compare(info, sample, dtype, function=function) if not v.ok]
    assert not wrong, f"{sample.reason}: {'; '.join(wrong)}"


@TRITON
@pytest.mark.parametrize("dtype", FFN.dtypes, ids=str)
def test_dense_is_close(dtype):
    """torch's matrix products instead of the kernel: forward and every gradient."""
    for sample in RUNS:
        check(FFN, sample, dtype, gemm="dense")
        check(FFN, sample, dtype, gemm="dense", recompute=False)


@TRITON
@pytest.mark.parametrize("dtype", FFN.dtypes, ids=str)
def test_kept_pre_activation_is_close(dtype):
    for sample in FFN.samples[::3]:
        check(FFN, sample, dtype, recompute=False)


@TRITON
def test_kept_pre_activation_changes_no_result():
    """Nor a gradient: computed again, it is rounded as one that is kept."""
    arguments = materialize(FFN.samples[0], torch.bfloat16, device=device())
    grad_outputs = (torch.ones_like(arguments["x"]),)
    kept, again = (
        evaluate(FFN.op, arguments, FFN.differentiable, grad_outputs, recompute=r, backend="kernel")
        for r in (False, True)
    )
    assert all(torch.equal(kept[name], again[name]) for name in again)


@TRITON
@pytest.mark.parametrize("recompute", [True, False])
@pytest.mark.parametrize("activation", ["gelu_tanh", "gelu"])
def test_pre_activations_beyond_fp16_have_finite_gradients(activation, recompute):
    """The activation is 0 for one of -4e5, as is its derivative."""
    x = torch.full((1, 4, 16), -500.0, dtype=torch.float16, device=device(), requires_grad=True)
    up, down = (torch.full((1, 16, 16), v, dtype=x.dtype, device=x.device) for v in (50.0, 1.0))
    options = {"activation": activation, "backend": "kernel", "recompute": recompute}
    out = FFN.op(x, up.requires_grad_(), None, down.requires_grad_(), None, **options)
    grads = torch.autograd.grad(out.sum(), (x, up, down))
    assert not out.any() and not any(grad.any() for grad in grads)


@TRITON
@pytest.mark.parametrize("recompute", [True, False])
def test_saved_tensors(recompute):
    """Only arguments, or also a pre-activation of the documented size."""
    arguments = materialize(FFN.samples[0], torch.bfloat16, device=device())
    given = {x.data_ptr() for x in arguments.values() if torch.is_tensor(x)}
    stacked = [arguments[n] for n in ("up", "up_bias", "down", "down_bias")]
    given |= {one.data_ptr() for tensor in stacked for one in tensor}
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x), lambda x: x):
        evaluate(FFN.op, arguments, FFN.differentiable, backend="kernel", recompute=recompute)
    besides = sum(x.nbytes for x in saved if x.data_ptr() not in given)
    batch, seqlen, top_k = arguments["index"].shape
    pre = batch * seqlen * top_k * arguments["up"].shape[1] * 2
    assert besides == (0 if recompute else pre)


@BACKENDS
def test_experts_may_be_separate_tensors(backend):
    """As the weights of linear layers, also with different strides; each has its own gradient."""
    x, own, where = tokens(), experts(3), index(3, 2)
    y = ck.expert_ffn(x, *own, where, backend=backend)
    apart = [[one.clone().requires_grad_() for one in w] for w in own]
    z = ck.expert_ffn(x, *apart, where, backend=backend)
    assert torch.equal(y, z)
    leaves = [one for w in apart for one in w]
    together = [w.requires_grad_() for w in own]
    y = ck.expert_ffn(x, *together, where, backend=backend)
    expected = [g for w in torch.autograd.grad(y, together, tokens(3)) for g in w]
    for a, b in zip(torch.autograd.grad(z, leaves, tokens(3)), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    apart[0][1] = own[0][1].detach().t().contiguous().t()
    assert torch.equal(ck.expert_ffn(x, *apart, where, backend=backend), z)


@TRITON
def test_packed_weights_are_not_copied():
    kernel = importlib.import_module("cogvx_kernels.expert_ffn.kernel")
    packed = normal(4, 3 * FFN_DIM, DIM)[:, FFN_DIM : 2 * FFN_DIM].unbind(0)
    assert all(a is b for a, b in zip(kernel._alike(packed), packed, strict=True))
    unlike = (packed[0], packed[1].t().contiguous().t())
    assert kernel._alike(unlike)[1].is_contiguous()


# --- the feed-forwards of other models ---------------------------------------------------------

FEED_FORWARDS = {  # diffusers' name of the activation, ours
    "Flux, SD3, HunyuanVideo": ("gelu-approximate", "gelu_tanh"),
    "exact GELU": ("gelu", "gelu"),
    "Mochi": ("swiglu", "swiglu"),
}


@BACKENDS
@pytest.mark.parametrize("name", FEED_FORWARDS)
def test_feed_forwards_of_an_mmdit_block(backend, name):
    """Text and image with different weights: one call over the joint sequence."""
    attention = pytest.importorskip("diffusers.models.attention")
    theirs, ours = FEED_FORWARDS[name]
    torch.manual_seed(0)
    halves = [
        attention.FeedForward(DIM, inner_dim=FFN_DIM, activation_fn=theirs).to(device())
        for _ in range(2)
    ]
    x = tokens()
    expected = torch.cat([halves[0](x[:, :TEXT]), halves[1](x[:, TEXT:])], 1)
    ups, downs = [h.net[0].proj for h in halves], [h.net[2] for h in halves]
    y = ck.expert_ffn(
        x, [u.weight for u in ups], [u.bias for u in ups], [d.weight for d in downs],
        [d.bias for d in downs], text_len=TEXT, activation=ours, backend=backend,
    )  # fmt: skip
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-6)
    grads, wanted = (
        torch.autograd.grad(out, [u.weight for u in ups] + [d.bias for d in downs], tokens(4))
        for out in (y, expected)
    )
    for a, b in zip(grads, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@BACKENDS
def test_infinities_in_fp16_are_those_of_torch(backend):
    """Pre-activations of 7e4 overflow fp16 to infinity, and never to a wrong number."""
    x = torch.ones(1, 4, DIM, dtype=torch.float16, device=device())
    up = torch.linspace(0.5, 4, FFN_DIM, device=x.device)[None, :, None].expand(1, -1, DIM).half()
    x = x * torch.tensor([1.0, 100.0, 600.0, -600.0], device=x.device).half()[:, None]
    down = torch.eye(FFN_DIM, device=x.device)[None, :DIM].half()
    y = ck.expert_ffn(x, up, None, down, None, backend=backend)
    hidden = F.gelu(x.float() @ up[0].float().t(), approximate="tanh").half().float()
    assert hidden.isinf().any()
    expected = (hidden @ down[0].float().t()).half()
    assert torch.equal(y.isnan(), expected.isnan()) and torch.equal(y.isinf(), expected.isinf())
    assert y.isnan().any() and y.isfinite().any()


# --- routing -------------------------------------------------------------------------------------


def test_pairs_are_sorted_by_expert_then_token():
    where = torch.tensor([[[2, 0], [-1, 2], [0, 7], [2, 0]]])
    order, ends, *_ = sort_by_expert(where, 3)
    assert order.tolist() == [
        1,
        4,
        7,
        0,
        3,
        6,
        2,
        5,
    ]  # of expert 0, of 2, of none
    assert ends.tolist() == [3, 3, 6, 8]


@pytest.mark.parametrize("count", [2, 254, 300])
def test_pairs_of_many_experts(count):
    where = torch.randint(-1, count + 1, (2, 50, 3), generator=torch.Generator().manual_seed(0))
    order, ends, *_ = sort_by_expert(where, count)
    known = torch.where((where < 0) | (where >= count), count, where).flatten()
    assert torch.equal(order, known.argsort(stable=True))
    assert torch.equal(ends, known.bincount(minlength=count + 1).cumsum(0))


def test_routing_does_not_sync_with_the_device():
    """The meta device has no values to read."""
    order, ends, *_ = sort_by_expert(torch.empty(2, 5, 2, dtype=torch.int64, device="meta"), 4)
    assert order.shape == (20,) and ends.shape == (5,)


def test_one_expert_on_a_gpu_is_left_to_cublas():
    class OnGPU:
        is_cuda = True

    select = sys.modules["cogvx_kernels.expert_ffn.op"]._select_gemm
    assert select("auto", tokens().cpu(), 1, None) == "grouped"  # not on a GPU
    assert [select("auto", OnGPU, n, None) for n in (1, 2)] == ["dense", "grouped"]
    assert select("auto", OnGPU, 1, index(1)) == "grouped"
    assert [select(gemm, OnGPU, 1, None) for gemm in ("dense", "grouped")] == ["dense", "grouped"]
