"""Parts of a training: sampler, EMA, timestep sampling, losses, initialisation, optimizers."""

import pytest
import torch
from torch import nn

from cogvx.config import VAEConfig
from cogvx.schedulers import NoiseSchedule
from cogvx.shapes import ProceduralClips
from cogvx.training.ema import EMA
from cogvx.training.init import init_vae
from cogvx.training.loop import warn_if_bfloat16_is_emulated
from cogvx.training.losses import (
    ReconstructionLoss,
    VelocityLoss,
    drop_text,
    mean_losses,
    recolor,
)
from cogvx.training.optimizers import Muon, make_optimizers
from cogvx.training.recipe import TransformerTraining
from cogvx.training.sampler import Draws, ResumableBatchSampler, mix_seed, shares
from cogvx.training.timestep_sampling import (
    UncertaintyWeighting,
    quantile_timesteps,
    stratified_quantiles,
)
from cogvx.training.trainer import make_scheduler, new_transformer, new_vae
from cogvx.vae import CausalVAE
from cogvx.vae.causal_conv import CausalConv

from .recipes import small


def always(count):
    return lambda step: count


def test_an_epoch_has_every_clip_once():
    taken = [i for batch in ResumableBatchSampler(10, always(4), 0, 0, 5) for i in batch]
    assert sorted(taken[:10]) == sorted(taken[10:]) == list(range(10))
    assert taken[:10] != taken[10:] != sorted(taken[10:])
    assert taken != [i for batch in ResumableBatchSampler(10, always(4), 1, 0, 5) for i in batch]


@pytest.mark.parametrize("batch_of", [always(4), lambda step: 6 if step < 3 else 2])
def test_resumed_batches_are_the_rest(batch_of):
    whole = list(ResumableBatchSampler(7, batch_of, 3, 0, 9))
    assert [len(batch) for batch in whole] == [batch_of(step) for step in range(9)]
    for start in range(9):
        assert list(ResumableBatchSampler(7, batch_of, 3, start, 9)) == whole[start:]


def test_processes_share_a_batch():
    whole = list(ResumableBatchSampler(7, always(6), 3, 0, 5))
    shares = [list(ResumableBatchSampler(7, always(6), 3, 0, 5, 1, rank, 3)) for rank in range(3)]
    assert [sum(parts, []) for parts in zip(*shares, strict=True)] == whole
    with pytest.raises(ValueError, match="multiple of the 4 shares of .* 1 on 4 ranks .*; got 6"):
        list(ResumableBatchSampler(7, always(6), 3, 0, 5, 1, 0, 4))


def test_parts_of_a_batch_have_the_same_clips_on_any_number_of_ranks():
    alone = shares(12, 2, 0, 1)
    assert alone == [range(6), range(6, 12)]
    for ranks in (2, 3):
        split = [shares(12, 2, rank, ranks) for rank in range(ranks)]
        assert [[i for own in part for i in own] for part in zip(*split, strict=True)] == [
            list(part) for part in alone
        ]
    with pytest.raises(ValueError, match="multiple of the 8 shares of accumulate 4 on 2 ranks"):
        shares(4, 4, 0, 2)


def test_random_numbers_are_of_seed_step_and_position():
    whole = Draws(3, 5, range(6), 6)
    numbers = whole.rand(2), whole.randn(2, 3), whole.quantiles()
    for first in (0, 2, 4):
        part = Draws(3, 5, range(first, first + 2), 6)
        own = part.rand(2), part.randn(2, 3), part.quantiles()
        assert all(torch.equal(a, b[first : first + 2]) for a, b in zip(own, numbers, strict=True))
    assert (numbers[2].sort().values * 6).long().tolist() == list(range(6))
    for other in (Draws(4, 5, range(6), 6), Draws(3, 6, range(6), 6)):
        assert not torch.equal(other.rand(2), numbers[0])
    assert len(numbers[0].unique()) == 12


