"""Whole trainings: files, resume with the same bits, options, `cogvx score` and `demo`."""

import json
import os
import shutil
import signal
from functools import partial

import pytest
import torch
from safetensors.torch import load_file

from cogvx import CogVideoX
from cogvx.checkpoint import load_vae
from cogvx.cli import main
from cogvx.data import LatentClips
from cogvx.shapes import ProceduralClips, commands
from cogvx.shapes.scoring import score_vae
from cogvx.training import loop, plotting, train, trainer
from cogvx.training.checkpointing import RunFolder
from cogvx.training.losses import VelocityLoss
from cogvx.video import probe
from tests.harness.workers import run_cases

from ..clips import BIKES
from .recipes import STEPS, small


def weights(folder):
    """All tensors of the model in a folder."""
    files = sorted(folder.glob("*/diffusion_pytorch_model.safetensors"))
    return {f"{f.parent.name}.{k}": t for f in files for k, t in load_file(f).items()}


def curve(folder, stage):
    lines = (folder / "training" / stage / "losses.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def assert_same(one, two):
    assert one.keys() == two.keys() and one
    for name in one:
        assert torch.equal(one[name], two[name]), name


WHOLE = []


@pytest.fixture
def whole(tmp_path_factory):
    """Folder of an uninterrupted training, made once; in a test, where "auto" is the reference."""
    if not WHOLE:
        folder = tmp_path_factory.mktemp("whole")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(loop, "plot_losses", plotting.plot_losses)
            train(small(), folder)
        WHOLE.append(folder)
    return WHOLE[0]


def test_training_writes_a_model_and_its_records(whole):
    pipe = CogVideoX.from_pretrained(whole)
    video = pipe.generate("a red circle moves right", steps=2, seed=0, height=16, width=16)
    assert video.shape == (1, 5, 3, 16, 16)
    assert pipe.vae.config.scaling_factor != small().vae.scaling_factor
    for stage in ("vae", "transformer"):
        points = curve(whole, stage)
        assert [point["step"] for point in points] == [2, 4, 6]
        assert all(point["loss"] > 0 and point["gradient"] > 0 for point in points)
        kept = sorted(p.name for p in (whole / "training" / stage / "checkpoints").iterdir())
        assert kept == ["00000004", "00000006"]
        for name in ("losses.png", "samples.png"):
            assert (whole / "training" / stage / name).read_bytes()[:4] == b"\x89PNG"


def test_scaled_latents_have_unit_deviation(whole):
    pipe = CogVideoX.from_pretrained(whole)
    clips = ProceduralClips("train", trainer.SCALING_CLIPS, 5, 16, 16)
    video = torch.stack([clips[i].video for i in range(trainer.SCALING_CLIPS)])
    with torch.no_grad():
        latents = pipe.vae.config.scaling_factor * pipe.vae.encode(video).mean
    assert latents.square().mean().sqrt() == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("posterior", ["mode", "sample"])
def test_posterior_chooses_modes_or_samples(tmp_path, monkeypatch, posterior):
    learned = []

    class Loss(VelocityLoss):
        def forward(self, latents, *others):
            learned.extend(latents)
            return super().forward(latents, *others)

    monkeypatch.setattr(trainer, "VelocityLoss", Loss)
    once = {"steps": 2, "save_every": 2, "sample_every": 2}
    options = {**once, "posterior": posterior}
    train(small(vae_training=once, transformer_training=options), tmp_path)
    vae = load_vae(tmp_path)
    moments = [clip.moments.float() for clip in LatentClips(tmp_path / "latents", vae)]
    modes = [vae.config.scaling_factor * one.chunk(2, 1)[0] for one in moments]
    exact = [any(torch.equal(one, mode) for mode in modes) for one in learned]
    assert len(exact) == 8 and set(exact) == {posterior == "mode"}


def test_same_recipe_gives_the_same_bits(whole, tmp_path):
    train(small(), tmp_path)
    assert_same(weights(whole), weights(tmp_path))
    assert [curve(whole, s) for s in ("vae", "transformer")] == [
        curve(tmp_path, s) for s in ("vae", "transformer")
    ]


def test_another_seed_gives_other_weights(whole, tmp_path):
    once = {"save_every": STEPS, "sample_every": STEPS}
    train(small(seed=1, vae_training=once), tmp_path, stages=["vae"])
    vae = {name: t for name, t in weights(whole).items() if name.startswith("vae.")}
    assert any(not torch.equal(t, vae[name]) for name, t in weights(tmp_path).items())


class Stopped(Exception):
    pass


@pytest.mark.parametrize("stage", ["vae", "transformer"])
def test_resume_after_any_step_gives_the_same_bits(whole, tmp_path, stage):
    """Stop one training before each of its steps."""
    if stage == "transformer":
        for name in ("recipe.json", "vae", "latents"):
            copy = shutil.copy if name.endswith(".json") else shutil.copytree
            copy(whole / name, tmp_path / name)
    for at in range(STEPS):

        def stop(name, done, total, at=at):
            if name == stage and done == at:
                raise Stopped

        with pytest.raises(Stopped):
            train(small(), tmp_path, stages=[stage], progress=stop)
        assert RunFolder(tmp_path, small()).stage(stage).latest()[0] == at // 2 * 2
    train(small(), tmp_path, stages=[stage])
    ours, theirs = (
        {name: t for name, t in weights(folder).items() if name.startswith(f"{stage}.")}
        for folder in (tmp_path, whole)
    )
    assert_same(ours, theirs)
    assert curve(whole, stage) == curve(tmp_path, stage)


def test_resume_after_sigkill_gives_the_same_bits(whole, tmp_path, plots):
    """SIGKILL during a step, two checkpoints and a plot, each in a process of its own."""

    def training(end):
        """Train up to the step or the file of that name, which is written but not yet in place."""

        def reached(name):
            if end in name:
                os.kill(os.getpid(), signal.SIGKILL)

        def synced(handle, sync=os.fsync):
            reached(os.readlink(f"/proc/self/fd/{handle}"))
            sync(handle)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "fsync", synced)
            train(small(), tmp_path, progress=lambda stage, done, _: reached(f"{stage} {done}"))

    ends = ["vae/checkpoints/.00000002.part/__0_0.distcp", "vae 3", "vae/.losses",
            "transformer/checkpoints/.00000004.part/.metadata"]  # fmt: skip
    for end in ends:
        [outcome] = run_cases(training, [end])
        assert (outcome.status, outcome.detail) == ("crashed", "SIGKILL"), outcome
    [outcome] = run_cases(training, ["/no such file"])
    assert outcome.ok, outcome
    assert_same(weights(whole), weights(tmp_path))
    for stage in ("vae", "transformer"):
        assert curve(whole, stage) == curve(tmp_path, stage)


