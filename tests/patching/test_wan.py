"""Wan 2.1 and 2.2, patched: the same model, and the same one again after `unpatch`.

diffusers' WanTransformer3DModel, WanVACETransformer3DModel and AutoencoderKLWan.
"""

import copy
import types

import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d, WanUpsample
from torch.nn import functional as F

from cogvx_kernels.patching import explain, patch, patched, unpatch
from tests.patching.wan import (
    LAYERS,
    assert_all_err_no_more,
    assert_all_hit,
    assert_errs_no_more,
    clip,
    conv,
    gradients,
    gradients_and_sample,
    in_fp64,
    latents,
    run,
    there_and_back,
    tokens,
    traces,
    transformer,
    vace,
    vae,
    wide,
)

MODELS = pytest.mark.parametrize(
    ("dtype", "kept"),
    [(torch.float32, True), (torch.bfloat16, True), (torch.bfloat16, False)],
    ids=["fp32", "bf16", "all_bf16"],
)
PER_TOKEN = pytest.mark.parametrize("per_token", [False, True], ids=["sample", "token"])
# Of the kernels on a CPU: Triton's by its interpreter, in fp32, and the extension's own.
BACKENDS = pytest.mark.parametrize("backend", ["auto", "kernel"])
RESIDUAL = pytest.mark.parametrize("residual", [False, True], ids=["2.1", "2.2"])


# --- the report ------------------------------------------------------------------------------


def test_report_has_rows_of_two_transformers():
    """As in a pipeline of Wan 2.2."""
    parts = {"transformer": transformer(), "transformer_2": transformer()}
    report = patch(types.SimpleNamespace(components=parts))
    run(parts["transformer_2"], tokens())
    calls = [report[name, "rope"].calls for name in parts]
    assert calls == [0, LAYERS] == [row.calls for row in report.rows if row.op == "rope"]
    for key in ("rope", "cache", ("vae", "rope")):
        with pytest.raises(KeyError, match=r"\('transformer_2', 'rope'\).*got "):
            report[key]


# --- the transformer -------------------------------------------------------------------------


@MODELS
@PER_TOKEN
@pytest.mark.parametrize("only", [None, ["rope"], ["adaln"]], ids=["all", "rope", "adaln"])
@torch.no_grad()
def test_transformer_error(dtype, kept, per_token, only):
    model = transformer(dtype, kept=kept)
    inputs = tokens(dtype, per_token=per_token)
    theirs = run(model, inputs)
    with wide():
        fp64 = run(copy.deepcopy(model).double(), in_fp64(inputs))
    report = patch(model, only)
    assert_errs_no_more(run(model, inputs), theirs, fp64)
    assert_all_hit(report, *(only or ("adaln", "rope")))


@MODELS
@PER_TOKEN
def test_transformer_gradient_error(dtype, kept, per_token):
    model = transformer(dtype, kept=kept)
    inputs = tokens(dtype, per_token=per_token)
    theirs = gradients(model, inputs)
    with wide():
        fp64 = gradients(copy.deepcopy(model).double(), in_fp64(inputs))
    report = patch(model)
    ours = gradients(model, inputs)
    assert ours.keys() == theirs.keys() == fp64.keys()
    for name, grad in ours.items():
        assert (grad is None) == (theirs[name] is None), name
        if grad is not None:
            assert grad.dtype == theirs[name].dtype
            assert_errs_no_more(grad, theirs[name], fp64[name])
    assert_all_hit(report, "adaln", "rope")


@PER_TOKEN
def test_transformer_error_on_kernels(per_token):
    model, inputs = transformer(), tokens(per_token=per_token)
    theirs = gradients_and_sample(model, inputs)
    with wide():
        fp64 = gradients_and_sample(copy.deepcopy(model).double(), in_fp64(inputs))
    patch(model, backend="kernel")
    ours = gradients_and_sample(model, inputs)
    assert_errs_no_more(ours["sample"], theirs["sample"], fp64["sample"])
    assert_all_err_no_more(ours, theirs, fp64)


@torch.no_grad()
def test_rope_alone_is_bitwise_equal_in_plain_torch():
    model, inputs = transformer(), tokens()
    theirs = run(model, inputs)
    patch(model, ["rope"], backend="reference")
    assert torch.equal(run(model, inputs), theirs)


@torch.no_grad()
def test_calls_of_each_block():
    model = transformer()
    report = patch(model)
    for _ in range(3):
        run(model, tokens())
    assert (report["adaln"].sites, report["adaln"].calls) == (2 * LAYERS, 6 * LAYERS)
    assert (report["rope"].sites, report["rope"].calls) == (LAYERS, 3 * LAYERS)


