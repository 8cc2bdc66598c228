"""Wan 2.1 and 2.2 of diffusers, patched: the same model, and the same one again after `unpatch`.

Truth is a copy of the model in fp64, where a cast to fp32 that the model makes is one to fp64.
"""

import copy
from contextlib import contextmanager

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from cogvx_kernels.patching import explain, patch, patched, unpatch

diffusers = pytest.importorskip("diffusers")
from diffusers.models.autoencoders.autoencoder_kl_wan import (  # noqa: E402
    WanCausalConv3d,
    WanUpsample,
)

LAYERS = 2
FP32_PARTS = ("rope", "scale_shift_table", "norm1", "norm2", "norm3")  # as diffusers loads them


def transformer(dtype=torch.float32, *, kept=True, **config):
    """Small and random; in a low dtype some parts stay fp32, as in a loaded model, if `kept`."""
    torch.manual_seed(0)
    options = {
        "patch_size": (1, 2, 2), "num_attention_heads": 2, "attention_head_dim": 16,
        "in_channels": 4, "out_channels": 4, "text_dim": 12, "freq_dim": 16, "ffn_dim": 24,
        "num_layers": LAYERS, "rope_max_seq_len": 32, "cross_attn_norm": True,
    }  # fmt: skip
    model = diffusers.WanTransformer3DModel(**{**options, **config}).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "norm" in name:
                p.add_(torch.randn_like(p), alpha=0.3)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if not (kept and any(part in name.split(".") for part in FP32_PARTS)):
            tensor.data = tensor.data.to(dtype)
    return model


def vace():
    """The one with control: its main blocks are Wan's, and its other ones have Wan's attention."""
    torch.manual_seed(0)
    return diffusers.WanVACETransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, text_dim=12,
        freq_dim=16, ffn_dim=24, num_layers=LAYERS, rope_max_seq_len=32, vace_layers=[0],
        vace_in_channels=6,
    ).eval()  # fmt: skip


def tokens(dtype=torch.float32, *, per_token=False, batch=2):
    """2x3x2 tokens of video and 5 of text."""
    g = torch.Generator().manual_seed(1)
    timestep = torch.randint(0, 1000, (batch, 12) if per_token else (batch,), generator=g)
    video = torch.randn((batch, 4, 2, 6, 4), generator=g).to(dtype)
    text = torch.randn((batch, 5, 12), generator=g).to(dtype)
    return {"hidden_states": video, "timestep": timestep, "encoder_hidden_states": text}


def run(model, inputs):
    return model(**inputs).sample


