"""A small VAE on the kernels, in Triton's interpreter, against the same on the references."""

from functools import cache

import pytest
import torch

from cogvx import frames
from cogvx.config import VAEConfig
from cogvx.vae import CausalVAE, DecodeState
from cogvx_kernels import _backend, module_backend
from tests.harness.selection import rest

if not (_backend.HAS_TRITON and _backend.INTERPRETED):
    pytest.skip("kernels run in Triton's interpreter", allow_module_level=True)

# Two levels, the first of which doubles time: every kind of layer.
SMALL = dict(
    block_out_channels=(8, 16),
    latent_channels=4,
    layers_per_block=1,
    norm_num_groups=2,
    temporal_compression_ratio=2,
)
CONFIGS = {
    "released": VAEConfig(**SMALL, num_sample_frames_batch_size=4),
    "factorized": VAEConfig(
        **SMALL, factorized=True, num_sample_frames_batch_size=2, num_latent_frames_batch_size=1
    ),
}


def make(name):
    torch.manual_seed(0)
    with module_backend("kernel"):
        vae = CausalVAE(CONFIGS[name])
    for parameter in vae.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape)
    return vae


def inputs(vae, latents):
    side = 3 * vae.config.spatial_compression_ratio
    z = torch.randn(1, latents, 4, 3, 3)
    return z, torch.randn(1, frames.video_frames(latents, vae.config), 3, side, side)


def on_reference(vae):
    with module_backend("reference"):
        other = CausalVAE(vae.config)
    other.load_state_dict(vae.state_dict())
    return other


@cache
def on_kernels(name, latents):
    """(VAE, latents, video, what they decode and encode to)."""
    vae = make(name)
    z, video = inputs(vae, latents)
    with torch.no_grad():
        return vae, z, video, vae.decode(z), vae.encode(video).moments


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("latents", (1, 2, 5))
def test_decode_and_encode(name, latents):
    vae, z, video, decoded, moments = on_kernels(name, latents)
    other = on_reference(vae)
    with torch.no_grad():
        torch.testing.assert_close(decoded, other.decode(z), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(moments, other.encode(video).moments, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["released", rest("factorized")])
def test_stream_on_kernels_equals_decode_bitwise(name):
    vae, z, video, decoded, encoded = on_kernels(name, 5)
    with torch.no_grad():
        assert torch.equal(torch.cat(list(vae.stream_decode(z)), dim=1), decoded)
        pieces = iter(video.split(1, dim=1))
        moments = [g.moments for g in vae.stream_encode(pieces, total=video.shape[1])]
        assert torch.equal(torch.cat(moments, dim=1), encoded)


@pytest.mark.parametrize("name", [rest("released"), "factorized"])
def test_gradients_on_kernels_equal_reference(name):
    vae = make(name)
    other = on_reference(vae)
    _, video = inputs(vae, 3)
    for model in (vae, other):
        model(video).square().mean().backward()
    for (key, ours), expected in zip(vae.named_parameters(), other.parameters(), strict=True):
        scale = expected.grad.abs().max().clamp(min=1e-6)
        assert (ours.grad - expected.grad).abs().max() <= 1e-4 * scale, key


def test_a_clip_continues_in_another_grad_mode():
    """A state that was begun in inference mode, where tensors cannot be written to outside."""
    vae = on_reference(make("released"))
    z, _ = inputs(vae, 4)
    with torch.no_grad():
        whole = vae.decode(z)
    for first, then in (
        (torch.inference_mode, torch.no_grad),
        (torch.no_grad, torch.inference_mode),
        (torch.no_grad, torch.enable_grad),
        (torch.enable_grad, torch.no_grad),
    ):
        state = DecodeState()
        with first():
            begun = list(vae.stream_decode(z[:, :2], state, total=4, last=False))
        with then():
            rest = list(vae.stream_decode(z[:, 2:], state))
        torch.testing.assert_close(torch.cat(begun + rest, 1).detach(), whole)
