"""diffusers' Wan 2.1 and 2.2, small and random, and comparisons of their outputs.

The fp64 reference is a copy of the model in which casts to fp32 are casts to fp64.
"""

from contextlib import contextmanager

import diffusers
import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d

from cogvx_kernels.patching import patch

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


def conv(*kernel, backend="auto", **options):
    """The patched VAE beside the original one."""
    model = vae()
    torch.manual_seed(5)
    ours = model.encoder.conv_in = WanCausalConv3d(3, 4, *kernel, **options)
    report = patch(model, ["cache"], backend=backend)
    return ours, lambda *args: WanCausalConv3d.forward(ours, *args), report


def run(model, inputs):
    return model(**inputs).sample


def there_and_back(model, dtype):
    """Several chunks, so that the frames before one count."""
    return model.encode(clip(dtype)).latent_dist.parameters, model.decode(latents(dtype)).sample


@contextmanager
def wide():
    """Casts of a model to fp32 become casts to fp64."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
        yield


def in_fp64(inputs):
    return {k: x.double() if x.is_floating_point() else x for k, x in inputs.items()}


VARIABLES = ("hidden_states", "encoder_hidden_states")


def gradients(model, inputs):
    """Gradients of every parameter, of the video and of the text."""
    model.zero_grad()
    video, text = (inputs[k].clone().requires_grad_() for k in VARIABLES)
    out = run(model, {**inputs, "hidden_states": video, "encoder_hidden_states": text})
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).to(out.dtype)
    (out * weight).sum().backward()
    found = {name: p.grad for name, p in model.named_parameters()}
    return {**found, "video": video.grad, "text": text.grad}


def gradients_and_sample(model, inputs):
    found = gradients(model, inputs)
    sample = run(model, inputs).detach()
    return {"sample": sample, **{k: x for k, x in found.items() if x is not None}}


def distance(x, fp64):
    return (x.double() - fp64).norm().item()


def assert_errs_no_more(ours, theirs, fp64):
    """Than twice the model's own forward, and a unit in the last place of the tensor's size."""
    tiny = torch.finfo(ours.dtype).eps * fp64.norm().item()
    assert distance(ours, fp64) <= 2 * distance(theirs, fp64) + tiny


def assert_all_err_no_more(ours, theirs, fp64):
    """Likewise, of all tensors by name together, each in units in its own last place: how much one
    alone errs is chance, above all of a sum whose terms cancel."""
    assert ours.keys() == theirs.keys() <= fp64.keys()

    def units(found):
        far = [
            distance(x, fp64[name]) / (torch.finfo(x.dtype).eps * fp64[name].norm().item())
            for name, x in found.items()
        ]
        return torch.tensor(far).norm().item()

    assert units(ours) <= 2 * units(theirs) + 1


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
