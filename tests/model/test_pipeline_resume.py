"""A generation that is interrupted, anywhere: nothing is spoiled, and it goes on bit for bit."""

import random

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from cogvx.checkpoint import CheckpointError, read_tensors, write_tensors
from cogvx.checkpoint.record import fingerprint, fingerprint_of_weights
from cogvx.checkpoint.tensors import TensorFile
from cogvx.pipeline import resume
from cogvx.pipeline.resume import decode_saved

from .tiny_pipeline import embeds, picture, tiny, vae_config

STEPS = 4
MODES = {
    "text": ("5b", {"num_frames": 9}),
    "padded": ("1.5", {"num_frames": 9}),
    "image": ("1.5-i2v", {"num_frames": 9, "image": picture(1)}),
    "video": ("5b", {"video": picture(1, 9), "strength": 1.0}),
}


class Killed(Exception):
    pass


def kill_at(step):
    def callback(now, timestep, latents):
        if now == step:
            raise Killed

    return callback


@pytest.mark.parametrize("solver", ["ddim", "dpm"])
@pytest.mark.parametrize("mode", MODES)
def test_resumed_after_any_step_it_is_the_same_video(tmp_path, mode, solver):
    kind, given = MODES[mode]
    given = {**given, "prompt": "a panda", "steps": STEPS, "solver": solver, "seed": 3}
    whole = tiny(kind).generate(**given, dynamic_guidance=True)
    path = tmp_path / "latents.safetensors"
    for step in range(1, STEPS):
        with pytest.raises(Killed):
            tiny(kind).generate(
                **given,
                dynamic_guidance=True,
                save_latents=path,
                checkpoint_every=1,
                callback=kill_at(step),
            )
        steps = []
        pipe = tiny(kind)  # another process would have read it from its folder
        pipe.text_encoder = pipe.vae.encode = None  # nothing is encoded again
        video = pipe.generate(
            **given,
            dynamic_guidance=True,
            resume=path,
            save_latents=path,
            checkpoint_every=1,
            callback=lambda now, timestep, latents, steps=steps: steps.append(now),
        )
        assert steps == list(range(step, STEPS))
        assert torch.equal(video, whole)
        assert torch.equal(decode_saved(pipe.vae, path), whole)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_latents_saved_decode_to_the_video(tmp_path):
    path, pipe = tmp_path / "latents.safetensors", tiny("1.5")
    video = pipe.generate("a", steps=2, num_frames=9, save_latents=path)
    calls = []
    came = pipe.decode_saved(path, progress=lambda *now: calls.append(now))
    assert torch.equal(came, video) and calls == [("decode", 0, 1), ("decode", 1, 1)]
    options = {"prompt": "a", "steps": 2, "num_frames": 9, "resume": path}
    assert torch.equal(pipe.generate(**options), video)  # and nothing is denoised
    latents = pipe.generate(**options, output="latents")
    assert torch.equal(latents, read_tensors(path)[0]["latents"])
    assert list(read_tensors(path)[0]) == ["latents"]


def test_a_video_without_a_seed_can_be_resumed_too(tmp_path):
    path, pipe = tmp_path / "latents.safetensors", tiny()
    given = {"prompt": "a", "steps": 3, "num_frames": 9, "solver": "dpm"}
    torch.manual_seed(11)
    whole = pipe.generate(**given)
    torch.manual_seed(11)
    with pytest.raises(Killed):
        pipe.generate(**given, save_latents=path, checkpoint_every=1, callback=kill_at(1))
    assert torch.equal(pipe.generate(**given, resume=path), whole)


def test_several_generators_go_on_where_each_was(tmp_path):
    def given(*seeds):
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        return {"prompt": ["a", "b"], "steps": STEPS, "solver": "dpm", "generator": generators}

    path, pipe = tmp_path / "latents.safetensors", tiny()
    whole = pipe.generate(**given(3, 4))
    with pytest.raises(Killed):
        pipe.generate(**given(3, 4), save_latents=path, checkpoint_every=1, callback=kill_at(1))
    assert torch.equal(pipe.generate(**given(5, 6), resume=path), whole)
    with pytest.raises(CheckpointError, match='generator "cpu, cpu" there, "cpu" here'):
        pipe.generate(**{**given(3), "seed": 3, "generator": None}, resume=path)