def test_mixed_seeds_are_distinct_and_far_apart():
    seeds = {mix_seed(a, b, c) for a in range(20) for b in range(20) for c in range(5)}
    assert len(seeds) == 2000 and all(0 <= seed < 2**63 for seed in seeds)
    assert all(bin(mix_seed(0, n) ^ mix_seed(0, n + 1)).count("1") > 12 for n in range(100))


def test_ema_follows_its_formula():
    parameter = nn.Parameter(torch.zeros(3))
    average, expected = EMA([parameter], 0.5), torch.zeros(3)
    for step in range(1, 9):
        with torch.no_grad():
            parameter += step
        average.update()
        expected = torch.lerp(expected, parameter.detach(), 1 - min(0.5, (1 + step) / (10 + step)))
    torch.testing.assert_close(average.averages[0], expected)
    own = parameter.detach().clone()
    with average.applied():
        torch.testing.assert_close(parameter.detach(), expected)
    assert torch.equal(parameter, own)
    other = EMA([parameter], 0.5)
    other.load_state_dict(average.state_dict())
    assert other.steps == 8 and torch.equal(other.averages[0], average.averages[0])


def test_reconstruction_loss_follows_its_formula():
    vae, video = new_vae(small()), torch.rand(2, 3, 3, 16, 16) * 2 - 1
    torch.manual_seed(1)
    losses = ReconstructionLoss(vae, 0.25)(video)
    torch.manual_seed(1)
    posterior = vae.encode(video)
    error = vae.decode(posterior.sample()) - video
    reconstruction = error.abs().mean() + 8 * error.square().mean()
    kl = posterior.kl().mean() / posterior.mean[0].numel()
    torch.testing.assert_close(losses["reconstruction"], reconstruction.detach())
    torch.testing.assert_close(losses["loss"], reconstruction + 0.25 * kl)


def test_velocity_loss_follows_its_formula():
    recipe = small()
    transformer, latents = new_transformer(recipe), torch.randn(3, 3, 4, 8, 8)
    nn.init.normal_(transformer.proj_out.weight)
    schedule, text = NoiseSchedule(make_scheduler(recipe)[1]), torch.randn(3, 16, 50)
    torch.manual_seed(1)
    losses = VelocityLoss(transformer, schedule, TransformerTraining(balance_weight=0.5))(
        latents, text
    )
    torch.manual_seed(1)
    timestep = quantile_timesteps(stratified_quantiles(3), 1000)
    noise = torch.randn_like(latents)
    alpha = schedule.alphas_cumprod[timestep].view(3, 1, 1, 1, 1)
    noisy = (alpha.sqrt() * latents + (1 - alpha).sqrt() * noise).float()
    wanted = (alpha.sqrt() * noise - (1 - alpha).sqrt() * latents).float()
    error = (transformer(noisy, text, timestep) - wanted).square().mean()
    torch.testing.assert_close(losses["velocity"], error.detach())
    torch.testing.assert_close(losses["loss"], error + 0.5 * losses["balance"])
    assert losses["balance"] >= 1 - 1e-6 and losses["loss"].requires_grad