@PER_TOKEN
@torch.no_grad()
def test_unpatch_transformer(per_token):
    model, inputs = transformer(), tokens(per_token=per_token)
    before, attributes, keys = run(model, inputs), set(vars(model)), list(model.state_dict())
    with patched(model):
        assert list(model.state_dict()) == keys
        run(model, inputs)
    assert traces(model) == [] and set(vars(model)) == attributes
    assert torch.equal(run(model, inputs), before)


@torch.no_grad()
def test_a_copy_has_its_own_tables():
    model, inputs = transformer(), tokens()
    patch(model)
    first = run(model, inputs)
    other = copy.deepcopy(model)
    assert torch.equal(run(other, inputs), first)
    assert_all_hit(explain(other), "adaln", "rope")
    assert other._cogvx_patch.rotary is not model._cogvx_patch.rotary


@torch.no_grad()
def test_tables_follow_the_size_of_the_video():
    model = transformer()
    inputs = tokens()
    smaller = {**inputs, "hidden_states": inputs["hidden_states"][..., :4, :]}
    theirs = [run(model, x) for x in (inputs, smaller, inputs)]
    patch(model, ["rope"], backend="reference")
    ours = [run(model, x) for x in (inputs, smaller, inputs)]
    assert all(map(torch.equal, ours, theirs))


@torch.no_grad()
def test_tables_are_converted_once_for_all_blocks(monkeypatch):
    from cogvx_kernels.patching import wan_transformer

    made = []
    made_of = wan_transformer._pair_tables
    monkeypatch.setattr(wan_transformer, "_pair_tables", lambda *x: made.append(1) or made_of(*x))
    model = transformer()
    patch(model)
    run(model, tokens())
    assert len(made) == 1


@pytest.mark.parametrize(
    "config",
    [{"cross_attn_norm": False}, {"image_dim": 8, "added_kv_proj_dim": 32}],
    ids=["no_norm2", "image"],
)
@torch.no_grad()
def test_error_of_other_transformer_configs(config):
    model, inputs = transformer(**config), tokens()
    if "image_dim" in config:
        inputs["encoder_hidden_states"] = torch.randn(2, 512, 12)
        inputs["encoder_hidden_states_image"] = torch.randn(2, 3, 8)
    theirs = run(model, inputs)
    with wide():
        fp64 = run(copy.deepcopy(model).double(), in_fp64(inputs))
    report = patch(model)
    assert_errs_no_more(run(model, inputs), theirs, fp64)
    assert_all_hit(report, "adaln", "rope")


@torch.no_grad()
def test_error_of_the_control_transformer():
    model, inputs = vace(), tokens()
    inputs["control_hidden_states"] = torch.randn(2, 6, 2, 6, 4)
    inputs["control_hidden_states_scale"] = torch.ones(1)
    theirs = run(model, inputs)
    with wide():
        fp64 = run(copy.deepcopy(model).double(), in_fp64(inputs))
    report = patch(model)
    assert_errs_no_more(run(model, inputs), theirs, fp64)
    assert_all_hit(report, "adaln", "rope")
    assert (report["adaln"].sites, report["rope"].sites) == (2 * LAYERS, LAYERS + 1)


@BACKENDS
@PER_TOKEN
def test_patched_transformer_compiles_as_one_graph(per_token, backend):
    model, inputs = transformer(), tokens(per_token=per_token)
    with torch.no_grad():
        theirs = run(model, inputs)
        patch(model, backend=backend)
        torch._dynamo.reset()
        compiled = run(torch.compile(model, fullgraph=True, backend="eager"), inputs)
        assert torch.allclose(compiled, run(model, inputs), atol=1e-6)
        assert torch.allclose(compiled, theirs, atol=1e-4)


@torch.no_grad()
def test_checkpointed_gradients():
    model, inputs = transformer(), tokens()
    patch(model)
    with torch.enable_grad():
        whole = gradients(model, inputs)
        model.train()
        model.enable_gradient_checkpointing()
        again = gradients(model, inputs)
    for name, grad in whole.items():
        assert grad is again[name] is None or torch.equal(grad, again[name]), name


# --- the VAE ---------------------------------------------------------------------------------


@RESIDUAL
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("form", [torch.contiguous_format, torch.channels_last_3d])
@BACKENDS
@torch.no_grad()
def test_a_patched_vae_gives_the_same_bits(residual, dtype, form, backend):
    model = vae(dtype, residual=residual)
    for p in model.parameters():
        p.data = p.data.to(memory_format=form) if p.ndim == 5 else p.data
    theirs = there_and_back(model, dtype)
    report = patch(model, backend=backend)
    assert all(map(torch.equal, there_and_back(model, dtype), theirs))
    assert_all_hit(report, "cache", "resample")