def test_checkpoints_are_as_far_apart_as_requested(tmp_path):
    path, pipe = tmp_path / "latents.safetensors", tiny()
    kept = []

    def callback(step, timestep, latents):
        kept.append(path.read_bytes() if path.exists() else b"")

    pipe.generate(
        "a", steps=7, num_frames=9, save_latents=path, checkpoint_every=3, callback=callback
    )
    changed = [one != two for one, two in zip(kept, kept[1:], strict=False)]
    assert changed == [False, False, True, False, False, True]  # after steps 3 and 6


MISMATCHES = {
    "steps": ({"steps": 5}, "steps 4 there, 5 here"),
    "guidance": ({"guidance": 3.0}, "guidance 6.0 there, 3.0 here"),
    "dynamic": ({"dynamic_guidance": True}, "dynamic_guidance false there, true here"),
    "solver": ({"solver": "dpm"}, 'solver "ddim" there, "dpm" here'),
    "compat": ({"compat": True}, "compat false there, true here"),
    "prompt": ({"prompt": "a bear"}, r'prompt \["a"\] there, \["a bear"\] here'),
    "negative": ({"negative_prompt": "b"}, 'negative_prompt "" there, "b" here'),
    "embeddings": ({"prompt": None, **embeds()}, "prompt_embeds null there"),
    "seed": ({"seed": 4}, "seed 3 there, 4 here"),
    "frames": ({"num_frames": 17}, "frames 9 there, 17 here"),
    "size": ({"height": 48}, "height 32 there, 48 here"),
    "cfg": ({"cfg": "two_pass"}, 'cfg "batch" there, "two_pass" here'),
    "uncond": ({"uncond": "zeros"}, 'uncond "prompt" there, "zeros" here'),
}


@pytest.fixture(scope="module")
def unfinished(tmp_path_factory):
    """A file after 2 of 4 steps, and its options."""
    path = tmp_path_factory.mktemp("saved") / "latents.safetensors"
    given = {"prompt": "a", "steps": STEPS, "num_frames": 9, "seed": 3}
    with pytest.raises(Killed):
        tiny().generate(**given, save_latents=path, checkpoint_every=2, callback=kill_at(3))
    return path, given


@pytest.mark.parametrize("name", MISMATCHES)
def test_other_options_are_refused_by_name(unfinished, name):
    path, given = unfinished
    options, match = MISMATCHES[name]
    with pytest.raises(CheckpointError, match=match):
        tiny().generate(**{**given, **options}, resume=path)


def test_other_models_are_refused_by_name(unfinished):
    path, given = unfinished
    with pytest.raises(CheckpointError, match="transformer.weights .*vae.weights "):
        tiny(seed=1).generate(**given, resume=path)
    pipe = tiny()
    list(pipe.transformer.parameters())[-1].data[-1] += 1e-6
    with pytest.raises(CheckpointError, match="transformer.weights"):
        pipe.generate(**given, resume=path)
    pipe = tiny()
    pipe.transformer.bfloat16()
    with pytest.raises(CheckpointError, match='dtype "torch.float32" there, "torch.bfloat16" here'):
        pipe.generate(**given, resume=path)
    with pytest.raises(CheckpointError, match="transformer.patch_size_t null there, 2 here"):
        tiny("1.5").generate(**given, resume=path)
    pipe = tiny()
    pipe.vae.config = vae_config("5b", scaling_factor=1.15)
    with pytest.raises(CheckpointError, match="vae.scaling_factor 0.7 there, 1.15 here"):
        pipe.generate(**given, resume=path)


def test_another_source_is_refused(tmp_path):
    path, pipe = tmp_path / "latents.safetensors", tiny()
    given = {"prompt": "a", "steps": 2, "seed": 1}
    pipe.generate(**given, video=picture(1, 9), save_latents=path)
    assert pipe.generate(**given, video=picture(1, 9), resume=path) is not None
    with pytest.raises(CheckpointError, match='video "[0-9a-f]{32}" there'):
        pipe.generate(**given, video=picture(1, 9, seed=9), resume=path)


def test_what_is_not_done_is_not_decoded(unfinished):
    path, _ = unfinished
    with pytest.raises(CheckpointError, match="must hold latents after all steps; got 2 of 4"):
        decode_saved(tiny().vae, path)


