"""A joint sequence in parts: sizes, tables, attention and gather against one process."""

import functools

import pytest
import torch
import torch.distributed as dist
from torch.nn import functional as F

from cogvx_kernels.context_parallel import Context, split_sizes
from tests.harness.selection import rest

from . import ranks

BATCH, HEADDIM = 2, 8
# (tokens, heads, method): uneven and even, a token for each of 4 ranks, one head for each.
ATTENTION = [(17, 5, "heads"), (16, 4, "heads"), (4, 4, "heads"), (17, 5, "tokens"), (9, 2, "auto")]


@functools.cache
def parts(length, size):
    return [Context("", rank, size).part(length) for rank in range(size)]


@pytest.mark.parametrize("total, size", [(30, 4), (17, 3), (3, 3), (2, 3), (17776, 8)])
def test_sizes_differ_by_at_most_one(total, size):
    sizes = split_sizes(total, size)
    assert sum(sizes) == total and len(sizes) == size
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("length, size", [(17, 1), (17, 3), (8, 4), (4, 4)])
@pytest.mark.parametrize("text_len", [0, 1, 4, 6, 17])
def test_parts_are_the_sequence_in_order(length, size, text_len):
    text_len = min(text_len, length)
    x = torch.arange(length)
    whole = parts(length, size)
    assert torch.equal(torch.cat([part.narrow(x, 0) for part in whole]), x)
    is_text = [torch.arange(part.length) < part.text_len(text_len) for part in whole]
    assert torch.equal(torch.cat(is_text), x < text_len)
    video = [part.length - part.text_len(text_len) for part in whole]
    assert all(part.video_sizes(text_len) == video for part in whole)


@pytest.mark.parametrize("rows", [0, 1, 11, 17])
def test_rows_of_tables_are_those_of_the_last_tokens(rows):
    tables = [torch.randn(rows, 3), torch.randn(rows, 3)]
    for size in (1, 2, 3, 5):
        shares = [part.tables(*tables) for part in parts(17, size)]
        for table, share in zip(tables, zip(*shares, strict=True), strict=True):
            assert torch.equal(torch.cat(share), table)
        for part, (share, _) in zip(parts(17, size), shares, strict=True):
            assert len(share) == part.length - part.text_len(17 - rows)


def attend(q, k, v):
    turned = [x.transpose(1, 2) for x in (q, k, v)]
    return F.scaled_dot_product_attention(*turned).transpose(1, 2)


def attention_and_gradients(length, nheads, method):
    """Gathered outputs of the parts, and the mean of the ranks' gradients."""
    torch.manual_seed(0)
    qkv = [torch.randn(BATCH, length, nheads, HEADDIM, dtype=torch.float64) for _ in range(3)]
    qkv = [x.requires_grad_() for x in qkv]
    weight = torch.randn_like(qkv[0])
    expected = attend(*qkv)
    gradients = torch.autograd.grad((expected * weight).sum(), qkv)
    part = Context.of(dist.group.WORLD, method).part(length)
    out = part.attention(*(part.narrow(x, 1) for x in qkv), attend)
    out = part.context.gather(out, part.sizes)
    found = torch.autograd.grad((out * weight).sum(), qkv)
    for gradient in found:
        dist.all_reduce(gradient)
    error = (out - expected).abs().max().item()
    errors = [
        (a / dist.get_world_size() - b).abs().max() for a, b in zip(found, gradients, strict=True)
    ]
    return max(error, *(e.item() for e in errors)), type(out)


def cases():
    size = dist.get_world_size()
    fit = [case for case in ATTENTION if case[2] != "heads" or case[1] >= size]
    return [attention_and_gradients(*case) for case in fit]


@pytest.mark.parametrize("size", [3, rest(2), 4])
def test_attention_of_parts_is_that_of_the_whole(size):
    for results in ranks.run(cases, size):
        assert len(results) >= 4
        for error, kind in results:
            assert error < 1e-14 and kind is torch.Tensor


def gathered(sizes):
    own = torch.full((BATCH, sizes[dist.get_rank()], 3), float(dist.get_rank()))
    return Context.of(dist.group.WORLD).gather(own, sizes)


def test_gather_takes_ranks_without_tokens():
    expected = torch.tensor([0.0, 2, 2]).view(1, 3, 1).expand(BATCH, 3, 3)
    for out in ranks.run(gathered, 3, (1, 0, 2)):
        assert torch.equal(out, expected)


def test_what_does_not_fit_is_refused_by_name():
    with pytest.raises(ValueError, match="method must be one of auto, heads, tokens; got 'ring'"):
        Context("", 0, 2, "ring")
    with pytest.raises(ValueError, match="length must be a token for each rank, 4; got 3"):
        Context("", 0, 4).part(3)
    q = torch.zeros(1, 2, 3, 8)
    with pytest.raises(ValueError, match='method="heads" needs a head for each of 4 ranks; got 3'):
        Context("", 0, 4, "heads").part(8).attention(q, q, q, attend)
