"""`patch`: the same results, at every site of the model."""

import pytest
import torch
from diffusers import CogVideoXFunControlPipeline
from torch import nn

import cogvx_kernels as ck
from cogvx_kernels.patching import cogvideox_transformer
from tests.model.tiny_pipeline import KINDS
from tests.patching.small import (
    NEAR,
    clip,
    double,
    generate,
    inputs,
    latents,
    pipeline,
    relative,
    small_vae,
    transformer,
    vae,
)

EXACT_VAE_OPS = (["cache"], ["resample"], ["conv"], ["cache", "resample", "conv"])
VAE_OPS = (["norm"], ["vae"])
TRANSFORMER_OPS = (["adaln"], ["rope"], ["transformer"])


def assert_near(ours, theirs, fp64):
    """Within the rule of matrix products: twice the error of the model's own forward."""
    for mine, other, true in zip(ours, theirs, fp64, strict=True):
        assert relative(mine, true) <= 2 * relative(other, true) + 1e-7


# --- the same results ------------------------------------------------------------------------


@pytest.mark.parametrize("only", EXACT_VAE_OPS, ids="+".join)
@pytest.mark.parametrize("frames", [1, 2, 3, 4, 7])
def test_exact_ops_in_decode_bitwise(only, frames):
    model = vae()
    with torch.no_grad():
        wanted = model.decode(latents(frames)).sample
        with ck.patched(model, only):
            assert torch.equal(model.decode(latents(frames)).sample, wanted)


