"""Laws of the others: what stands for diffusers is diffusers', and whoever is timed is right."""

import pytest
import torch
from torch import nn

from cogvx_kernels.testing import OPS, SIZES

from . import inputs
from .check import Law, results_of
from .peers import Unavailable, adaln, ffn, find
from .providers import PROVIDERS, providers_of
from .suite import _near

diffusers = pytest.importorskip("diffusers")

SIZE = SIZES["tiny"]
PEERS = [p for p in PROVIDERS if not p.ours and p.ops and "compile" not in p.name]
CASES = [
    pytest.param(OPS[op], convention, peer, id=f"{peer.name}-{op}-{convention}".replace(" ", "_"))
    for peer in PEERS
    for op in peer.ops
    for convention in inputs.conventions(OPS[op], SIZE)
    if not peer.conventions or convention in peer.conventions
]


def arguments_of(op, dtype=torch.float32, convention=inputs.MODEL):
    sample = inputs.conventions(OPS[op], SIZE)[convention]
    return inputs.make(sample, dtype, "cpu", 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("info", "convention", "peer"), CASES)
def test_peers_are_right(info, convention, peer, dtype):
    arguments = arguments_of(info.name, dtype, convention)
    try:
        function = peer.make(info, arguments)
    except Unavailable as reason:
        pytest.skip(str(reason))
    outputs = info.reference(**arguments)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    douts = inputs.cotangents(outputs, 0) if "backward" in peer.passes else None
    law = Law(info, arguments, douts)
    fresh = arguments_of(info.name, dtype, convention)
    verdicts = law.verdicts(results_of(function, fresh, law, douts))
    assert verdicts and all(v.ok or _near(v, law) for v in verdicts), "\n".join(map(str, verdicts))


def test_steps_of_the_norm_are_diffusers():
    """Bit for bit CogVideoXLayerNormZero, given the modulation that its linear would make."""
    from diffusers.models.normalization import CogVideoXLayerNormZero

    a = arguments_of("expert_adaln")
    text_len = a["text_len"]
    theirs = CogVideoXLayerNormZero(6 * a["x"].shape[2], a["x"].shape[2], eps=1e-5)
    theirs.silu = theirs.linear = nn.Identity()
    theirs.norm.weight, theirs.norm.bias = map(nn.Parameter, (a["weight"], a["bias"]))
    gate = torch.zeros_like(a["shift"])
    names = ("shift", "scale", gate, "text_shift", "text_scale", gate)
    temb = torch.cat([a[name] if isinstance(name, str) else name for name in names], 1)
    video, text, *_ = theirs(a["x"][:, text_len:], a["x"][:, :text_len], temb)
    ours = adaln.DIFFUSERS["expert_adaln"](a)(**a)
    assert torch.equal(ours, torch.cat([text, video], 1))


@pytest.mark.parametrize("grad", [False, True])
def test_steps_of_the_residual_are_the_same_with_a_gradient(grad):
    a = arguments_of("gated_residual")
    with torch.set_grad_enabled(grad):
        out = adaln.DIFFUSERS["gated_residual"](a)(**a)
    video = a["x"] + a["gate"][:, None] * a["y"]
    text = a["x"] + a["text_gate"][:, None] * a["y"]
    is_text = torch.arange(a["x"].shape[1])[None, :, None] < a["text_len"]
    assert torch.equal(out, torch.where(is_text, text, video))


def test_steps_of_one_expert_are_diffusers_feed_forward():
    from diffusers.models.attention import FeedForward

    a = arguments_of("expert_ffn")
    theirs = FeedForward(a["x"].shape[2], activation_fn="gelu-approximate")
    names = ("up", "up_bias", "down", "down_bias")
    theirs.load_state_dict(
        dict(zip(theirs.state_dict(), (a[name][0] for name in names), strict=True))
    )
    assert torch.equal(ffn.split_cat(a)(**a), theirs(a["x"]))


def test_nobody_has_two_rows():
    for info in OPS.values():
        names = [provider.name for provider in providers_of(info)]
        assert len(names) == len(set(names)), info


def test_what_does_not_import_says_so():
    with pytest.raises(Unavailable, match="nobody does not import .ModuleNotFoundError"):
        find("nobody", ("nobody_has_this_package", "name"))


@pytest.mark.filterwarnings("default")  # of a compiler, on its own code
def test_each_compiled_module_is_compiled_for_itself(monkeypatch):
    """Or the one with another order of attention would be handed the other's code."""
    from torch._inductor import compile_fx

    from . import parts

    seen = []
    monkeypatch.setattr(compile_fx, "compile_fx", lambda graph, inputs: seen.append(1) or graph)
    torch.compiler.reset()
    module, x = nn.Linear(4, 4), torch.ones(2, 4)
    first, second = parts.compiled(module), parts.compiled(module)
    for call in (first, second, first, second):
        call(x)
    assert len(seen) == 2
