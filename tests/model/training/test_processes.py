"""Several processes, as `accelerate launch` starts them; on the CPU, with gloo between them."""

import json
import os
import socket

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from torch.multiprocessing import start_processes

from cogvx.training import train
from tests.harness.workers import run_cases

from .recipes import small


def launched(rank, folder, port):
    """Train twice, with what a launcher tells a process; forked, which imports nothing anew."""
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
    place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in place.items()})
    AcceleratorState._reset_state(reset_partial_state=True)  # of a training before the fork
    for name in ("one", "two"):
        train(small(), folder / name)
    state = AcceleratorState()
    who = f"{state.distributed_type.value}-{state.process_index}/{state.num_processes}"
    (folder / f"{rank}.txt").write_text(who)
    torch.distributed.destroy_process_group()


def launch(folder):
    """Two trainings of the small recipe in two processes, into the folders "one" and "two"."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    start_processes(launched, (folder, port), 2, start_method="fork")


@pytest.mark.slow
def test_two_processes_train_one_model(tmp_path):
    """Twice the same bits; and a model, a curve and checkpoints as one process leaves them."""
    [outcome] = run_cases(launch, [tmp_path], timeout=300)
    assert outcome.ok, outcome
    assert [(tmp_path / f"{rank}.txt").read_text() for rank in range(2)] == [
        "MULTI_CPU-0/2",
        "MULTI_CPU-1/2",
    ]
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