@pytest.mark.parametrize("only", EXACT_VAE_OPS, ids="+".join)
@pytest.mark.parametrize("frames", [1, 8, 9, 17])
def test_exact_ops_in_encode_bitwise(only, frames):
    model = vae()
    with torch.no_grad():
        wanted = model.encode(clip(frames)).latent_dist.parameters
        with ck.patched(model, only):
            assert torch.equal(model.encode(clip(frames)).latent_dist.parameters, wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mode", ["exact", "fast"])
@pytest.mark.parametrize("only", VAE_OPS, ids="+".join)
def test_vae_error(only, mode, dtype):
    model = vae().to(dtype)
    x, z = clip(9).to(dtype), latents(5).to(dtype)

    def both(model, x, z):
        return model.encode(x).latent_dist.parameters, model.decode(z).sample

    with torch.no_grad():
        fp64 = both(double(model), x.double(), z.double())
        theirs = both(model, x, z)
        with ck.patched(model, only, mode):
            assert_near(both(model, x, z), theirs, fp64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mode", ["exact", "fast"])
@pytest.mark.parametrize("only", TRANSFORMER_OPS, ids="+".join)
@pytest.mark.parametrize("kind", KINDS)
def test_transformer_error(kind, only, mode, dtype):
    model = transformer(kind).to(dtype)
    arguments = inputs(model, dtype=dtype)
    wide = {
        name: x.double() if name not in ("image_rotary_emb", "timestep") else x
        for name, x in arguments.items()
    }
    with torch.no_grad():
        fp64 = double(model)(**wide).sample
        theirs = model(**arguments).sample
        with ck.patched(model, only, mode):
            assert_near([model(**arguments).sample], [theirs], [fp64])


@pytest.mark.parametrize(("kind", "mode"), [("2b", "text"), ("5b", "video"), ("1.5-i2v", "image")])
def test_pipeline_generates_the_same_video(kind, mode):
    pipe = pipeline(kind, mode)
    wanted = generate(pipe, mode)
    with ck.patched(pipe) as report:
        found = generate(pipe, mode)
    assert (found - wanted).abs().max() < 2e-5
    assert all(row.hit for row in report.rows)
    assert torch.equal(generate(pipe, mode), wanted)


def test_control_pipeline_generates_the_same_video():
    image = pipeline("5b-i2v", "image")
    pipe = CogVideoXFunControlPipeline(None, None, image.vae, image.transformer, image.scheduler)
    pipe.set_progress_bar_config(disable=True)
    wanted = generate(pipe, "control")
    ck.patch(pipe)
    assert (generate(pipe, "control") - wanted).abs().max() < 2e-5


@pytest.mark.parametrize("mode", ["exact", "fast"])
def test_gradients_equal_the_models(mode):
    """Gradients of a decode in chunks and of a transformer, to inputs and to every weight."""
    for model, run in ((vae(), _decoded), (transformer(), _predicted)):
        wide = double(model)
        fp64, theirs = run(wide), run(model)
        with ck.patched(model, mode=mode) as report:
            ours = run(model)
        assert all(row.hit for row in report.rows)
        norm = sum(float(x.double().square().sum()) for x in fp64) ** 0.5
        for mine, other, true in zip(ours, theirs, fp64, strict=True):
            error, limit = (float((x.double() - true).norm()) for x in (mine, other))
            assert error <= 2 * limit + 1e-6 * norm


def _decoded(model):
    z = latents(5).to(model.dtype).requires_grad_()
    model.decode(z).sample.square().mean().backward()
    return _gradients(model.decoder, z)


def _predicted(model):
    arguments = inputs(model)
    arguments = {
        n: x.to(model.dtype) if isinstance(x, torch.Tensor) and x.is_floating_point() else x
        for n, x in arguments.items()
    }
    x = arguments["hidden_states"].requires_grad_()
    model(**arguments).sample.square().mean().backward()
    return _gradients(model, x)


def _gradients(model, x):
    found = [x.grad, *(p.grad for p in model.parameters())]
    model.zero_grad()
    assert all(g is not None for g in found)
    return found


def test_on_the_kernels_too():
    """In Triton's interpreter, where there is no GPU: a step, and a decode with its cache."""
    pipe = pipeline()
    pipe.vae = small_vae()
    arguments, z = inputs(pipe.transformer, batch=1), latents(3, side=2)
    with torch.no_grad():
        fp64 = double(pipe.vae).decode(z.double()).sample
        theirs = pipe.vae.decode(z).sample
        predicted = pipe.transformer(**arguments).sample
        report = ck.patch(pipe, backend="kernel")
        assert_near([pipe.vae.decode(z).sample], [theirs], [fp64])
        assert relative(pipe.transformer(**arguments).sample, predicted.double()) < 1e-5
    assert report["rope"].hit == report["rope"].sites
    assert not any(row.fallbacks for row in report.rows)
    for op in ("adaln", "rope", "norm"):
        assert report[op].kernel == report[op].calls > 0 and not report[op].reference
    assert "kernel 2, reference 0" in str(report)


# --- every site is hit -----------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["exact", "fast"])
def test_every_op_runs_at_every_site(mode):
    pipe = pipeline()
    report = ck.patch(pipe, mode=mode)
    with torch.no_grad():
        pipe.vae(clip(9))
        pipe.transformer(**inputs(pipe.transformer))
    assert {row.op for row in report.rows} == {"adaln", "rope", "cache", "norm", "resample", "conv"}
    for row in report.rows:
        assert row.hit == row.sites > 0, row
        assert not row.fallbacks, row
    layers, causal = 2, sum(type(m).__name__ == "CogVideoXCausalConv3d" for m in pipe.vae.modules())
    assert (report["adaln"].sites, report["rope"].sites) == (2 * layers, layers)
    of_norms = 2 * sum(type(m).__name__ == "CogVideoXSpatialNorm3D" for m in pipe.vae.modules())
    assert report["cache"].sites == causal - of_norms
    assert f"adaln      {2 * layers} calls in {layers} of {layers} modules: kernel 0" in str(report)
    assert "mode" in str(report) and mode in str(report)


def test_report_lists_calls_reasons_and_uncalled_modules():
    pipe = pipeline()
    report = ck.patch(pipe, backend="reference")
    assert "rope       in 2 modules, not called yet" in str(report)
    with torch.no_grad():
        pipe.vae.decode(latents(3, side=2))
        pipe.transformer(**inputs(pipe.transformer))
    why = 'backend="reference" was requested'
    assert report["rope"].reference == {why: 2} and report["rope"].kernel == 0
    assert report["rope"].not_called == ()
    assert report["resample"].reference == {"it is plain torch, and has no kernel": 3}
    cache, text = report["cache"], str(report)
    assert {name.partition(".")[0] for name in cache.not_called} == {"encoder"}
    assert cache.calls == sum(cache.reference.values())
    called, unused = cache.modules - len(cache.not_called), len(cache.not_called)
    assert (
        f"cache      {cache.calls} calls in {called} of {cache.modules} modules: kernel 0" in text
    )
    assert f"not called: {unused} of {unused} modules in encoder" in text
    assert f"rope       2 calls in 2 of 2 modules: kernel 0, reference 2\n{'':15}reference" in text
    assert f"reference, 2 calls: {why}" in text and "sites" not in text


def test_report_has_the_reason_for_the_reference():
    model = transformer()
    report = ck.patch(model)
    with torch.no_grad():
        model(**inputs(model))
    [why] = report["adaln"].reference
    assert report["adaln"].reference[why] == report["adaln"].calls == 4
    assert f"reference, 4 calls: {why}" in str(report)


def test_counts_accumulate():
    model = transformer()
    report = ck.patch(model)
    for calls in (1, 2, 3):
        with torch.no_grad():
            model(**inputs(model))
        assert report["rope"].calls == ck.explain(model)["rope"].calls == 2 * calls


def test_unsupported_calls_fall_back_with_a_reason():
    model = transformer()

    class MyLayerNorm(nn.LayerNorm):
        pass

    block = model.transformer_blocks[1]
    block.norm1.norm.__class__ = MyLayerNorm
    block.attn1.norm_q.register_forward_hook(lambda *of: None)
    with torch.no_grad():
        wanted = model(**inputs(model)).sample
        report = ck.patch(model)
        found = model(**inputs(model)).sample
    assert torch.allclose(found, wanted, atol=1e-5)
    assert report["adaln"].fallbacks == {"a LayerNorm is a MyLayerNorm": 1}
    assert report["rope"].fallbacks == {"a LayerNorm has hooks": 1}
    assert (report["adaln"].hit, report["rope"].hit) == (2, 1)
    assert "model's own forward, 1 call: a LayerNorm is a MyLayerNorm" in str(report)


def test_another_processor_falls_back():
    model = transformer()

    class MyProcessor:
        def __call__(
            self, attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb
        ):
            return hidden_states * 2, encoder_hidden_states * 3

    model.set_attn_processor(MyProcessor())
    with torch.no_grad():
        wanted = model(**inputs(model)).sample
        report = ck.patch(model)
        assert torch.allclose(model(**inputs(model)).sample, wanted, atol=1e-5)
    assert report["rope"].fallbacks == {"its processor is a MyProcessor": 2}


def test_tables_that_differ_within_a_pair_fall_back():
    model = transformer()
    arguments = inputs(model)
    cos, sin = arguments["image_rotary_emb"]
    arguments["image_rotary_emb"] = (cos + torch.arange(cos.shape[1]) % 2, sin)
    with torch.no_grad():
        wanted = model(**arguments).sample
        report = ck.patch(model)
        assert torch.allclose(model(**arguments).sample, wanted, atol=1e-5)
    assert list(report["rope"].fallbacks) == [
        "image_rotary_emb turns the two dims of a pair by different angles"
    ]


def test_tables_written_in_place_are_converted_again():
    model = transformer()
    arguments = inputs(model)
    cos, sin = arguments["image_rotary_emb"]
    with torch.no_grad(), ck.patched(model):
        model(**arguments)
        sin.neg_()
        found = model(**arguments).sample
    with torch.no_grad():
        assert torch.allclose(found, model(**arguments).sample, atol=1e-5)


def test_two_live_tables_are_distinguished():
    """Tables of another size, or of the same size with other values, by turns."""
    model = transformer()
    calls = [inputs(model), inputs(model, frames=5), inputs(model)]
    calls[2]["image_rotary_emb"] = tuple(-x for x in calls[2]["image_rotary_emb"])
    with torch.no_grad():
        wanted = [model(**arguments).sample for arguments in calls]
        ck.patch(model)
        for _ in range(2):
            for arguments, right in zip(calls, wanted, strict=True):
                assert relative(model(**arguments).sample, right.double()) < NEAR


def test_inference_tables_are_not_cached(monkeypatch):
    """And are converted once for each attention."""
    model, made = transformer(), []
    pairs = cogvideox_transformer.pair_tables
    monkeypatch.setattr(
        cogvideox_transformer, "pair_tables", lambda *x: made.append(1) or pairs(*x)
    )
    with torch.inference_mode():
        arguments = inputs(model)
        cos, sin = arguments["image_rotary_emb"]
        assert cos.is_inference()
        with ck.patched(model):
            model(**arguments)
            sin.neg_()
            found = model(**arguments).sample
        assert len(made) == 2 * len(model.transformer_blocks)
        assert torch.allclose(found, model(**arguments).sample, atol=1e-5)


def test_tables_converted_in_inference_mode_work_in_training():
    model = transformer()
    arguments = inputs(model)
    ck.patch(model)
    with torch.inference_mode():
        model(**arguments)
    model(**arguments).sample.sum().backward()
    assert all(p.grad is not None for p in model.transformer_blocks.parameters())


def test_tables_that_require_grad_fall_back():
    model = transformer()
    arguments = inputs(model)
    cos, sin = arguments["image_rotary_emb"]
    arguments["image_rotary_emb"] = (cos.requires_grad_(), sin)
    attn, (x, text) = model.transformer_blocks[0].attn1, torch.randn(2, 2, 12, 32).unbind()
    report = ck.patch(model, ["rope"])
    attn(x, text[:, :7], image_rotary_emb=(cos, sin))
    assert report["rope"].fallbacks == {"image_rotary_emb requires a gradient": 1}
