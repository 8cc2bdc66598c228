"""Joint attention, whoever computes it."""

import importlib.machinery
import math
import sys
import types

import pytest
import torch
from torch import nn

from cogvx.config import TransformerConfig
from cogvx.memory import LiveBytes
from cogvx.transformer import ATTENTION_BACKENDS, ExpertTransformer
from cogvx.transformer.attention import JointAttention, attend
from cogvx_kernels import _backend, module_backend, rope3d_tables, slice_positions, split_headdim

ON_CPU = ["auto", "flash", "math"]


def plain(q, k, v):
    """The definition, head by head."""
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(q.shape[-1])
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v)


@pytest.mark.parametrize("headdim", [40, 64])
@pytest.mark.parametrize("attention", ON_CPU)
def test_every_backend_is_softmax_attention(attention, headdim):
    q, k, v = torch.randn(3, 2, 19, 3, headdim, dtype=torch.float64)
    got = attend(q, k, v, attention)
    assert got.shape == q.shape
    torch.testing.assert_close(got, plain(q, k, v), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_on_a_cpu_training_under_autocast_attends_in_float32(dtype):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 19, 3, 32, dtype=dtype, requires_grad=True) for _ in range(3))
    wide = [x.detach().float().requires_grad_() for x in (q, k, v)]
    with torch.autocast("cpu", dtype):
        out = attend(q, k, v)
    want = attend(*wide)
    assert out.dtype == dtype and torch.equal(out, want.to(dtype))
    out.float().square().sum().backward()
    want.to(dtype).float().square().sum().backward()
    for x, w in zip((q, k, v), wide, strict=True):
        assert torch.equal(x.grad, w.grad.to(dtype))
    with torch.no_grad():  # what is not trained is left to torch
        assert attend(q, k, v).dtype == dtype


@pytest.mark.parametrize("attention", ["cudnn", "efficient", "flash-attn"])
def test_a_backend_by_name_runs_or_says_why_not(attention, monkeypatch):
    package = types.ModuleType("flash_attn")
    package.__spec__ = importlib.machinery.ModuleSpec("flash_attn", None)
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    q, k, v = torch.randn(3, 1, 5, 2, 16)
    wanted = f'^attention="{attention}" cannot run: .*cpu.*Use attention="auto"'
    with pytest.raises(RuntimeError, match=wanted):
        attend(q, k, v, attention)


def test_flash_attn_is_optional(monkeypatch):
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match=r"flash_attn is not installed \(pip install flash-attn"):
        ExpertTransformer(TransformerConfig(num_layers=1), attention="flash-attn")


def test_names_of_the_backends():
    assert ATTENTION_BACKENDS == ("auto", "flash", "cudnn", "efficient", "math", "flash-attn")


@pytest.mark.parametrize("headdim", [40, 64])
def test_joint_attention_is_what_it_says(headdim):
    """Written out: project, normalise each head, turn the video, attend, project."""
    nheads, text_len, grid = 2, 3, (2, 1, 3)
    with module_backend("reference"):
        layer = JointAttention(nheads * headdim, nheads).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    cos, sin = rope3d_tables(slice_positions(grid), split_headdim(headdim))
    x = torch.randn(2, text_len + math.prod(grid), nheads * headdim, dtype=torch.float64)

    def heads(projection, norm=None):
        y = projection(x).unflatten(2, (nheads, headdim))
        if norm is None:
            return y
        y = nn.functional.layer_norm(y, (headdim,), norm.weight, norm.bias, 1e-6)
        pairs = torch.view_as_complex(y[:, text_len:].unflatten(3, (-1, 2)).contiguous())
        turned = pairs * torch.complex(cos.double(), sin.double())[:, None]
        return torch.cat([y[:, :text_len], torch.view_as_real(turned).flatten(3)], 1)

    q, k, v = heads(layer.to_q, layer.norm_q), heads(layer.to_k, layer.norm_k), heads(layer.to_v)
    wanted = layer.to_out[0](plain(q, k, v).flatten(2))
    torch.testing.assert_close(layer(x, cos, sin), wanted, rtol=1e-12, atol=1e-12)
    with torch.no_grad():  # where q and k are overwritten
        torch.testing.assert_close(layer(x, cos, sin), wanted, rtol=1e-12, atol=1e-12)