def test_timesteps_are_uniform_and_stratified():
    batches = torch.stack([quantile_timesteps(stratified_quantiles(5), 1000) for _ in range(2000)])
    assert torch.equal(batches.sort().values // 200, torch.arange(5).expand(2000, 5))
    for place in batches.unbind(1):  # 2000 draws of a clip: 200 in each tenth, within 5 deviations
        assert ((place // 100).bincount(minlength=10) - 200).abs().max() < 70
    few = torch.stack([quantile_timesteps(stratified_quantiles(7), 3) for _ in range(50)])
    assert few.unique().tolist() == [0, 1, 2]


def test_logit_normal_timesteps_have_their_mean_and_std():
    times = quantile_timesteps(stratified_quantiles(100_000), 10**6, 1.0, 0.5).double() / 10**6
    logits = times.log() - (1 - times).log()
    assert logits.mean() == pytest.approx(1.0, abs=0.01)
    assert logits.std() == pytest.approx(0.5, abs=0.01)
    assert quantile_timesteps(torch.tensor([0.0, 0.5, 1.0]), 1000, 0.0).tolist() == [0, 500, 999]
    assert quantile_timesteps(torch.tensor([0.0, 0.5, 1.0]), 1000).tolist() == [0, 500, 999]


def test_uncertainty_weighting_divides_by_the_running_mean():
    levels = UncertaintyWeighting()
    quantiles = torch.tensor([0.0, 0.03, 0.5, 1.0])
    errors = torch.tensor([0.1, 0.3, 3.0, 4.0])
    assert torch.equal(levels.eval()(errors, quantiles), errors)  # from 1 on, and none follows
    assert torch.equal(levels.train()(errors, quantiles), errors)
    expected = torch.ones(16)
    expected[0], expected[8], expected[15] = 0.992, 1.02, 1.03
    torch.testing.assert_close(levels.errors, expected)
    for _ in range(2000):
        relative = levels(errors, quantiles)
    torch.testing.assert_close(relative, torch.tensor([0.5, 1.5, 1.0, 1.0]))
    assert torch.equal(levels.errors[1:8], torch.ones(7))


def test_velocity_loss_with_uncertainty_weighting():
    recipe = small()
    transformer, schedule = new_transformer(recipe), NoiseSchedule(make_scheduler(recipe)[1])
    nn.init.normal_(transformer.proj_out.weight)
    options = TransformerTraining(weighting="uncertainty", logit_mean=0.5, balance_weight=0.0)
    loss = VelocityLoss(transformer, schedule, options).eval()
    loss.levels.errors.copy_(torch.arange(1, 17))
    latents, text = torch.randn(16, 3, 4, 8, 8), torch.randn(16, 16, 50)
    torch.manual_seed(1)
    found = loss(latents, text)
    torch.manual_seed(1)
    quantiles = stratified_quantiles(16)  # one in each bin, whose error is its rank from 1 on
    timestep, noise = quantile_timesteps(quantiles, 1000, 0.5), torch.randn_like(latents)
    v = transformer(schedule.add_noise(latents, noise, timestep), text, timestep)
    errors = (v - schedule.velocity(latents, noise, timestep)).square().flatten(1).mean(1)
    torch.testing.assert_close(found["velocity"], errors.mean().detach())
    torch.testing.assert_close(found["loss"], (errors / (quantiles.argsort().argsort() + 1)).mean())


def test_dropped_texts_are_empty():
    text, empty = torch.ones(1000, 2, 3), torch.zeros(1, 2, 3)
    draws = Draws(0, 0, range(1000), 1000)
    kept = drop_text(text, empty, 0.25, draws)
    rows = kept.flatten(1).mean(1)
    assert set(rows.tolist()) == {0.0, 1.0} and 0.18 < 1 - rows.mean() < 0.32
    assert torch.equal(drop_text(text, empty, 0.0, draws), text)
    assert torch.equal(drop_text(text, empty, 1.0, draws), empty.expand_as(text))


def test_mean_losses():
    both = mean_losses([{"a": torch.tensor(1.0)}, {"a": torch.tensor(3.0)}])
    assert both == {"a": torch.tensor(2.0)}


@pytest.mark.parametrize("factorized", [True, False])
def test_initialised_vae_treats_frames_separately(factorized):
    torch.manual_seed(0)
    vae = CausalVAE(
        VAEConfig(block_out_channels=(8, 16, 16), norm_num_groups=4, factorized=factorized)
    )
    init_vae(vae)
    convs = [m for m in vae.modules() if isinstance(m, CausalConv)]
    for conv in convs:
        x = torch.randn(1, conv.weight.shape[1], 3, 4, 4)
        alone = torch.cat([conv(frame) for frame in x.split(1, 2)], 2)
        torch.testing.assert_close(conv(x), alone)
    assert len(convs) > 10


def test_initialised_vae_keeps_the_variance():
    recipe = small(vae={"block_out_channels": [16, 32, 32, 32]}, seed=1)
    clips = torch.stack([ProceduralClips("train", 8, 5, 32, 32)[i].video for i in range(8)])

    def varied(vae):
        """Deviation over reconstructions, relative to that over clips."""
        with torch.no_grad():
            again = vae.decode(vae.encode(clips).mode())
        return float(again.std(0).mean() / clips.std(0).mean())

    torch.manual_seed(1)
    assert varied(CausalVAE(recipe.vae)) < 0.1  # by torch's own weights hardly at all
    assert 0.3 < varied(new_vae(recipe)) < 3


def test_recolor_maps_a_clip_by_one_function():
    torch.manual_seed(0)
    video = torch.stack([ProceduralClips("train", 300, 2, 16, 16)[i].video for i in range(300)])
    draws = Draws(0, 0, range(300), 300)
    assert recolor(video, 0.0, draws) is video
    other = recolor(video, 0.5, draws)
    kept = (other == video).flatten(1).all(1)
    assert 110 < kept.sum() < 190
    assert other.min() == -1 and other.max() == 1
    for clip, new in zip(video[~kept], other[~kept], strict=True):
        pixels = torch.cat([clip.movedim(1, -1).flatten(0, 2), new.movedim(1, -1).flatten(0, 2)], 1)
        colours = pixels.unique(dim=0)  # of what was alike, before and after, all is alike
        assert len(colours) == len(colours[:, :3].unique(dim=0))


def test_muon_trains_hidden_matrices_and_adamw_the_rest():
    """Every weight has one optimizer; a step of Muon goes about as far in every direction."""
    recipe = small()
    model = new_transformer(recipe)
    names = {parameter: name for name, parameter in model.named_parameters()}
    made = make_optimizers(model, recipe.transformer_training)
    rest, hidden = (
        [p for group in optimizer.param_groups for p in group["params"]] for optimizer in made
    )
    assert len({*rest, *hidden}) == len(rest) + len(hidden) == len(names)
    # q, k, v, the output; two matrices of one expert for text, of two for video; no router
    assert len(hidden) == 4 + 2 + 4
    assert all(p.ndim == 2 and (".attn1.to_" in names[p] or ".ff." in names[p]) for p in hidden)
    (plain,) = make_optimizers(model, recipe.vae_training)
    assert len(plain.param_groups[0]["params"]) == len(names)
    before = {p: p.detach().clone() for p in hidden}
    for parameter in hidden:
        parameter.grad = torch.randn_like(parameter)
    muon = list(made)[1]
    for group in muon.param_groups:
        group["lr"] = made[muon]
    muon.step()
    for parameter in hidden:
        lengths = torch.linalg.svdvals(before[parameter] - parameter.detach())
        assert 0 < lengths.max() < 3 * lengths.min(), names[parameter]


def test_muon_on_a_cpu_is_torchs_without_bfloat16():
    start, gradient = torch.randn(2, 24, 40, generator=torch.Generator().manual_seed(0))
    steps = []
    for kind in (Muon, torch.optim.Muon):
        parameter = nn.Parameter(start.clone())
        parameter.grad = gradient.clone()
        kind([parameter], lr=1.0, weight_decay=0.0).step()
        steps.append(start - parameter.detach())
        assert parameter.dtype == torch.float32 and parameter.grad.equal(gradient)
    ours, rounded = steps
    assert torch.linalg.norm(ours - rounded) < 0.03 * torch.linalg.norm(rounded)
    assert not torch.allclose(ours, rounded, rtol=1e-4, atol=1e-4)


def test_emulated_bfloat16_warns(monkeypatch):
    capability = {"name": "AVX2"}
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability["name"])
    with pytest.warns(UserWarning, match="no instructions for bfloat16.*float32 is faster"):
        warn_if_bfloat16_is_emulated("bfloat16", torch.device("cpu"))
    warn_if_bfloat16_is_emulated("float32", torch.device("cpu"))
    warn_if_bfloat16_is_emulated("bfloat16", torch.device("cuda"))
    capability["name"] = "AVX512"
    warn_if_bfloat16_is_emulated("bfloat16", torch.device("cpu"))
