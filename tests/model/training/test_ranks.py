"""Trainings on several ranks: the losses, weights and files of one process."""

import json
import os
import shutil
import signal

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from cogvx import CogVideoX, training
from cogvx.cli import loading, main
from cogvx.cli.outputs import claimed
from cogvx.parallel import launch
from cogvx.training import loop, sharding, train, trainer
from cogvx.training.checkpointing import RunFolder
from cogvx.training.sharding import World, shard
from tests.harness.selection import rest
from tests.parallel import ranks

from .recipes import small

OFTEN = {"steps": 3, "batch_size": 12, "accumulate": 2, "save_every": 1, "log_every": 1,
         "sample_every": 2, "learning_rate": 1e-3, "warmup": 2}  # fmt: skip
ONCE = {"steps": 1, "batch_size": 4, "save_every": 1, "log_every": 1, "sample_every": 1}
OPTIONS = {
    "replicated": {},
    "sharded": {"shard": True, "gradient_checkpointing": True},
    "muon": {"shard": True, "optimizer": "muon"},
    "uncertainty": {"shard": True, "weighting": "uncertainty"},
    "context": {"context": 2},
    "context, sharded": {"context": 2, "shard": True, "gradient_checkpointing": True},
    "bfloat16": {"shard": True, "precision": "bfloat16"},
}
ALONE = {}  # folders by options that change a result


def recipe_of(**options):
    plain = {"optimizer": "adamw"}
    return small(vae_training=ONCE, transformer_training={**OFTEN, **plain, **options})


def begin(recipe, folder, vae):
    """A folder whose VAE and latents are there, so that only the transformer is left to train."""
    RunFolder(folder, recipe)
    for name in ("vae", "latents"):
        shutil.copytree(vae / name, folder / name)
    return folder


@pytest.fixture
def vae(tmp_path_factory):
    if "vae" not in ALONE:
        ALONE["vae"] = tmp_path_factory.mktemp("vae")
        train(small(vae_training=ONCE, transformer_training=ONCE), ALONE["vae"])
    return ALONE["vae"]


@pytest.fixture
def alone(vae, tmp_path_factory):
    """Folder of the training of one process, by options."""

    def made(options):
        key = json.dumps({k: v for k, v in options.items() if k in ("optimizer", "weighting")})
        if key not in ALONE:
            recipe = recipe_of(**json.loads(key))
            ALONE[key] = begin(recipe, tmp_path_factory.mktemp("alone"), vae)
            train(recipe, ALONE[key], stages=["transformer"])
        return ALONE[key]

    return made


class Stopped(Exception):
    pass


def work(recipe, folder, last=None, act=None, stage="transformer"):
    """Train one stage up to a step, where the first rank stops or calls `act`."""
    clip = nn.utils.clip_grad_norm_

    def checked(parameters, *others):
        assert all(parameter.grad is not None for parameter in parameters)
        return clip(parameters, *others)

    def progress(name, done, total):
        if name == stage and done == last and act is None:
            raise Stopped
        if name == stage and done == last:
            act()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.utils, "clip_grad_norm_", checked)
        try:
            return train(recipe, folder, stages=[stage], progress=progress)
        except Stopped:
            return {}


def stop_all(recipe, folder, last):
    """Save at step `last`, and stop there on every rank."""
    plain = loop.Loop._step

    def step(self, number, clips):
        if number == last:
            raise Stopped
        return plain(self, number, clips)

    loop.Loop._step = step  # of this forked process
    return work(recipe, folder)


def curve(folder, stage="transformer"):
    lines = (folder / "training" / stage / "losses.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def weights(folder, part="transformer"):
    return load_file(folder / part / "diffusion_pytorch_model.safetensors")


def assert_close(folder, wanted, tolerance=1e-6):
    """Losses, norms of gradients and weights are within a tolerance of those of one process."""
    ours, theirs = curve(folder), curve(wanted)
    assert [point["step"] for point in ours] == [point["step"] for point in theirs]
    for point, other in zip(ours, theirs, strict=True):
        assert point.keys() == other.keys()
        for name in point:
            assert point[name] == pytest.approx(other[name], rel=tolerance), (point["step"], name)
    ours, theirs = weights(folder), weights(wanted)
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=tolerance)


