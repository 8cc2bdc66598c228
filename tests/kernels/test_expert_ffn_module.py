"""The module `ExpertFFN`, and arguments that `expert_ffn` and the module refuse."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import cogvx_kernels as ck

from .feed_forwards import (
    BACKENDS,
    BATCH,
    DIM,
    FFN_DIM,
    SEQLEN,
    TEXT,
    VIDEO,
    device,
    experts,
    index,
    normal,
    tokens,
)


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
