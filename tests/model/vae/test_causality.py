"""The factorised VAE is strictly causal: later frames change nothing before, not by a bit."""

import pytest
import torch

from cogvx import frames
from cogvx.config import VAEConfig
from cogvx.vae import CausalVAE

TINY = dict(
    block_out_channels=(8, 8, 8, 8), latent_channels=4, layers_per_block=1, norm_num_groups=2
)
FACTORIZED = VAEConfig(
    **TINY, factorized=True, num_sample_frames_batch_size=4, num_latent_frames_batch_size=1
)


@pytest.fixture(scope="module")
def vae():
    torch.manual_seed(0)
    vae = CausalVAE(FACTORIZED).requires_grad_(False)
    for parameter in vae.parameters():
        parameter += 0.1 * torch.randn(parameter.shape)
    return vae


@pytest.fixture(params=(False, True), ids=("inference", "training"), autouse=True)
def grad(request):
    with torch.set_grad_enabled(request.param):
        yield


@pytest.mark.parametrize("changed", range(13))
def test_encode_is_causal(vae, changed):
    video = torch.randn(1, 13, 3, 16, 16)
    other = video.clone()
    other[:, changed] += 1
    before, after = vae.encode(video).moments, vae.encode(other).moments
    first = -(-changed // 4)  # the latent that the frame is in: 0; 1-4; 5-8; 9-12
    assert torch.equal(before[:, :first], after[:, :first])
    assert not torch.equal(before[:, first], after[:, first])


@pytest.mark.parametrize("changed", range(4))
def test_decode_is_causal(vae, changed):
    z = torch.randn(1, 4, 4, 2, 2)
    other = z.clone()
    other[:, changed] += 1
    before, after = vae.decode(z), vae.decode(other)
    first = 0 if changed == 0 else 4 * changed - 3
    assert torch.equal(before[:, :first], after[:, :first])
    assert not torch.equal(before[:, first], after[:, first])


@pytest.mark.parametrize("latents", range(1, 6))
def test_a_longer_clip_begins_with_the_shorter_one(vae, latents):
    z = torch.randn(1, 5, 4, 2, 2)
    count = frames.video_frames(latents, FACTORIZED)
    assert torch.equal(vae.decode(z[:, :latents]), vae.decode(z)[:, :count])
    video = torch.randn(1, 17, 3, 16, 16)
    assert torch.equal(vae.encode(video[:, :count]).moments, vae.encode(video).moments[:, :latents])


def test_result_does_not_depend_on_chunks(vae):
    """One chunk, or any plan: the same up to rounding; the released VAE would be off by far."""
    z = torch.randn(1, 5, 4, 2, 2)
    torch.testing.assert_close(vae.decoder(z), vae.decode(z), rtol=1e-4, atol=1e-5)
    video = torch.randn(1, 17, 3, 16, 16)
    torch.testing.assert_close(vae.encoder(video), vae.encode(video).moments, rtol=1e-4, atol=1e-5)


def test_first_frame_has_its_own_latent(vae):
    """An image is a clip of one frame, and the first frame of a clip is encoded as an image."""
    video = torch.randn(1, 9, 3, 16, 16)
    assert torch.equal(vae.encode(video[:, :1]).mean, vae.encode(video).mean[:, :1])


def test_state_dict_keys_of_factorized_convolutions(vae):
    keys = vae.state_dict()
    assert keys["encoder.conv_in.spatial.weight"].shape == (8, 3, 3, 3)
    assert keys["encoder.conv_in.temporal.weight"].shape == (8, 8, 3)
    assert keys["decoder.conv_out.spatial.weight"].shape == (3, 8, 3, 3)
    assert keys["decoder.norm_out.weight"].shape == (8,)
