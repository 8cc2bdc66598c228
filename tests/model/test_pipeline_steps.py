"""Work that the steps of a generation share: done once, and no more of it for more steps."""

from collections import Counter

import pytest
import torch

from cogvx.memory import LiveBytes
from cogvx.pipeline import denoise

from .tiny_pipeline import picture, tiny

SMALL = {"steps": 2, "num_frames": 9, "seed": 1}


def test_steps_do_not_add_up_in_memory(monkeypatch):
    """But for their modulations, of `STEPS_AHEAD` at most."""
    pipe = tiny()

    def peak(steps):
        with LiveBytes() as live:
            pipe.generate("a", steps=steps, num_frames=9, seed=1, solver="dpm", output="latents")
        return live.peak

    peak(2)  # tables that are kept
    a_step = pipe.transformer.modulations(torch.tensor([9])).values.nbytes
    assert peak(9) == peak(3) + 6 * a_step
    monkeypatch.setattr(denoise, "STEPS_AHEAD", 3)
    assert peak(9) == peak(6) <= peak(3) + 3 * a_step  # while the next are made, the last are there


@pytest.mark.parametrize("cfg, projections", [("batch", 1), ("two_pass", 2)])
def test_what_steps_share_is_computed_once(cfg, projections):
    """The text's projection, and the modulations of all steps."""
    pipe, counts = tiny("1.5-i2v"), Counter()
    model = pipe.transformer

    def count(name):
        return lambda *_: counts.update([name])

    model.patch_embed.text_proj.register_forward_hook(count("text"))
    model.time_embedding.register_forward_hook(count("time"))
    model.ofs_embedding.register_forward_hook(count("ofs"))
    model.proj_out.register_forward_hook(count("steps"))
    pipe.generate("a", image=picture(1), **{**SMALL, "steps": 5}, cfg=cfg)
    assert counts == {"text": projections, "time": 1, "ofs": 1, "steps": 5 * projections}


def test_runs_of_steps_are_made_where_they_begin(monkeypatch, tmp_path):
    """A run that is gone on with in the middle has the modulations that it had, bit for bit."""
    monkeypatch.setattr(denoise, "STEPS_AHEAD", 3)
    pipe, calls = tiny(), []
    made = pipe.transformer.modulations
    monkeypatch.setattr(
        pipe.transformer, "modulations", lambda t, ofs: calls.append(t.tolist()) or made(t, ofs)
    )
    path = tmp_path / "latents.safetensors"
    given = {**SMALL, "steps": 7, "save_latents": path, "checkpoint_every": 5}
    kept = []
    whole = pipe.generate("a", **given, callback=lambda *_: kept.append(_bytes(path)))
    runs = [[999, 856, 713], [570, 428, 285], [142]]
    assert calls == runs
    path.write_bytes(kept[5])  # as it was after five steps
    calls.clear()
    assert torch.equal(pipe.generate("a", **given, resume=path), whole)
    assert calls == runs[1:]


def _bytes(path):
    return path.read_bytes() if path.exists() else b""
