"""Process groups of `start`: timeouts, stores, GPUs; and whom ranks blame for a lost message."""

from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from cogvx.parallel import Ranks, launch, start
from cogvx.parallel.vae import _group

from . import ranks


def timeouts():
    mesh = start(guidance=2, context=1, data=2, device="cpu", timeout=timedelta(seconds=7))
    groups = [*mesh.get_all_groups(), _group(mesh)]
    assert [group.size() for group in groups] == [2, 2, 1, 2]
    return {group._get_backend(torch.device("cpu")).options._timeout for group in groups}


def test_all_groups_have_the_timeout():
    assert ranks.run(timeouts, 4) == [{timedelta(seconds=7)}] * 4


def test_attempts_of_several_machines_need_a_new_store(monkeypatch):
    """Those of one machine go on: tests/parallel/test_prompts.py."""
    for name in launch.VARIABLES:
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    monkeypatch.setenv("GROUP_WORLD_SIZE", "2")
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    with pytest.raises(RuntimeError, match="set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 for torchrun"):
        start(device="cpu")


def test_a_group_that_is_there_keeps_its_gpu(monkeypatch):
    def refuse():
        raise AssertionError("the GPU of a process was changed")

    monkeypatch.setattr(launch, "_take_gpu", refuse)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # in torch's mesh
    assert ranks.run(lambda: start(device="cuda").size(), 1) == [1]


LOST = RuntimeError("[third_party/gloo/gloo/transport/tcp/pair.cc:538] Read error")
ENDED = RuntimeError("Application timeout caused pair closure")
OURS = ValueError("prompt must be the same on each rank; got 'an igloo/'")


def raised(mine, error):
    """What an error becomes under `watched`."""
    try:
        with mine.watched():
            raise error
    except Exception as found:
        return f"{type(found).__name__}: {found}"


def blamed():
    """In two groups of two. Rank 1 fails in the first call and does not make the second."""
    number, mine = dist.get_rank(), Ranks(start(guidance=2, context=1, data=2, device="cpu"))
    if number > 1:
        return mine.numbers
    first = raised(mine, OURS if number else LOST)
    return [mine.numbers, first, None if number else raised(mine, ENDED)]


def test_ranks_blame_those_of_their_video(monkeypatch):
    monkeypatch.setattr("cogvx.parallel.ranks.GRACE", timedelta(seconds=0.5))
    own, failed = f"ValueError: {OURS}", f"RuntimeError: rank 1 failed with ValueError: {OURS}"
    frozen = f"RuntimeError: rank 1 does not answer, it is frozen or lost: {ENDED}"
    assert ranks.run(blamed, 4) == [
        [[0, 1], f"{failed}: {LOST}", frozen],
        [[0, 1], own, None],
        [2, 3],
        [2, 3],
    ]
