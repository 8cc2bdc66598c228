"""Live bytes: counted once for each storage, from when it is made to when it is freed."""

import gc

import torch
from torch import nn
from torch.distributed._functional_collectives import AsyncCollectiveTensor

from cogvx.memory import LiveBytes, module_bytes


def test_the_peak_is_what_was_alive_at_once():
    with LiveBytes() as live:
        a = torch.zeros(1000)
        b = a.exp()
        del a
        c = b.sum()
    assert (live.peak, live.now) == (8000 + 0, 4000 + 4)
    del b, c
    gc.collect()
    assert live.now == 0


def test_views_are_not_new():
    weight = torch.zeros(10, 10)
    with LiveBytes() as live:
        x = torch.zeros(100)
        y = x.view(10, 10)[1:].t()
        z = weight.t()
        y.add_(1)
    assert live.peak == live.now == 400
    del x, y, z


def test_a_wrapper_is_not_counted_beside_its_tensor():
    with LiveBytes() as live:
        x = AsyncCollectiveTensor(torch.zeros(100))
    assert live.peak == live.now == 400
    del x


def test_shapes_are_enough():
    with LiveBytes() as live, torch.device("meta"):
        x = torch.zeros(2**40)
        y = x[: 2**20] + 1
    assert live.now == 4 * 2**40 + 4 * 2**20
    del x, y


def test_what_autograd_saves_is_counted():
    x = torch.zeros(1000, requires_grad=True)
    with LiveBytes() as live:
        y = x.exp().sin()
        assert live.now == 8000  # exp's result is kept for the backward of both
        del y
        assert live.now == 0


def test_reset_forgets_the_peak_and_not_what_is_alive():
    with LiveBytes() as live:
        kept = torch.zeros(10)
        torch.zeros(1000)
        live.reset()
        torch.zeros(5)
    assert (live.now, live.peak) == (40, 60)
    del kept


def test_a_module_is_its_parameters_and_buffers_each_once():
    module = nn.Sequential(nn.Linear(10, 20), nn.BatchNorm1d(20))
    module.append(module[0])
    expected = 4 * (10 * 20 + 20) + 4 * (20 * 4) + 8
    assert module_bytes(module) == expected