@pytest.mark.filterwarnings("ignore:train. this CPU has no instructions for bfloat16")
@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("replicated", 2),
        ("sharded", 3),
        ("context", 2),
        rest("muon", 2),  # `test_a_training_goes_on_with_another_number_of_ranks` has it
        rest("replicated", 3),
        rest("sharded", 2),
        rest("muon", 3),
        rest("uncertainty", 2),
        rest("uncertainty", 3),
        rest("context, sharded", 4),
        rest("bfloat16", 2),
    ],
)
def test_a_training_on_ranks_is_that_of_one_process(alone, vae, tmp_path, name, size):
    recipe = recipe_of(**OPTIONS[name], save_every=3)
    begin(recipe, tmp_path / "run", vae)
    points, *others = ranks.run(work, size, recipe, tmp_path / "run")
    assert points["transformer"] == curve(tmp_path / "run") and not any(others)
    assert_close(tmp_path / "run", alone(OPTIONS[name]), 0.02 if name == "bfloat16" else 1e-6)
    sheet = tmp_path / "run" / "training" / "transformer" / "samples.png"
    assert sheet.read_bytes()[:4] == b"\x89PNG"
    pipe = CogVideoX.from_pretrained(tmp_path / "run")
    video = pipe.generate("a red circle moves right", steps=1, seed=0, height=16, width=16)
    assert video.isfinite().all()


@pytest.mark.parametrize("name", ["muon", rest("sharded"), rest("uncertainty"), rest("replicated")])
def test_a_training_goes_on_with_another_number_of_ranks(alone, vae, tmp_path, name):
    """2, 1, then 3 ranks."""
    recipe, folder = recipe_of(**OPTIONS[name]), tmp_path / "run"
    begin(recipe, folder, vae)
    ranks.run(stop_all, 2, recipe, folder, 1)
    assert [point["step"] for point in curve(folder)] == [1]
    work(recipe, folder, last=2)
    assert [point["step"] for point in curve(folder)] == [1, 2]
    ranks.run(work, 3, recipe, folder)
    assert_close(folder, alone(OPTIONS[name]))


def generated(folder, sharded):
    pipe = CogVideoX.from_pretrained(folder)
    if sharded:
        world = World(torch.device("cpu"), torch.distributed.get_rank(), 2)
        shard(pipe.transformer, world, recipe_of().transformer_training)
    size = {"num_frames": 5, "height": 16, "width": 16}
    return pipe.generate("a red circle moves right", steps=3, seed=0, guidance=2.0, **size)


def test_sharded_weights_generate_the_same_clip(vae):
    """`project_text` and `modulations` are called beside FSDP2's forward."""
    wanted = generated(vae, False)
    for clip in ranks.run(generated, 2, vae, True):
        torch.testing.assert_close(clip, wanted, rtol=0, atol=1e-5)


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


def save_and_die(recipe, folder):
    """The first rank is killed when its first checkpoint is written, but not yet in place."""
    plain = loop.save_state

    def save_state(state, folder):
        plain(state, folder)
        if torch.distributed.get_rank() == 0:
            kill()

    loop.save_state = save_state  # of this forked process
    return work(recipe, folder)


@pytest.mark.parametrize("steps", [(2,), rest((0, 1, 2))], ids=str)
def test_a_killed_training_goes_on(alone, vae, tmp_path, steps):
    """A rank is killed in its first checkpoint, then before some steps; the others end too."""
    recipe, folder = recipe_of(**OPTIONS["sharded"]), tmp_path / "run"
    begin(recipe, folder, vae)
    stage = RunFolder(folder, recipe).stage("transformer")
    with pytest.raises(ranks.RankFailure, match="rank 0 of 2: ended by SIGKILL"):
        ranks.run(save_and_die, 2, recipe, folder)
    assert stage.latest() == (0, None)
    for at in steps:
        with pytest.raises(ranks.RankFailure, match="rank 0 of 2: ended by SIGKILL"):
            ranks.run(work, 2, recipe, folder, at, kill)
        assert stage.latest()[0] == at
    ranks.run(work, 2, recipe, folder)
    assert_close(folder, alone(OPTIONS["sharded"]))


