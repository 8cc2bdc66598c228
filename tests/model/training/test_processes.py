"""Two processes of torchrun's agent; on the CPU, with gloo between them."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file

from cogvx.cli import main
from cogvx.training import train
from tests.harness.selection import rest
from tests.parallel import ranks
from tests.parallel.test_machines import documented, on_two_machines

from .recipes import small, write

ONE_SHEET = {"sample_every": 6}
MADE = small(vae_training=ONE_SHEET, transformer_training=ONE_SHEET)


def one_machine(command):
    return ranks.torchrun(main, 2, command)


def two_machines(command):
    return on_two_machines([*documented(), *command], main)


def torchrun(machines, folder):
    """`cogvx train` of the small recipe into the folder "one"."""
    write(MADE, folder / "recipe.toml")
    done = machines(["train", str(folder / "recipe.toml"), "--out", str(folder / "one"), "--json"])
    assert done.ok, done
    [printed] = re.findall(r"^{$.*?^}$", done.output, re.DOTALL | re.MULTILINE)
    return json.loads(printed)  # of the first process: the other prints nothing


@pytest.mark.parametrize("machines", [one_machine, rest(two_machines)])
@pytest.mark.slow
def test_two_processes_train_one_model(machines, tmp_path, plots):
    """The same bits by torchrun and by forks; and a model, a curve and checkpoints as one process
    leaves them."""
    summary = torchrun(machines, tmp_path)
    assert summary["vae_step"] == summary["transformer_step"] == 6
    ranks.run(train, 2, MADE, tmp_path / "two")
    found = []
    for name in ("one", "two"):
        files = sorted((tmp_path / name).glob("*/diffusion_pytorch_model.safetensors"))
        assert [f.parent.name for f in files] == ["transformer", "vae"]
        found.append([load_file(file) for file in files])
        for stage in ("vae", "transformer"):
            lines = (tmp_path / name / "training" / stage / "losses.jsonl").read_text()
            points = [json.loads(line) for line in lines.splitlines()]
            assert [point["step"] for point in points] == [2, 4, 6]
            for image in ("losses.png", "samples.png"):
                png = (tmp_path / name / "training" / stage / image).read_bytes()
                assert png[:4] == b"\x89PNG"
            newest = tmp_path / name / "training" / stage / "checkpoints" / "00000006"
            assert {file.name for file in newest.iterdir()} == {
                ".metadata",
                "__0_0.distcp",
                "__1_0.distcp",
            }
    for one, two in zip(*found, strict=True):
        assert one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)
    config = json.loads((tmp_path / "one" / "transformer" / "config.json").read_text())
    assert config["num_layers"] == MADE.transformer.num_layers
