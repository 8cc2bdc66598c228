"""Transformers of every kind with a context of ranks, against one process."""

import functools

import pytest
import torch

from tests.harness.selection import rest

from . import models, ranks

# Relative errors in the Frobenius norm; sums of other lengths are added in another order.
FORWARD = {torch.float32: 1e-6, torch.float64: 1e-14}
GRADIENT = {torch.float32: 1e-5, torch.float64: 1e-13}
ROWS = [
    (2, "auto", torch.float64, False),
    (3, "heads", torch.float32, True),
    (4, "auto", torch.float64, True),
    rest(1, "heads", torch.float64, False),
    rest(3, "tokens", torch.float64, False),
    rest(4, "tokens", torch.float32, False),
    rest(2, "heads", torch.float32, True),
]


@functools.cache
def one_process(kind, dtype):
    return models.train_step(models.build(kind, dtype), *models.inputs(kind, dtype))


def relative(a, b):
    difference, norm = (a - b).norm().item(), b.norm().item()
    return difference / norm if norm else difference  # the last block's text is not used


def has_zero_gradient(kind, name):
    """Without RoPE a shift of all keys is a shift of a row of scores, which softmax ignores."""
    return not models.KINDS[kind].use_rotary_positional_embeddings and name.endswith("norm_k.bias")


@pytest.mark.parametrize("size, method, dtype, checkpointing", ROWS)
@pytest.mark.parametrize("kind", models.KINDS)
def test_ranks_agree_with_one_process(kind, size, method, dtype, checkpointing):
    if kind == "2 heads" and method == "heads" and size > 2:
        method = "tokens"
    v, statistics, gradients = one_process(kind, dtype)
    found = ranks.run(models.on_a_rank, size, kind, dtype, method, checkpointing)
    for own_v, own_statistics, _ in found:
        assert torch.equal(own_v, found[0][0])
        for a, b in zip(own_statistics, statistics, strict=True):
            assert relative(a, b) < FORWARD[dtype]
    assert relative(found[0][0], v) < FORWARD[dtype]
    for name, gradient in gradients.items():
        own = found[0][2][name]
        if has_zero_gradient(kind, name):
            bound = GRADIENT[dtype] * gradients[name.replace("bias", "weight")].norm()
            assert max(gradient.norm(), own.norm()) < bound, name
        else:
            assert relative(own, gradient) < GRADIENT[dtype], name
