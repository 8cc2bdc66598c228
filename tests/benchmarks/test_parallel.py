"""The benchmark of several GPUs, on gloo ranks."""

import dataclasses

import pytest

from benchmarks import parallel
from cogvx.config import PRESETS
from cogvx_kernels import module_backend
from tests.model.transformer.tiny import ROPE
from tests.parallel import ranks


def test_ranks_are_compared_with_one(monkeypatch):
    small = dataclasses.replace(PRESETS["5b"], transformer=ROPE)
    monkeypatch.setattr(parallel, "PRESETS", {"5b": small})
    words = "--guidance 2 --repeats 1 --device cpu --latents 2 4 6"
    options = parallel.parse(words.split())
    with module_backend("reference"):
        rows = ranks.run(parallel.measure, 4, options)
    for row in rows:
        assert (row["guidance"], row["context"], row["tokens"]) == (2, 2, 17)
        assert row["error"] == pytest.approx(0, abs=2e-2)  # bfloat16
        assert min(row["one_rank_s"], row["mesh_s"], row["exchanges_s"]) > 0
