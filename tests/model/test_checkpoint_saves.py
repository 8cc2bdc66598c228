"""Models saved over others: the old or the new is there afterwards, whatever stops the work."""

import dataclasses
import itertools
import json
import os
import subprocess
import sys
import textwrap

import pytest
import torch
from diffusers import CogVideoXTransformer3DModel

from cogvx.checkpoint import CheckpointError, load_transformer, save_transformer
from cogvx.checkpoint import tensors as tensor_files
from cogvx.transformer import ExpertTransformer

from .checkpoints import (
    INDEX,
    TINY,
    WEIGHTS,
    assert_same,
    files,
    randomised,
    tiny_transformer,
)


@pytest.fixture
def tiny():
    return tiny_transformer()


def test_saving_over_what_was_loaded(tiny, tmp_path):
    """From one file to shards to other shards and back; the loaded model lives on unharmed."""
    save_transformer(tiny, tmp_path)
    for limit in (10**9, 8000, 8000, 30_000, 10**9):
        model = load_transformer(tmp_path)
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(1)
        save_transformer(model, tmp_path, limit)
        assert_same(load_transformer(tmp_path), model)
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, before[name] + 1)
        shards = [name for name in files(tmp_path) if name.startswith("diffusion_pytorch_model-")]
        if limit == 10**9:
            assert files(tmp_path) == ["config.json", WEIGHTS]
        else:
            index = json.loads((tmp_path / INDEX).read_text())
            assert sorted(set(index["weight_map"].values())) == shards
            assert files(tmp_path) == sorted(["config.json", INDEX, *shards])
            assert CogVideoXTransformer3DModel.from_pretrained(tmp_path)
        assert all(os.stat(tmp_path / name).st_mode & 0o600 for name in files(tmp_path))


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("limit", [10**9, 2000])
def test_a_save_that_fails_changes_nothing(error, limit, tiny, tmp_path, monkeypatch):
    """In each file in turn, with half of it written."""
    save_transformer(tiny, tmp_path, limit)
    there = files(tmp_path)
    write = tensor_files.save_file

    def fails(tensors, path, metadata):
        write(tensors, path, metadata)
        if not next(left):
            os.truncate(path, os.path.getsize(path) // 2)
            raise error

    monkeypatch.setattr(tensor_files, "save_file", fails)
    other = tiny_transformer(num_layers=1)
    for count in range(1 if limit == 10**9 else 7):
        left = itertools.count(count, -1)
        with pytest.raises(type(error)):
            save_transformer(other, tmp_path, limit)
        assert next(left) == -1
        assert files(tmp_path) == there
        assert_same(load_transformer(tmp_path), tiny)


@pytest.mark.parametrize("limit", [10**9, 8000])
def test_a_disk_that_is_full_changes_nothing(limit, tiny, tmp_path):
    """The system itself ends a write, wherever: in the config, in the header, in a tensor."""
    import resource

    save_transformer(tiny, tmp_path, limit)
    there = files(tmp_path)
    largest = max(os.path.getsize(tmp_path / name) for name in there)
    other = tiny_transformer(num_layers=1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for most in range(100, min(largest, 8000), 500):
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (most, hard))
            with pytest.raises(OSError, match="File too large"):
                save_transformer(other, tmp_path, limit)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert files(tmp_path) == there
        assert_same(load_transformer(tmp_path), tiny)


@pytest.mark.parametrize("limit", [10**9, 8000])
def test_no_one_reads_the_config_of_one_with_the_weights_of_another(
    limit, tiny, tmp_path, monkeypatch
):
    """The configs differ in what no weight shows, and saving stops between the two renamings."""
    save_transformer(tiny, tmp_path, limit)
    other = randomised(ExpertTransformer(dataclasses.replace(tiny.config, sample_frames=9)))
    replace = os.replace

    def stops(source, target):
        if target.name == "config.json":
            raise OSError(5, "Input/output error")
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", stops)
        with pytest.raises(OSError, match="Input/output"):
            save_transformer(other, tmp_path, limit)
    with pytest.raises(CheckpointError, match="must hold config.json"):
        load_transformer(tmp_path)
    save_transformer(other, tmp_path, limit)
    assert load_transformer(tmp_path).config == other.config


KILLED = """
    import os, random, signal, sys, time, torch
    from cogvx.checkpoint import load_transformer, save_transformer
    from cogvx.config import TransformerConfig
    from cogvx.transformer import ExpertTransformer

    folder, seed, options = sys.argv[1], int(sys.argv[2]), eval(sys.argv[3])
    model = ExpertTransformer(TransformerConfig(**options))
    chance = random.Random(seed)

    def fill(value):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(value)

    fill(0)
    save_transformer(model, folder)
    seen = set()
    for _ in range(20):
        child = os.fork()
        if not child:
            for value in range(1, 1000):
                fill(value)
                save_transformer(model, folder, chance.choice([30_000, 10**9]))
            os._exit(1)
        time.sleep(chance.uniform(0, 0.1))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status), status
        values = {float(v) for p in load_transformer(folder).parameters() for v in p.unique()}
        assert len(values) == 1, values
        seen |= values
    save_transformer(model, folder)
    print(len(seen), *sorted(os.listdir(folder)))
"""


def test_a_save_that_is_killed_leaves_the_old_or_the_new(seed, tmp_path):
    out = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(KILLED), tmp_path, str(seed), repr(TINY)],
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert not out.returncode, out.stderr
    seen, *there = out.stdout.split()
    assert int(seen) > 1
    assert there == ["config.json", WEIGHTS]
