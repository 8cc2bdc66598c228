"""The forked ranks of these tests: results, failures, deadlines."""

import os
import signal
import time

import pytest
import torch
import torch.distributed as dist

from . import ranks


def shared_sum(add):
    total = torch.tensor([dist.get_rank() + add])
    dist.all_reduce(total)
    return dist.get_rank(), dist.get_world_size(), total


def on_rank_1(act):
    if dist.get_rank() == 1:
        act()
    dist.barrier()


def give_up():
    raise ValueError("no more")


def test_each_rank_returns_its_result():
    assert ranks.run(shared_sum, 3, 10) == [(rank, 3, torch.tensor([33])) for rank in range(3)]


def test_a_rank_that_raises_is_reported_with_its_traceback():
    with pytest.raises(ranks.RankFailure, match="(?s)rank 1 of 2.*in give_up.*no more") as caught:
        ranks.run(on_rank_1, 2, give_up)
    assert caught.value.rank == 1


def test_a_rank_that_is_killed_is_reported():
    with pytest.raises(ranks.RankFailure, match="rank 1 of 2: ended by SIGKILL"):
        ranks.run(on_rank_1, 2, lambda: os.kill(os.getpid(), signal.SIGKILL))


def hang():
    time.sleep(1000)


def test_a_rank_that_hangs_is_killed_at_the_deadline():
    with pytest.raises(ranks.RankFailure, match="(?s)not done after 0.5 s.*in hang"):
        ranks.run(on_rank_1, 2, hang, deadline=0.5)
    with pytest.raises(ChildProcessError):  # none is left
        os.waitpid(-1, os.WNOHANG)