@RESIDUAL
@pytest.mark.parametrize("frames", [1, 5])
@torch.no_grad()
def test_an_image_and_a_short_clip_give_the_same_bits(residual, frames):
    model = vae(residual=residual)
    theirs = model.encode(clip(frames=frames)).latent_dist.parameters
    shown = model.decode(latents(frames=1 + frames // 4)).sample
    with patched(model):
        assert torch.equal(model.encode(clip(frames=frames)).latent_dist.parameters, theirs)
        assert torch.equal(model.decode(latents(frames=1 + frames // 4)).sample, shown)


@BACKENDS
def test_a_patched_vae_gives_the_same_bits_in_inference_mode(backend):
    model = vae()
    with torch.inference_mode():
        theirs = there_and_back(model, torch.float32)
        patch(model, backend=backend)
        assert all(map(torch.equal, there_and_back(model, torch.float32), theirs))


@torch.no_grad()
def test_tiles_and_slices_give_the_same_bits():
    model = vae()
    model.enable_tiling(16, 16, 8, 8)
    model.enable_slicing()
    z = torch.cat([latents(frames=2), -latents(frames=2)])
    theirs = model.decode(z).sample
    patch(model)
    assert torch.equal(model.decode(z).sample, theirs)


@RESIDUAL
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_gradients_of_the_vae_are_the_same_bits(residual, dtype):
    model = vae(dtype, residual=residual)

    def found():
        model.zero_grad()
        sum(x.square().sum() for x in there_and_back(model, dtype)).backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    theirs = found()
    report = patch(model)
    assert theirs and all(map(torch.equal, found(), theirs))
    for op in ("cache", "resample"):
        assert set(report[op].fallbacks) == {"a gradient is recorded"}


@RESIDUAL
@torch.no_grad()
def test_unpatch_vae(residual):
    model = vae(residual=residual)
    before, keys = there_and_back(model, torch.float32), list(model.state_dict())
    attributes = set(vars(model))
    patch(model, mode="fast")
    there_and_back(model, torch.float32)
    assert list(model.state_dict()) == keys
    unpatch(model)
    assert traces(model) == [] and set(vars(model)) == attributes
    assert all(map(torch.equal, there_and_back(model, torch.float32), before))


@torch.no_grad()
def test_every_convolution_of_the_vae_is_a_site():
    model = vae()
    report = patch(model)
    for op, kind in (("cache", WanCausalConv3d), ("resample", WanUpsample)):
        assert report[op].sites == sum(isinstance(m, kind) for m in model.modules())


@pytest.mark.parametrize("before", [None, 0, 1, 2])
@pytest.mark.parametrize("padding", [(1, 1, 1), (1, 0, 0), (0, 0, 0)])
@BACKENDS
@torch.no_grad()
def test_cached_frames_are_not_written(before, padding, backend):
    kernel = tuple(2 * p + 1 for p in padding)
    ours, theirs, report = conv(kernel, padding=padding, backend=backend)
    x = torch.randn(2, 3, 4, 5, 6)
    past = None if before is None else torch.randn(2, 3, before, 5, 6)
    kept = None if past is None else past.clone()
    assert torch.equal(ours(x, past), theirs(x, past))
    assert past is None or torch.equal(past, kept)
    assert report["cache"].calls == 1 and not report["cache"].fallbacks


@torch.no_grad()
def test_upsampled_pixels_keep_their_bits():
    model = vae(torch.bfloat16)
    report = patch(model, ["resample"])
    upsample = next(m for m in model.modules() if isinstance(m, WanUpsample))
    x = torch.randn(2, 3, 5, 7).bfloat16()
    whole = F.interpolate(x.float(), scale_factor=2.0, mode="nearest-exact")
    y = upsample(x)
    assert y.dtype == x.dtype and torch.equal(y.float(), whole)
    assert report["resample"].calls == 1


@torch.no_grad()
def test_a_compiled_convolution_is_bitwise_equal():
    ours, theirs, _ = conv(3, padding=1)
    x, past = torch.randn(1, 3, 4, 5, 6), torch.randn(1, 3, 2, 5, 6)
    torch._dynamo.reset()
    compiled = torch.compile(ours, fullgraph=True, backend="eager")
    assert torch.equal(compiled(x, past), theirs(x, past))
