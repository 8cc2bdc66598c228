"""Several processes, as `accelerate launch` starts them; on the CPU, with gloo between them."""

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from .recipes import small

PROGRAM = """
import sys

sys.path[:0] = sys.argv[1:]
from accelerate.state import AcceleratorState
from cogvx.training import train
from tests.model.training.recipes import small

for folder in ("one", "two"):
    train(small(), folder)
state = AcceleratorState()
who = f"{state.distributed_type.value}-{state.process_index}/{state.num_processes}"
sys.stdout.write(who + "\\n")  # in one piece: print writes the end of a line apart
"""


def launch(tmp_path):
    """Two trainings of the small recipe in two processes, into the folders "one" and "two"."""
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    plain = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    options = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [sys.executable, *options, str(program), *sys.path],
        cwd=tmp_path,
        env={**plain, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert sorted(done.stdout.split()) == ["MULTI_CPU-0/2", "MULTI_CPU-1/2"]


@pytest.mark.slow
def test_two_processes_train_one_model(tmp_path):
    """Twice the same bits; and a model, a curve and checkpoints as one process leaves them."""
    launch(tmp_path)
    found = []
    for name in ("one", "two"):
        files = sorted((tmp_path / name).glob("*/diffusion_pytorch_model.safetensors"))
        assert [f.parent.name for f in files] == ["transformer", "vae"]
        found.append([load_file(file) for file in files])
        for stage in ("vae", "transformer"):
            lines = (tmp_path / name / "training" / stage / "losses.jsonl").read_text()
            points = [json.loads(line) for line in lines.splitlines()]
            assert [point["step"] for point in points] == [2, 4, 6]
    for one, two in zip(*found, strict=True):
        assert one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)
    config = json.loads((tmp_path / "one" / "transformer" / "config.json").read_text())
    assert config["num_layers"] == small().transformer.num_layers
