"""Small tokens, experts and indices for the tests of `expert_ffn`."""

import pytest
import torch

from cogvx_kernels import _backend

BATCH, TEXT, VIDEO, DIM, FFN_DIM = 2, 3, 9, 32, 48
SEQLEN = TEXT + VIDEO
TRITON = pytest.mark.skipif(not _backend.HAS_TRITON, reason="Triton is not installed")
BACKENDS = pytest.mark.parametrize("backend", ["reference", pytest.param("kernel", marks=TRITON)])


def device():
    return "cpu" if _backend.INTERPRETED or not torch.cuda.is_available() else "cuda"


def normal(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(device())


def tokens(seed=0):
    return normal(BATCH, SEQLEN, DIM, seed=seed)


def experts(count, seed=1):
    """up, up_bias, down, down_bias of so many experts."""
    return (
        normal(count, FFN_DIM, DIM, seed=seed) / DIM**0.5,
        normal(count, FFN_DIM, seed=seed + 1),
        normal(count, DIM, FFN_DIM, seed=seed + 2) / FFN_DIM**0.5,
        normal(count, DIM, seed=seed + 3),
    )


def index(count, top_k=1, seed=7):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(count, (BATCH, SEQLEN, top_k), generator=generator).to(device())
