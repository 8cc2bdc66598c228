"""`encode`, `decode` and `reconstruct` under torchrun write what one process writes."""

import json
import os
import re

import pytest
import torch
import torch.distributed as dist

from cogvx import parallel
from cogvx.checkpoint import save_vae
from cogvx.cli import clips, main
from cogvx.cli.console import Console
from cogvx.cli.parser import make
from cogvx.config import VAEConfig
from cogvx.parallel.launch import VARIABLES
from cogvx.pipeline import resume
from cogvx.vae import CausalVAE
from cogvx.video import write_video

from . import ranks

VAE = ["--vae", "random", "--base-channels", "4", "--device", "cpu", "--backend", "reference"]


@pytest.fixture
def clip(tmp_path):
    generator = torch.Generator().manual_seed(0)
    video = torch.rand(1, 17, 3, 16, 24, generator=generator) * 2 - 1
    write_video(tmp_path / "clip.mp4", video, 8)
    return tmp_path / "clip.mp4"


def as_rank(command):
    """Run a command as a process of torchrun; the rank's exit status."""
    os.environ["TORCHELASTIC_RUN_ID"] = "test"
    stop, parallel.stop = parallel.stop, dist.barrier
    try:
        return main(command)
    finally:
        parallel.stop = stop


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    """Options of a VAE of all levels, with one layer in each."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("vae")
    config = VAEConfig(block_out_channels=(4, 4, 4, 4), layers_per_block=1, norm_num_groups=2)
    save_vae(CausalVAE(config), folder)
    return ["--vae", str(folder), "--device", "cpu", "--backend", "reference"]


@pytest.mark.parametrize("tiles", ([], ["--tiling", "8x16"]))
def test_encoded_and_decoded_files_are_those_of_one_process(clip, vae, tiles, tmp_path):
    one, several = tmp_path / "one.safetensors", tmp_path / "several.safetensors"
    assert main(["encode", str(clip), *vae, *tiles, "--quiet", "--out", str(one)]) == 0
    encode = ["encode", str(clip), *vae, *tiles, "--quiet", "--out", str(several)]
    assert ranks.run(as_rank, 3, encode) == [0, 0, 0]
    first, second = (resume.read(path).state.latents for path in (one, several))
    assert torch.equal(first, second)
    for path, size in ((one, 1), (several, 2)):
        out = str(path.with_suffix(".mp4"))
        decode = ["decode", str(one), *vae, *tiles, "--quiet", "--out", out]
        assert ([main(decode)] if size == 1 else ranks.run(as_rank, size, decode)) == [0] * size
    assert one.with_suffix(".mp4").read_bytes() == several.with_suffix(".mp4").read_bytes()


@pytest.mark.parametrize("whole", ([], ["--whole"]))
def test_a_reconstruction_is_that_of_one_process(clip, vae, whole, tmp_path):
    one, several = tmp_path / "one.mp4", tmp_path / "several.mp4"
    command = ["reconstruct", str(clip), *vae, *whole, "--quiet", "--out"]
    assert main([*command, str(one)]) == 0
    assert ranks.run(as_rank, 2, [*command, str(several)]) == [0, 0]
    assert one.read_bytes() == several.read_bytes()


def test_a_folder_is_refused_under_torchrun(monkeypatch, tmp_path):
    for name in VARIABLES:
        monkeypatch.setenv(name, "1")
    options = make().parse_args(["encode", str(tmp_path), *VAE, "--out", str(tmp_path / "out")])
    with pytest.raises(ValueError, match="must be a file under torchrun; it is a folder"):
        clips.encode(options, Console(quiet=True, as_json=False))


def test_torchrun_decodes_and_prints_once(clip, tmp_path):
    latents, out = tmp_path / "clip.safetensors", tmp_path / "several.mp4"
    assert main(["encode", str(clip), *VAE, "--quiet", "--out", str(latents)]) == 0
    one = tmp_path / "one.mp4"
    assert main(["decode", str(latents), *VAE, "--quiet", "--out", str(one)]) == 0
    done = ranks.torchrun(main, 2, ["decode", str(latents), *VAE, "--json", "--out", str(out)])
    assert done.ok, done
    [printed] = re.findall(r"^{$.*?^}$", done.output, re.DOTALL | re.MULTILINE)
    assert json.loads(printed)["frames"] == 17
    assert one.read_bytes() == out.read_bytes()