def test_a_vae_goes_on_with_another_number_of_ranks(tmp_path):
    """2, then 3 ranks; samples are reconstructions of the average."""
    options = {**OFTEN, "frames": 3, "image_steps": 2, "save_every": 2}
    recipe = small(vae_training=options, transformer_training=ONCE)
    ranks.run(work, 2, recipe, tmp_path / "run", None, None, "vae")
    shutil.rmtree(tmp_path / "run" / "training" / "vae" / "checkpoints" / "00000003")
    ranks.run(work, 3, recipe, tmp_path / "run", None, None, "vae")
    work(recipe, tmp_path / "alone", stage="vae")
    for one, other in zip(curve(tmp_path / "run", "vae"), curve(tmp_path / "alone", "vae"),
                          strict=True):  # fmt: skip
        assert one == pytest.approx(other, rel=1e-6)
    ours, theirs = (weights(tmp_path / name, "vae") for name in ("run", "alone"))
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=2e-6)


def test_ranks_that_cannot_share_a_batch_are_refused_first(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="context must divide .* got context 2 and 1 ranks"):
        train(recipe_of(context=2), tmp_path / "run")
    monkeypatch.setattr(trainer, "start", lambda device: World(device, 0, 5))
    with pytest.raises(ValueError, match="batch_size must be a multiple of the 10 shares"):
        train(recipe_of(), tmp_path / "run", stages=["transformer"])
    assert not (tmp_path / "run").exists()


@pytest.fixture
def variables(monkeypatch):
    """Those of a process that something other than torchrun started."""
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    values = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "WORLD_SIZE": "1"}
    for name, value in {**dict.fromkeys(launch.VARIABLES, "0"), **values}.items():
        monkeypatch.setenv(name, value)


@pytest.mark.usefixtures("variables")
def test_variables_without_torchrun_start_ranks():
    try:
        world = sharding.start(torch.device("cpu"))
        assert torch.distributed.is_initialized() and (world.rank, world.size) == (0, 1)
    finally:
        launch.stop()


@pytest.mark.usefixtures("variables")
def test_the_first_rank_locks_the_folder(tmp_path, monkeypatch, capsys):
    command = ["train", "tiny", "--device", "cpu", "--quiet", "--out", str(tmp_path / "run")]
    monkeypatch.setattr(training, "train", lambda *_, **__: {})
    with claimed(tmp_path / "run"):
        assert main(command) == 1
        assert "another command is writing it" in capsys.readouterr().err
        monkeypatch.setenv("RANK", "1")
        assert main(command) == 0


@pytest.mark.usefixtures("variables")
def test_one_gpu_for_all_ranks_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(loading, "devices", lambda: ["cpu", "cuda", "cuda:0", "cuda:1"])
    assert main(["train", "tiny", "--device", "cuda:1", "--out", str(tmp_path / "run")]) == 1
    assert "--device must be cpu or cuda under torchrun" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_of_another_format_is_refused(vae, tmp_path):
    recipe = recipe_of()
    begin(recipe, tmp_path / "run", vae)
    stage = RunFolder(tmp_path / "run", recipe).stage("transformer")
    (stage.checkpoints / "00000002").mkdir()
    (stage.checkpoints / "00000002" / "model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="00000002: is no checkpoint of this version of cogvx"):
        work(recipe, tmp_path / "run")


def test_shard_and_context_may_change(tmp_path):
    RunFolder(tmp_path, recipe_of(shard=True))
    assert RunFolder(tmp_path, recipe_of(context=2)).recipe.transformer_training.context == 2
    with pytest.raises(ValueError, match="another recipe: transformer_training.steps 3 there"):
        RunFolder(tmp_path, recipe_of(steps=8))