def test_another_recipe_is_refused(whole, tmp_path):
    with pytest.raises(ValueError, match=r"another recipe: seed 0 there, 1 here"):
        train(small(seed=1), whole)
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match="must be an empty folder"):
        train(small(), tmp_path)
    assert (tmp_path / "mine.txt").read_text() == "mine"


def test_a_recipe_may_change_where_its_steps_are_the_same(tmp_path):
    RunFolder(tmp_path, small())
    same = {"accumulate": 2, "gradient_checkpointing": True, "shard": True}
    RunFolder(tmp_path, small(transformer_training=same))
    with pytest.raises(
        ValueError, match="transformer_training.learning_rate 0.002 there, 0.5 here"
    ):
        RunFolder(tmp_path, small(transformer_training={"learning_rate": 0.5}))


def test_transformer_stage_requires_a_vae(tmp_path):
    with pytest.raises(ValueError, match="train the stage vae first"):
        train(small(), tmp_path, stages=["transformer"])


def test_non_finite_gradients_stop_the_training(tmp_path):
    recipe = small(vae_training={"learning_rate": 1e5, "max_grad_norm": 1e5, "warmup": 0})
    with pytest.raises(FloatingPointError, match=r"vae: step \d has a gradient that is not finite"):
        train(recipe, tmp_path, stages=["vae"])


@pytest.mark.filterwarnings("ignore:train. this CPU has no instructions for bfloat16")
@pytest.mark.parametrize(
    "options",
    [{"accumulate": 2}, {"gradient_checkpointing": True}, {"precision": "bfloat16"}],
    ids=str,
)
def test_options_give_about_the_same_losses(whole, tmp_path, options):
    """Accumulation, gradient checkpointing and bfloat16 have other bits."""
    changes = {**options, "save_every": STEPS, "sample_every": STEPS}
    points = train(small(vae_training=changes, transformer_training=changes), tmp_path)
    for stage, came in points.items():
        losses = [(a["loss"], b["loss"]) for a, b in zip(came, curve(whole, stage), strict=True)]
        assert all(abs(a - b) < 0.3 * b for a, b in losses), losses
    if "gradient_checkpointing" in options:
        for name, tensor in weights(whole).items():
            torch.testing.assert_close(weights(tmp_path)[name], tensor, rtol=1e-3, atol=1e-4)


def test_losses_fall(tmp_path):
    often = {"steps": 30, "log_every": 10, "save_every": 30, "sample_every": 30,
             "learning_rate": 1e-2}  # fmt: skip
    curves = train(small(vae_training=often, transformer_training=often), tmp_path)
    for points in curves.values():
        assert points[-1]["loss"] < 0.8 * points[0]["loss"]


def test_score_and_demo_of_a_trained_model(whole, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(commands, "score_vae", partial(score_vae, clips=4))
    model = ["--model", str(whole), "--steps", "2"]
    assert main(["score", *model, "--prompts", "4", "--json"]) == 0
    scores = json.loads(capsys.readouterr().out)
    assert scores["prompts"] == 4 and 0 <= scores["all"] <= scores["count"] <= 1
    assert scores["psnr_db"] > 0
    assert main(["score", *model, "--prompts", "4"]) == 0
    assert "held-out clips through the VAE" in capsys.readouterr().out

    out = tmp_path / "out"
    demo = ["demo", *model, "--out", str(out), "--prompt"]
    assert main([*demo, "a red ball moves right"]) == 1
    error = capsys.readouterr().err
    assert "got 'ball'" in error and "circle" in error and not out.exists()
    assert main([*demo, "A red circle moves right.", "--clip", str(BIKES), "--json"]) == 0
    runs = json.loads(capsys.readouterr().out)["runs"]
    assert [run["what"] for run in runs][0] == "A red circle moves right."
    assert runs[1]["psnr_db"] > 0 and all(run["seconds"] > 0 for run in runs)
    name = "a-red-circle-moves-right-seed0"
    made = [f"{name}.gif", f"{name}.mp4", f"{name}.png", "bikes-reconstructed.mp4"]
    assert sorted(path.name for path in out.iterdir()) == made
    info = probe(out / f"{name}.mp4")
    assert (info.frames, info.height, info.width) == (5, 64, 64)