def test_a_record_is_read_without_tensors(unfinished, monkeypatch):
    record = resume.read(unfinished[0]).record
    monkeypatch.setattr(TensorFile, "read", None)
    assert resume.read_record(unfinished[0]) == record


def test_latents_of_another_vae_are_refused(tmp_path):
    path, pipe = tmp_path / "latents.safetensors", tiny()
    pipe.generate("a", steps=1, num_frames=9, save_latents=path)
    other = tiny("1.5")
    with pytest.raises(CheckpointError, match="vae.invert_scale_latents false there, true here"):
        decode_saved(other.vae, path)


@pytest.mark.parametrize(
    "damage, match",
    [
        ({"format": None}, "must be latents that this version of .* saved, .*; got 'another file'"),
        ({"done": "many"}, "its metadata is damaged"),
        ({"record": "{"}, "its metadata is damaged"),
        ({"record": '{"padding": -1}'}, "padding must be less than the frames; got -1"),
        ({"record": "{}"}, "must hold 'padding' as it was written"),
        ({"steps": None}, "must hold 'steps' as it was written"),
    ],
)
def test_damaged_files_are_refused(unfinished, tmp_path, damage, match):
    tensors, metadata = read_tensors(unfinished[0])
    metadata = {name: damage.get(name, value) for name, value in metadata.items()}
    path = tmp_path / "damaged.safetensors"
    write_tensors(path, tensors, {name: v for name, v in metadata.items() if v is not None})
    with pytest.raises(CheckpointError, match=match):
        tiny().generate(**unfinished[1], resume=path)


@pytest.mark.parametrize("gone", ["latents", "text", "generator_states"])
def test_files_without_what_is_needed_are_refused(unfinished, tmp_path, gone):
    tensors, metadata = read_tensors(unfinished[0])
    path = tmp_path / "damaged.safetensors"
    write_tensors(path, {n: t for n, t in tensors.items() if n != gone}, metadata)
    with pytest.raises(CheckpointError, match=f"must hold '{gone}' as it was written"):
        tiny().generate(**unfinished[1], resume=path)


class InterruptAt(TorchDispatchMode):
    """Ctrl-C at the n-th operation; counts them if n is None."""

    def __init__(self, n=None):
        super().__init__()
        self.n, self.count = n, 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.count += 1
        if self.count == self.n:
            raise KeyboardInterrupt
        return op(*args, **(kwargs or {}))


def test_interrupted_at_any_operation_nothing_is_spoiled(tmp_path):
    """No part of a file, nothing left in the models: the same video when run again."""
    path, pipe = tmp_path / "latents.safetensors", tiny()
    given = {"prompt": "a", "steps": 2, "num_frames": 9, "seed": 1, "solver": "dpm"}
    given = {**given, "save_latents": path, "checkpoint_every": 1}
    expected = pipe.generate(**given)
    path.unlink()
    with InterruptAt() as counter:
        pipe.generate(**given)
    for n in sorted(random.sample(range(1, counter.count), 16)):
        path.unlink(missing_ok=True)
        with pytest.raises(KeyboardInterrupt), InterruptAt(n):
            pipe.generate(**given)
        left = [file.name for file in tmp_path.iterdir()]
        assert left in ([], [path.name])
        resume = path if left else None
        assert torch.equal(pipe.generate(**given, resume=resume), expected)


def test_fingerprints_see_every_bit():
    x = torch.randn(3, 5)
    assert fingerprint(x) == fingerprint(x.clone()) == fingerprint(x.t().contiguous().t())
    assert fingerprint(x) != fingerprint(x.flip(0)) != fingerprint(x.view(5, 3))
    assert fingerprint(x) != fingerprint(-x)
    assert fingerprint(torch.zeros(2)) != fingerprint(-torch.zeros(2))
    assert fingerprint(torch.zeros(0)) != fingerprint(torch.zeros(0, 2))
    module = torch.nn.Linear(3, 3).bfloat16()
    before = fingerprint_of_weights(module.state_dict())
    assert before == fingerprint_of_weights(module.state_dict())
    module.bias.data[1] += 1
    assert fingerprint_of_weights(module.state_dict()) != before