def test_without_tables_nothing_turns():
    with module_backend("reference"):
        layer = JointAttention(32, 2)
    x = torch.randn(1, 7, 32)
    none, still = torch.zeros(0, 8), (torch.ones(7, 8), torch.zeros(7, 8))
    assert torch.equal(layer(x, none, none), layer(x, *still))


@pytest.mark.parametrize("attention", ATTENTION_BACKENDS)
def test_meta_attention_has_a_shape_and_no_square(attention):
    seqlen, nheads, headdim = 20_000, 3, 40
    q, k, v = (
        torch.empty(1, seqlen, nheads, headdim, device="meta", requires_grad=True) for _ in "qkv"
    )
    with LiveBytes() as live:
        out = attend(q, k, v, attention)
        assert out.shape == q.shape and out.device.type == "meta"
        assert live.peak < 4 * out.nbytes
        out.sum().backward()
        assert live.peak < 10 * out.nbytes  # seqlen² would be 500 times as much
    assert all(x.grad.shape == x.shape for x in (q, k, v))


def tiny(**options):
    return TransformerConfig(
        num_attention_heads=2,
        attention_head_dim=options.pop("attention_head_dim", 16),
        in_channels=4,
        out_channels=4,
        time_embed_dim=6,
        text_embed_dim=10,
        num_layers=options.pop("num_layers", 2),
        sample_height=4,
        sample_width=6,
        sample_frames=5,
        max_text_seq_length=5,
        use_rotary_positional_embeddings=True,
        **options,
    )


def shaken(model):
    """With weights that are not what training begins with, among which many are zero."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("options", [{"attention_head_dim": 40}, {"patch_size_t": 2}])
def test_kernel_and_reference_agree(options, device):
    """Forward, and the gradient of every parameter, in fp32."""
    if not _backend.HAS_TRITON:
        pytest.skip("needs Triton")
    weights = shaken(ExpertTransformer(tiny(**options))).state_dict()
    latents = torch.randn(2, 2, 4, 4, 6, device=device)
    text, timestep = torch.randn(2, 5, 10, device=device), torch.tensor([999, 37], device=device)
    outputs, grads = [], []
    for backend in ("reference", "kernel"):
        with module_backend(backend):
            model = ExpertTransformer(tiny(**options)).to(device)
        model.load_state_dict(weights)
        output = model(latents, text, timestep)
        output.square().sum().backward()
        outputs.append(output.detach())
        grads.append({name: p.grad for name, p in model.named_parameters()})
    # Each rounds its row of a head differently, a few ulps of fp32; two layers add to them.
    assert (outputs[1] - outputs[0]).norm() <= 1e-5 * outputs[0].norm()
    for name, wanted in grads[0].items():
        assert (grads[1][name] - wanted).norm() <= 1e-5 * wanted.norm(), name


def test_compiles_to_one_graph():
    torch._dynamo.reset()
    config = tiny(num_layers=1, patch_size_t=2, num_text_experts=1, num_video_experts=1)
    with module_backend("reference"):
        model = shaken(ExpertTransformer(config, "math"))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    arguments = torch.randn(2, 2, 4, 4, 6), torch.randn(2, 5, 10), torch.tensor([9, 1])
    wanted, got = model(*arguments), compiled(*arguments)
    assert torch.equal(got, wanted)
    wanted_grads, got_grads = (
        torch.autograd.grad(x.square().sum(), list(model.parameters())) for x in (wanted, got)
    )
    for got_grad, wanted_grad in zip(got_grads, wanted_grads, strict=True):
        # The compiler sums in an order of its own.
        torch.testing.assert_close(got_grad, wanted_grad, rtol=1e-4, atol=1e-5)
    latents = torch.randn(2, 4, 4, 4, 4)  # now the compiler makes sizes dynamic, if it can
    with torch.no_grad():
        assert torch.equal(compiled(latents, *arguments[1:]), model(latents, *arguments[1:]))
    torch._dynamo.reset()