@contextmanager
def wide():
    """What a model casts to fp32 is cast to fp64."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
        yield


def in_fp64(inputs):
    return {k: x.double() if x.is_floating_point() else x for k, x in inputs.items()}


def gradients(model, inputs):
    """Of every parameter, of the video and of the text."""
    model.zero_grad()
    video, text = (inputs[k].clone().requires_grad_() for k in VARIABLES)
    out = run(model, {**inputs, "hidden_states": video, "encoder_hidden_states": text})
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).to(out.dtype)
    (out * weight).sum().backward()
    found = {name: p.grad for name, p in model.named_parameters()}
    return {**found, "video": video.grad, "text": text.grad}


VARIABLES = ("hidden_states", "encoder_hidden_states")


def gradients_and_sample(model, inputs):
    found = gradients(model, inputs)
    sample = run(model, inputs).detach()
    return {"sample": sample, **{k: x for k, x in found.items() if x is not None}}


def distance(x, truth):
    return (x.double() - truth).norm().item()


def assert_errs_no_more(ours, theirs, truth):
    """Than twice the model's own way, and a unit in the last place of the tensor's size."""
    tiny = torch.finfo(ours.dtype).eps * truth.norm().item()
    assert distance(ours, truth) <= 2 * distance(theirs, truth) + tiny


def assert_all_hit(report, *ops):
    assert {row.op for row in report.rows} == set(ops)
    for row in report.rows:
        assert row.sites and row.hit == row.sites and not row.fallbacks, str(report)


def traces(model):
    """Names that a patch may leave on modules."""
    return [
        (name, key)
        for name, module in model.named_modules()
        for key in module.__dict__
        if key in ("forward", "_cogvx", "_cogvx_patch") or "cogvx" in key
    ]


MODELS = pytest.mark.parametrize(
    ("dtype", "kept"),
    [(torch.float32, True), (torch.bfloat16, True), (torch.bfloat16, False)],
    ids=["fp32", "bf16", "all_bf16"],
)
PER_TOKEN = pytest.mark.parametrize("per_token", [False, True], ids=["sample", "token"])


# Of the kernels on a CPU: Triton's by its interpreter, in fp32, and the extension's own.
BACKENDS = pytest.mark.parametrize("backend", ["auto", "kernel"])


# --- the transformer -------------------------------------------------------------------------


@MODELS
@PER_TOKEN
@pytest.mark.parametrize("only", [None, ["rope"], ["adaln"]], ids=["all", "rope", "adaln"])
@torch.no_grad()
def test_the_transformer_errs_no_more_than_its_own_way(dtype, kept, per_token, only):
    model = transformer(dtype, kept=kept)
    inputs = tokens(dtype, per_token=per_token)
    theirs = run(model, inputs)
    with wide():
        truth = run(copy.deepcopy(model).double(), in_fp64(inputs))
    report = patch(model, only)
    assert_errs_no_more(run(model, inputs), theirs, truth)
    assert_all_hit(report, *(only or ("adaln", "rope")))


@MODELS
@PER_TOKEN
def test_gradients_of_the_transformer_err_no_more_than_its_own(dtype, kept, per_token):
    model = transformer(dtype, kept=kept)
    inputs = tokens(dtype, per_token=per_token)
    theirs = gradients(model, inputs)
    with wide():
        truth = gradients(copy.deepcopy(model).double(), in_fp64(inputs))
    report = patch(model)
    ours = gradients(model, inputs)
    assert ours.keys() == theirs.keys() == truth.keys()
    for name, grad in ours.items():
        assert (grad is None) == (theirs[name] is None), name
        if grad is not None:
            assert grad.dtype == theirs[name].dtype
            assert_errs_no_more(grad, theirs[name], truth[name])
    assert_all_hit(report, "adaln", "rope")


@PER_TOKEN
def test_kernels_in_the_transformer_err_no_more_than_its_own_way(per_token):
    model, inputs = transformer(), tokens(per_token=per_token)
    theirs = gradients_and_sample(model, inputs)
    with wide():
        truth = gradients_and_sample(copy.deepcopy(model).double(), in_fp64(inputs))
    patch(model, backend="kernel")
    ours = gradients_and_sample(model, inputs)
    assert ours.keys() == theirs.keys()
    for name, x in ours.items():
        assert_errs_no_more(x, theirs[name], truth[name])


@torch.no_grad()
def test_rotation_alone_changes_no_bit_in_plain_torch():
    model, inputs = transformer(), tokens()
    theirs = run(model, inputs)
    patch(model, ["rope"], backend="reference")
    assert torch.equal(run(model, inputs), theirs)


@torch.no_grad()
def test_calls_are_two_norms_and_one_rotation_for_each_block():
    model = transformer()
    report = patch(model)
    for _ in range(3):
        run(model, tokens())
    assert (report["adaln"].sites, report["adaln"].calls) == (2 * LAYERS, 6 * LAYERS)
    assert (report["rope"].sites, report["rope"].calls) == (LAYERS, 3 * LAYERS)


@PER_TOKEN
@torch.no_grad()
def test_unpatched_transformer_is_the_one_that_it_was(per_token):
    model, inputs = transformer(), tokens(per_token=per_token)
    before, attributes, keys = run(model, inputs), set(vars(model)), list(model.state_dict())
    with patched(model):
        assert list(model.state_dict()) == keys
        run(model, inputs)
    assert traces(model) == [] and set(vars(model)) == attributes
    assert torch.equal(run(model, inputs), before)


@torch.no_grad()
def test_a_copy_of_a_patched_transformer_is_patched_with_tables_of_its_own():
    model, inputs = transformer(), tokens()
    patch(model)
    first = run(model, inputs)
    other = copy.deepcopy(model)
    assert torch.equal(run(other, inputs), first)
    assert_all_hit(explain(other), "adaln", "rope")
    assert other._cogvx_patch.angles is not model._cogvx_patch.angles


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
def test_tables_are_made_once_for_all_blocks(monkeypatch):
    from cogvx_kernels.patching import wan_transformer

    made = []
    halved = wan_transformer._halved
    monkeypatch.setattr(wan_transformer, "_halved", lambda *x: made.append(1) or halved(*x))
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
def test_other_shapes_of_the_transformer_err_no_more_than_their_own_way(config):
    model, inputs = transformer(**config), tokens()
    if "image_dim" in config:
        inputs["encoder_hidden_states"] = torch.randn(2, 512, 12)
        inputs["encoder_hidden_states_image"] = torch.randn(2, 3, 8)
    theirs = run(model, inputs)
    with wide():
        truth = run(copy.deepcopy(model).double(), in_fp64(inputs))
    report = patch(model)
    assert_errs_no_more(run(model, inputs), theirs, truth)
    assert_all_hit(report, "adaln", "rope")


@torch.no_grad()
def test_the_transformer_with_control_errs_no_more_than_its_own_way():
    model, inputs = vace(), tokens()
    inputs["control_hidden_states"] = torch.randn(2, 6, 2, 6, 4)
    inputs["control_hidden_states_scale"] = torch.ones(1)
    theirs = run(model, inputs)
    with wide():
        truth = run(copy.deepcopy(model).double(), in_fp64(inputs))
    report = patch(model)
    assert_errs_no_more(run(model, inputs), theirs, truth)
    assert_all_hit(report, "adaln", "rope")
    assert (report["adaln"].sites, report["rope"].sites) == (2 * LAYERS, LAYERS + 1)


@torch.no_grad()
def test_fused_projections_are_used_where_they_are():
    model, inputs = transformer(), tokens()
    for part in model.blocks:
        part.attn1.fuse_projections()
    theirs = run(model, inputs)
    report = patch(model, ["rope"], backend="reference")
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(model.blocks[0].attn1.to_q, "forward", None)
        assert torch.equal(run(model, inputs), theirs)
    assert_all_hit(report, "rope")


@torch.no_grad()
def test_norms_and_projections_are_called_as_modules():
    model, inputs = transformer(), tokens()
    patch(model)
    called = []
    attn = model.blocks[0].attn1
    parts = (attn.to_q, attn.to_k, attn.to_v, attn.norm_q, attn.norm_k, *attn.to_out, attn)
    parts = (*parts, model.blocks[0].attn2, model.blocks[0].ffn)
    for part in parts:
        part.register_forward_hook(lambda module, *_: called.append(module))
    run(model, inputs)
    assert {*called} == {*parts} and len(called) == len(parts)


def _hook(model):
    model.blocks[0].norm1.register_forward_hook(lambda *_: None)


def _half(model):
    model.blocks[0].norm3 = nn.Identity()


@pytest.mark.parametrize("change", [_hook, _half], ids=["hook", "another_norm"])
@torch.no_grad()
def test_a_norm_that_is_not_plain_sends_the_block_its_own_way(change):
    model, inputs = transformer(), tokens()
    change(model)
    theirs = run(model, inputs)
    report = patch(model, ["adaln"])
    assert torch.allclose(run(model, inputs), theirs, atol=1e-5)
    assert (report["adaln"].hit, report["adaln"].sites) == (2, 4)
    assert len(report["adaln"].fallbacks) == 1


@torch.no_grad()
def test_one_modulation_for_several_samples_is_left_to_the_model():
    model = transformer()
    report = patch(model, ["adaln"])
    part, x, text = model.blocks[0], torch.randn(2, 12, 32), torch.randn(2, 5, 32)
    temb, tables = torch.randn(1, 6, 32), torch.randn(2, 1, 12, 1, 16).unbind()
    theirs = type(part).forward(part, x, text, temb, tables)
    assert torch.equal(part(x, text, temb, tables), theirs)
    assert (report["adaln"].calls, sum(report["adaln"].fallbacks.values())) == (0, 1)


@torch.no_grad()
def test_a_modulation_for_several_tokens_is_refused_as_by_the_model():
    model = transformer()
    patch(model, ["adaln"])
    part, x, text = model.blocks[0], torch.randn(2, 12, 32), torch.randn(2, 5, 32)
    with pytest.raises(RuntimeError, match="must match the size"):
        part(x, text, torch.randn(2, 6, 6, 32), torch.randn(2, 1, 12, 1, 16).unbind())


@torch.no_grad()
def test_a_norm_with_hooks_before_the_text_is_called_and_the_rest_is_ours():
    model, inputs = transformer(), tokens()
    theirs = run(model, inputs)
    report = patch(model, ["adaln"])
    called = []
    model.blocks[0].norm2.register_forward_hook(lambda *_: called.append(1))
    assert torch.allclose(run(model, inputs), theirs, atol=1e-5)
    assert called == [1]
    assert_all_hit(report, "adaln")


@torch.no_grad()
def test_another_processor_is_left_to_itself():
    class Another:
        def __call__(self, attn, hidden_states, *others):
            return hidden_states * 2

    model, inputs = transformer(), tokens()
    model.blocks[0].attn1.set_processor(Another())
    theirs = run(model, inputs)
    report = patch(model, ["rope"], backend="reference")
    assert torch.equal(run(model, inputs), theirs)
    assert report["rope"].fallbacks == {"its processor is a Another": 1}


@torch.no_grad()
def test_tables_for_each_sample_are_left_to_the_model():
    model = transformer()
    report = patch(model, ["rope"])
    attn, x = model.blocks[0].attn1, torch.randn(2, 12, 32)
    tables = torch.randn(2, 2, 12, 1, 16).unbind()
    theirs = type(attn).forward(attn, x, None, None, tables)
    assert torch.equal(attn(x, None, None, tables), theirs)
    assert sum(report["rope"].fallbacks.values()) == 1


@torch.no_grad()
def test_the_softmax_is_the_one_that_is_set():
    from diffusers.models import attention_dispatch
    from diffusers.models.transformers import transformer_wan

    model, inputs = transformer(), tokens()
    asked = []
    dispatch = attention_dispatch.dispatch_attention_fn

    def watched(*args, backend=None, **kwargs):
        asked.append(backend)
        return dispatch(*args, backend=backend, **kwargs)

    model.set_attention_backend("_native_math")
    theirs = run(model, inputs)
    with pytest.MonkeyPatch.context() as monkeypatch:
        for module in (attention_dispatch, transformer_wan):  # ours, and that of attn2
            monkeypatch.setattr(module, "dispatch_attention_fn", watched)
        patch(model, ["rope"], backend="reference")
        assert torch.equal(run(model, inputs), theirs)
    assert len(asked) == 2 * LAYERS and {str(x.value) for x in asked} == {"_native_math"}


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
def test_checkpointing_recomputes_the_same_gradients():
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


def vae(dtype=torch.float32, *, residual=False):
    """Small and random; `residual` is the one of Wan 2.2."""
    torch.manual_seed(0)
    options = {"is_residual": True, "decoder_base_dim": 6, "patch_size": 2} if residual else {}
    channels = {"in_channels": 12, "out_channels": 12} if residual else {}
    model = diffusers.AutoencoderKLWan(
        base_dim=4, z_dim=4, dim_mult=[1, 2, 2], num_res_blocks=1,
        temperal_downsample=[True, True], latents_mean=[0.0] * 4, latents_std=[1.0] * 4,
        scale_factor_spatial=4, **options, **channels,
    )  # fmt: skip
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.05)
    return model.eval().to(dtype)


def clip(dtype=torch.float32, frames=9):
    g = torch.Generator().manual_seed(3)
    return torch.rand((1, 3, frames, 16, 24), generator=g).to(dtype) * 2 - 1


def latents(dtype=torch.float32, frames=3):
    g = torch.Generator().manual_seed(4)
    return torch.randn((1, 4, frames, 4, 6), generator=g).to(dtype)


def there_and_back(model, dtype):
    """Of several chunks, so that what is before one counts."""
    return model.encode(clip(dtype)).latent_dist.parameters, model.decode(latents(dtype)).sample


RESIDUAL = pytest.mark.parametrize("residual", [False, True], ids=["2.1", "2.2"])


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
def test_unpatched_vae_is_the_one_that_it_was(residual):
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


def conv(*kernel, backend="auto", **options):
    """Of the VAE, patched, with the one that it was."""
    model = vae()
    torch.manual_seed(5)
    ours = model.encoder.conv_in = WanCausalConv3d(3, 4, *kernel, **options)
    report = patch(model, ["cache"], backend=backend)
    return ours, lambda *args: WanCausalConv3d.forward(ours, *args), report


@pytest.mark.parametrize("before", [None, 0, 1, 2])
@pytest.mark.parametrize("padding", [(1, 1, 1), (1, 0, 0), (0, 0, 0)])
@BACKENDS
@torch.no_grad()
def test_frames_before_a_chunk_are_read_and_not_written(before, padding, backend):
    kernel = tuple(2 * p + 1 for p in padding)
    ours, theirs, report = conv(kernel, padding=padding, backend=backend)
    x = torch.randn(2, 3, 4, 5, 6)
    past = None if before is None else torch.randn(2, 3, before, 5, 6)
    kept = None if past is None else past.clone()
    assert torch.equal(ours(x, past), theirs(x, past))
    assert past is None or torch.equal(past, kept)
    assert report["cache"].calls == 1 and not report["cache"].fallbacks


@pytest.mark.parametrize(
    ("options", "past"),
    [
        ({"kernel_size": 3, "padding": (1, 1, 0)}, torch.float32),
        ({"kernel_size": 3, "padding": (0, 1, 1)}, None),
        ({"kernel_size": 3, "padding": 1}, torch.float64),
    ],
    ids=["uneven", "no_time", "another_dtype"],
)
@torch.no_grad()
def test_another_convolution_goes_its_own_way(options, past):
    ours, theirs, report = conv(**options)
    x = torch.randn(1, 3, 4, 5, 6)
    past = None if past is None else torch.randn(1, 3, 2, 5, 6).to(past)
    if past is not None and past.dtype == torch.float64:
        for run_it in (ours, theirs):
            with pytest.raises(RuntimeError):  # what torch says of two dtypes
                run_it(x, past)
    else:
        assert torch.equal(ours(x, past), theirs(x, past))
    assert sum(report["cache"].fallbacks.values()) == 1 and report["cache"].calls == 0


@torch.no_grad()
def test_more_frames_before_a_chunk_than_are_read_go_the_models_own_way():
    ours, theirs, report = conv(3, padding=1)
    x, past = torch.randn(1, 3, 4, 5, 6), torch.randn(1, 3, 3, 5, 6)
    assert torch.equal(ours(x, past), theirs(x, past))
    assert sum(report["cache"].fallbacks.values()) == 1


@torch.no_grad()
def test_a_pixel_that_is_shown_four_times_keeps_its_bits():
    model = vae(torch.bfloat16)
    report = patch(model, ["resample"])
    upsample = next(m for m in model.modules() if isinstance(m, WanUpsample))
    x = torch.randn(2, 3, 5, 7).bfloat16()
    whole = F.interpolate(x.float(), scale_factor=2.0, mode="nearest-exact")
    y = upsample(x)
    assert y.dtype == x.dtype and torch.equal(y.float(), whole)
    assert report["resample"].calls == 1


@torch.no_grad()
def test_a_smooth_upsampling_is_left_to_the_model():
    model = vae(torch.bfloat16)
    report = patch(model, ["resample"])
    upsample = next(m for m in model.modules() if isinstance(m, WanUpsample))
    upsample.mode = "bilinear"
    x = torch.randn(2, 3, 5, 7).bfloat16()
    assert torch.equal(upsample(x), WanUpsample.forward(upsample, x))
    assert report["resample"].fallbacks == {"its mode is 'bilinear'": 1}


@torch.no_grad()
def test_a_compiled_convolution_keeps_its_bits():
    ours, theirs, _ = conv(3, padding=1)
    x, past = torch.randn(1, 3, 4, 5, 6), torch.randn(1, 3, 2, 5, 6)
    torch._dynamo.reset()
    compiled = torch.compile(ours, fullgraph=True, backend="eager")
    assert torch.equal(compiled(x, past), theirs(x, past))
