"""Scores of a model that draws its prompts, some of them wrong, and of the control."""

import pytest
import torch

from cogvx.factorized import build_vae
from cogvx.shapes import ProceduralClips, parse, scoring
from cogvx.shapes.drawing import draw, place
from cogvx.shapes.scoring import Scores, held_out_prompts, score_model, score_vae
from cogvx.vae import CausalVAE
from cogvx.video import psnr


class Drawer:
    """A pipeline that draws the prompts, some of them wrong."""

    def __init__(self, wrong=()):
        self.wrong = wrong
        self.calls = []

    def generate(self, prompts, *, steps, guidance, seed):
        self.calls.append((len(prompts), steps, guidance, seed))
        generator, videos = torch.Generator().manual_seed(seed), []
        for prompt in prompts:
            scene = parse("a red circle stands still" if prompt in self.wrong else prompt)
            videos.append(draw(place(scene, generator), scene.ground, 17, 64, 64))
        return torch.stack(videos)


def test_held_out_prompts_are_in_no_training_clip():
    scenes = held_out_prompts(50)
    clips = ProceduralClips("train", 1000)
    assert len(scenes) == 50 and all(parse(caption) == scene for caption, scene in scenes.items())
    assert not scenes.keys() & {clips[i].caption for i in range(1000)}
    assert list(held_out_prompts(20, skip=30).items()) == list(scenes.items())[30:]


def test_too_many_held_out_prompts_are_refused(monkeypatch):
    monkeypatch.setattr(scoring, "ProceduralClips", lambda split, length: ProceduralClips(split, 9))
    with pytest.raises(ValueError, match=r"skip \+ count must be at most 9; got 8 \+ 2"):
        held_out_prompts(2, skip=8)


def test_skip_leaves_out_the_first_prompts():
    first = list(held_out_prompts(20))[:10]
    assert score_model(Drawer(first), 20)[0].all == 0.5
    assert score_model(Drawer(first), 10, skip=10)[0].all == 1.0


def test_scores_of_a_perfect_model_and_its_control():
    progress, pipe = [], Drawer()
    scores, control = score_model(
        pipe, 60, steps=3, guidance=2.0, seed=5, progress=lambda *now: progress.append(now)
    )
    assert scores == Scores(60, 1.0, 1.0, 1.0, 1.0, 1.0)
    assert control.all < 0.1 and control.count < 0.8 and control.color < 0.5
    assert pipe.calls == [(10, 3, 2.0, seed) for seed in range(5, 11)] and progress[-1] == (60, 60)


def test_wrong_clips_lower_the_scores():
    wrong = [p for p, scene in held_out_prompts(40).items() if len(scene.things) == 2][:10]
    scores, _ = score_model(Drawer(wrong), 40)
    assert scores.count == scores.all == scores.shape == 0.75


def test_score_vae_is_the_psnr_of_all_values():
    torch.manual_seed(0)
    vae = CausalVAE.of(*build_vae(latent_channels=4, base_channels=4)).eval()
    clips = ProceduralClips("test", 3)
    videos = torch.stack([clips[i].video for i in range(3)])
    with torch.no_grad():
        assert score_vae(vae, 3) == pytest.approx(psnr(videos, vae(videos)), abs=0.01)
