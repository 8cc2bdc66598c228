"""Properties of `expert_ffn`, and its GEMM backends."""

import importlib
import sys
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import cogvx_kernels as ck
from cogvx_kernels import _backend
from cogvx_kernels.expert_ffn.routing import sort_by_expert
from cogvx_kernels.testing import OPS, compare, evaluate, materialize

BATCH, TEXT, VIDEO, DIM, FFN_DIM = 2, 3, 9, 32, 48
SEQLEN = TEXT + VIDEO
TRITON = pytest.mark.skipif(not _backend.HAS_TRITON, reason="Triton is not installed")
BACKENDS = pytest.mark.parametrize("backend", ["reference", pytest.param("kernel", marks=TRITON)])


def device():
    return "cpu" if _backend.INTERPRETED or not torch.cuda.is_available() else "cuda"


def normal(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(device())


def tokens(seed=0):
    return normal(BATCH, SEQLEN, DIM, seed=seed)


def experts(count, seed=1):
    """up, up_bias, down, down_bias of so many experts."""
    return (
        normal(count, FFN_DIM, DIM, seed=seed) / DIM**0.5,
        normal(count, FFN_DIM, seed=seed + 1),
        normal(count, DIM, FFN_DIM, seed=seed + 2) / FFN_DIM**0.5,
        normal(count, DIM, seed=seed + 3),
    )


def index(count, top_k=1, seed=7):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(count, (BATCH, SEQLEN, top_k), generator=generator).to(device())


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
    arguments = materialize(FFN.samples[0], torch.bfloat16, device=device())
    for name in FFN.differentiable:
        arguments[name].requires_grad_()
    kept, again = (FFN.op(**arguments, recompute=r, backend="kernel") for r in (False, True))
    assert torch.equal(kept, again)


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


@BACKENDS
def test_module_equals_the_function(backend):
    with ck.module_backend(backend):
        module = ck.ExpertFFN(DIM, FFN_DIM, 2).to(device())
    assert list(module.state_dict()) == ["up", "down", "up_bias", "down_bias"]
    own = module.up, module.up_bias, module.down, module.down_bias
    x = tokens()
    expected = ck.expert_ffn(x, *own, text_len=TEXT, backend=backend)
    assert torch.equal(module(x, text_len=TEXT), expected)
    where, weight = index(2), normal(BATCH, SEQLEN, 1)
    expected = ck.expert_ffn(x, *own, where, weight, backend=backend)
    assert torch.equal(module(x, where, weight), expected)
    linear = nn.Linear(DIM, FFN_DIM)
    assert module.up.abs().max() <= 1 / DIM**0.5 and linear.weight.abs().max() <= 1 / DIM**0.5


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


WRONG = {
    "three experts and no index": (lambda: (*experts(3), None), "index must say which of the 3"),
    "weights without an index": (
        lambda: (*experts(2), None, torch.ones(BATCH, SEQLEN, 1)),
        "weight must be None without an index",
    ),
    "no experts": (lambda: ([], None, [], None), "up must be a tensor .* or a sequence"),
    "unlike numbers of experts": (
        lambda: (experts(2)[0], None, experts(1)[2], None),
        "down must hold one tensor for each of the 2 experts",
    ),
    "an index of tokens alone": (
        lambda: (*experts(2), torch.zeros(BATCH, SEQLEN, dtype=torch.int64)),
        r"index must be \(batch, seqlen, top_k\)",
    ),
    "a boolean index": (
        lambda: (*experts(2), torch.zeros(BATCH, SEQLEN, 1, dtype=torch.bool)),
        "index must be an int32 or int64 tensor",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_arguments(case):
    make, message = WRONG[case]
    arguments = [x.cpu() if torch.is_tensor(x) else x for x in make()]
    with pytest.raises((TypeError, ValueError), match=f"expert_ffn: {message}"):
        ck.expert_ffn(tokens().cpu(), *arguments, text_len=TEXT)


def test_dense_has_no_index():
    with pytest.raises(ValueError, match='expert_ffn: gemm must be "grouped" or "auto" with an in'):
        ck.expert_ffn(tokens(), *experts(2), index(2), gemm="dense")


def test_swiglu_needs_an_even_number_of_rows():
    up, bias, down, down_bias = experts(1)
    with pytest.raises(ValueError, match='up must have an even number of rows for activation="swi'):
        ck.expert_ffn(tokens(), up[:, :-1], bias[:, :-1], down, down_bias, activation="swiglu")


def linears(bias=True, rows=FFN_DIM, dtype=torch.float32):
    up, down = nn.Linear(DIM, rows, bias, dtype=dtype), nn.Linear(FFN_DIM, DIM, bias, dtype=dtype)
    return up.to(device()), down.to(device())


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("activation", ["gelu_tanh", "swiglu"])
@pytest.mark.parametrize("count", [1, 2])
def test_from_linears_equals_the_linears(count, activation, bias):
    """With copies of the weights, so that training changes the module alone."""
    rows = 2 * FFN_DIM if activation == "swiglu" else FFN_DIM
    pairs = [linears(bias, rows) for _ in range(count)]
    for layer in pairs[0]:
        layer.weight.requires_grad_(False)  # all experts have one parameter
    with ck.module_backend("reference"):
        module = ck.ExpertFFN.from_linears(pairs, activation)
    x = tokens()
    parts = x.split([TEXT, VIDEO], 1) if count == 2 else [x]
    expected = []
    for (up, down), part in zip(pairs, parts, strict=True):
        hidden = up(part)
        if activation == "swiglu":
            values, gates = hidden.chunk(2, -1)
            hidden = values * F.silu(gates)
        else:
            hidden = F.gelu(hidden, approximate="tanh")
        expected.append(down(hidden))
    expected = torch.cat(expected, 1)
    ours = module(x, text_len=TEXT)
    torch.testing.assert_close(ours, expected)
    assert module.up.requires_grad is (count == 2)
    assert (module.up_bias is not None) is bias and len(module.up) == count
    assert module.up.data_ptr() != pairs[0][0].weight.data_ptr()


class Scaled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def hooked():
    layer = nn.Linear(FFN_DIM, DIM)
    layer.register_forward_hook(lambda *_: None)
    return layer


@pytest.mark.parametrize(
    ("second", "error", "message"),
    [
        (lambda: (linears()[0], nn.Linear(FFN_DIM, DIM + 1)), ValueError,
         r"the weight of down of pairs\[1\] must be \(out, in\) = \(32, 48\) .*; got \(33, 48\)"),
        (lambda: linears(rows=FFN_DIM + 2), ValueError, r"the weight of up of pairs\[1\] must be"),
        (lambda: linears(bias=False), ValueError, r"got up of pairs\[1\] with no bias"),
        (lambda: linears(dtype=torch.bfloat16), TypeError, r"must be float32; got bfloat16"),
        (lambda: [x.to("meta") for x in linears()], ValueError, r"must be on the device of up of"),
        (lambda: linears()[:1], TypeError, r"pairs\[1\] must be two layers, \(up, down\)"),
        (lambda: linears()[0], TypeError, r"pairs\[1\] must be two layers"),
        (lambda: (Scaled(DIM, FFN_DIM), linears()[1]), TypeError, r"up of pairs.1. .*; got Scaled"),
        (lambda: (linears()[0], hooked()), TypeError, r"down of pairs.1. must be an nn.Linear"),
    ],
)  # fmt: skip
def test_from_linears_refuses_unequal_layers(second, error, message):
    with pytest.raises(error, match="ExpertFFN.from_linears: .*" + message):
        ck.ExpertFFN.from_linears([linears(), second()])


def test_from_linears_refuses_no_experts_and_odd_gates():
    with pytest.raises(TypeError, match="pairs must be a sequence of .* got \\[\\]"):
        ck.ExpertFFN.from_linears([])
    with pytest.raises(ValueError, match="up of pairs.0. must have an even number of rows.*got 47"):
        ck.ExpertFFN.from_linears([linears(rows=47)], "swiglu")
