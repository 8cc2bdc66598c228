"""Two processes, as torchrun starts them; on the CPU, with gloo between them."""

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from cogvx.training import train, trainer
from tests.parallel import ranks

from .recipes import small

RECIPE = """
[data]
{data}
[vae]
{vae}
[vae_training]
{vae_training}
[transformer]
{transformer}
[transformer_training]
{transformer_training}
"""


def torchrun(folder):
    """`cogvx train` of the small recipe into the folder "one"."""
    recipe = small().to_dict()
    lines = {
        table: "\n".join(f"{key} = {json.dumps(value)}" for key, value in recipe[table].items()
                         if value is not None)
        for table in ("data", "vae", "vae_training", "transformer", "transformer_training")
    }  # fmt: skip
    (folder / "recipe.toml").write_text(RECIPE.format(**lines))
    plain = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    plain["PYTHONPATH"] = os.pathsep.join(sys.path)
    plain["OMP_NUM_THREADS"] = str(torch.get_num_threads())  # sums have another order with others
    command = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "cogvx"]
    done = subprocess.run(
        [sys.executable, "-m", *command, "train", "recipe.toml", "--out", "one", "--json"],
        cwd=folder,
        env=plain,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return json.loads(done.stdout)  # of the first process: the other prints nothing


@pytest.mark.slow
def test_two_processes_train_one_model(tmp_path, monkeypatch):
    """The same bits by torchrun and by forks; and a model, a curve and checkpoints as one process
    leaves them."""
    monkeypatch.setattr(trainer, "SCALING_CLIPS", 64)  # which `recipes` lowers in this process
    summary = torchrun(tmp_path)
    assert summary["vae_step"] == summary["transformer_step"] == 6
    ranks.run(train, 2, small(), tmp_path / "two")
    found = []
    for name in ("one", "two"):
        files = sorted((tmp_path / name).glob("*/diffusion_pytorch_model.safetensors"))
        assert [f.parent.name for f in files] == ["transformer", "vae"]
        found.append([load_file(file) for file in files])
        for stage in ("vae", "transformer"):
            lines = (tmp_path / name / "training" / stage / "losses.jsonl").read_text()
            points = [json.loads(line) for line in lines.splitlines()]
            assert [point["step"] for point in points] == [2, 4, 6]
            newest = tmp_path / name / "training" / stage / "checkpoints" / "00000006"
            assert {file.name for file in newest.iterdir()} == {
                ".metadata",
                "__0_0.distcp",
                "__1_0.distcp",
            }
    for one, two in zip(*found, strict=True):
        assert one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)
    config = json.loads((tmp_path / "one" / "transformer" / "config.json").read_text())
    assert config["num_layers"] == small().transformer.num_layers
