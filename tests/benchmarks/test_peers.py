"""Peers compute the op, and the steps that stand for diffusers are diffusers'."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from benchmarks import inputs, model
from benchmarks.ops import close_enough
from benchmarks.oracle import Oracle, results_of
from benchmarks.registry import MODEL, PROVIDERS, Unavailable, find, providers_of
from cogvx_kernels.testing import OPS, SIZES, as_tuple

diffusers = pytest.importorskip("diffusers")

SIZE = SIZES["tiny"]
# 16 x 32 pixels for videos, of which every other test would take a second
SMALL = replace(SIZE, height=1, width=2)
PEERS = [p for p in PROVIDERS if not p.ours and p.ops and "compile" not in p.name]
CASES = [
    pytest.param(OPS[op], convention, peer, id=f"{peer.name}-{op}-{convention}".replace(" ", "_"))
    for peer in PEERS
    for op in peer.ops
    for convention in inputs.conventions(OPS[op], SMALL)
    if not peer.conventions or convention in peer.conventions
]


def arguments_of(op, dtype=torch.float32, convention=MODEL):
    size = SMALL if OPS[op].videos else SIZE
    sample = inputs.conventions(OPS[op], size)[convention]
    return inputs.make(sample, dtype, "cpu", 0)


def made(name, op, arguments):
    """The function that a provider makes of an op's arguments."""
    (provider,) = (p for p in providers_of(OPS[op]) if p.name == name)
    return provider.make(OPS[op], arguments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("info", "convention", "peer"), CASES)
def test_peers_are_right(info, convention, peer, dtype):
    arguments = arguments_of(info.name, dtype, convention)
    try:
        function = peer.make(info, arguments)
    except Unavailable as reason:
        pytest.skip(str(reason))
    outputs = as_tuple(info.reference(**arguments))
    back = inputs.grad_outputs_like(outputs, 0) if "backward" in peer.passes else None
    oracle = Oracle(info, arguments, back)
    fresh = arguments_of(info.name, dtype, convention)
    found = oracle.compare(results_of(function, fresh, oracle, back))
    assert found and all(close_enough(x, oracle) for x in found), "\n".join(map(str, found))


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
    ours = made("diffusers-eager", "expert_adaln", a)(**a)
    assert torch.equal(ours, torch.cat([text, video], 1))


@pytest.mark.parametrize("grad", [False, True])
def test_steps_of_the_residual_are_the_same_with_a_gradient(grad):
    a = arguments_of("gated_residual")
    with torch.set_grad_enabled(grad):
        out = made("diffusers-eager", "gated_residual", a)(**a)
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
    assert torch.equal(made("split-cat", "expert_ffn", a)(**a), theirs(a["x"]))


@pytest.mark.parametrize("frames", [1, 4, 5])
def test_steps_of_a_spatial_norm_are_diffusers(frames):
    """CogVideoXSpatialNorm3D and SiLU, given the maps that its convolutions would make."""
    from diffusers.models.autoencoders.autoencoder_kl_cogvideox import CogVideoXSpatialNorm3D

    theirs = CogVideoXSpatialNorm3D(8, 3, groups=2)
    x, latents = torch.randn(2, 8, frames, 4, 6), torch.randn(2, 3, -(-frames // 2), 2, 3)
    for parameter in theirs.parameters():
        nn.init.normal_(parameter)
    weight, bias = theirs.norm_layer.weight, theirs.norm_layer.bias
    y, b = (conv(latents)[0] for conv in (theirs.conv_y, theirs.conv_b))
    a = {"x": x, "weight": weight, "bias": bias, "y": y, "b": b}
    ours = made("diffusers-eager", "spatial_norm_silu", a)
    out = ours(**a, num_groups=2, eps=1e-6, leads=frames % 2 == 1, silu=True)
    torch.testing.assert_close(out, F.silu(theirs(x, latents)[0]), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("start", [None, "replicate", "zeros"])
@pytest.mark.parametrize("stride", [1, 2])
def test_steps_of_a_temporal_convolution_follow_every_option(stride, start):
    info = OPS["temporal_conv"]
    x, weight = torch.randn(2, 4, 5, 3, 2), torch.randn(4, 1, 3)
    cache = torch.randn(2, 4, 2, 3, 2) if start is None else None
    a = {"x": x, "weight": weight, "bias": torch.randn(4), "cache": cache}
    options = {"stride": stride, "start": start}
    ours = made("torch-steps", "temporal_conv", a)(**a, **options)
    torch.testing.assert_close(ours, info.reference(**a, **options))


def test_peers_refuse_other_calls():
    a = arguments_of("spatial_norm_silu")
    cache = a["x"][:, :, :2]
    for changed in ({"per_frame": True}, {"moments": torch.zeros(1)}, {"cache": cache}):
        with pytest.raises(Unavailable):
            made("diffusers-eager", "spatial_norm_silu", {**a, **changed})
    for name in ("liger", "sglang", "vllm-omni"):
        with pytest.raises(Unavailable, match="knows nothing of latents"):
            made(name, "spatial_norm_silu", a)
        with pytest.raises(Unavailable, match="do not run on a CPU"):
            made(name, "spatial_norm_silu", {**a, "y": None, "b": None, "offset": None})


def test_names_of_providers_are_unique():
    for info in OPS.values():
        names = [provider.name for provider in providers_of(info)]
        assert len(names) == len(set(names)), info


def test_missing_library_is_unavailable():
    with pytest.raises(Unavailable, match="nobody does not import .ModuleNotFoundError"):
        find("nobody", "name", "nobody_has_this_package")


@pytest.mark.filterwarnings("default")  # of a compiler, on its own code
def test_compiled_modules_share_no_code(monkeypatch):
    """Or the one with another order of attention would be handed the other's code."""
    from torch._inductor import compile_fx

    seen = []
    monkeypatch.setattr(compile_fx, "compile_fx", lambda graph, inputs: seen.append(1) or graph)
    torch.compiler.reset()
    module, x = nn.Linear(4, 4), torch.ones(2, 4)
    first, second = model.compiled(module), model.compiled(module)
    for call in (first, second, first, second):
        call(x)
    assert len(seen) == 2
