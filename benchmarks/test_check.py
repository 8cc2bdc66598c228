"""Laws of what the benchmarks stand on: `pytest benchmarks/test_check.py`; `tests/` runs it too."""

from dataclasses import replace

import pytest
import torch

from cogvx_kernels.testing import OPS, REDRAWS, SIZES, as_tuple

from . import check, conditions, inputs, report


def test_slices_cut_the_call_and_not_its_meaning():
    """The reference on a slice of tokens is the slice of the reference."""
    info, size = OPS["qk_norm_rope3d"], SIZES["tiny"]
    arguments = inputs.make(info.at_size(size), torch.float64, "cpu", 0)
    whole = info.reference(**arguments)
    for start, stop in ((0, 10), (0, 20), (10, 40), (20, 30), (0, size.seqlen)):
        part = info.reference(**check._cut(info, arguments, start, stop))
        for a, b in zip(part, whole, strict=True):
            assert torch.equal(a, b[:, start:stop])


def test_a_row_between_the_slices_is_seen(monkeypatch):
    monkeypatch.setattr(check, "SLICE", 8)
    info = OPS["rope3d"]
    arguments = inputs.make(info.at_size(SIZES["tiny"]), torch.float32, "cpu", 0)
    law = check.Law(info, arguments, None)
    assert len(law.spans) == 3 and "coarsely" in str(law)
    right = check.results_of(info.reference, arguments, law, None)
    assert all(verdict.ok for verdict in law.verdicts(right))
    right["out0"][0, 12, 1] += 0.5  # of a token in none of the slices
    assert [verdict.ok for verdict in law.verdicts(right)] == [False]
    right["out0"][0, 12, 1] = torch.nan
    assert [verdict.ok for verdict in law.verdicts(right)] == [False]


def test_sums_are_judged_over_all_tokens(monkeypatch):
    monkeypatch.setattr(check, "SLICE", 8)
    info = OPS["qk_norm_rope3d"]
    arguments = inputs.make(info.at_size(SIZES["tiny"]), torch.float32, "cpu", 0)
    douts = inputs.cotangents(info.reference(**arguments), 0)
    law = check.Law(info, arguments, douts)
    right = check.results_of(info.reference, arguments, law, douts)
    assert {f"d{name}" for name in info.summed} < right.keys()
    assert all(verdict.ok for verdict in law.verdicts(right))
    right["dk_bias"] = right["dk_bias"] * 1.01
    assert [v.name for v in law.verdicts(right) if not v.ok] == ["dk_bias"]


# --- videos ----------------------------------------------------------------------------------


def video_law(op, monkeypatch=None, douts=True):
    """Of a small call; with a monkeypatch some rows and columns alone are judged."""
    info = OPS[op]
    size = replace(SIZES["tiny"], height=1, width=2)
    arguments = inputs.make(info.at_size(size), torch.float32, "cpu", 0)
    if monkeypatch is not None:
        monkeypatch.setattr(check, "THIN", arguments["x"].numel() // 9 + 1)
    outputs = tuple(x for x in as_tuple(info.reference(**arguments)))
    back = inputs.cotangents(outputs, 0) if douts else None
    law = check.Law(info, arguments, back)
    return law, check.results_of(info.reference, arguments, law, back)


@pytest.mark.parametrize("op", ["spatial_norm_silu", "residual_moments", "temporal_conv"])
def test_videos_are_judged_whole(op):
    law, right = video_law(op)
    assert str(law) == "every element"
    assert all(verdict.ok for verdict in law.verdicts(right))
    assert {
        f"d{name}" for name in law.info.summed if law.yardstick.get(f"d{name}") is not None
    } <= (right.keys())
    for name in right:
        wrong = {**right, name: right[name] + 0.01 * right[name].abs().max()}
        assert [v.name for v in law.verdicts(wrong) if not v.ok] == [name]


def test_a_pixel_between_those_judged_is_seen(monkeypatch):
    law, right = video_law("temporal_conv", monkeypatch, douts=False)
    assert "one in 3 rows" in str(law) and "coarsely" in str(law)
    assert all(verdict.ok for verdict in law.verdicts(right))
    judged, between = right["out0"].clone(), right["out0"].clone()
    judged[0, 5, 1, 0, 0] += 0.1
    between[0, 5, 1, 1, 2] += 2.0
    for wrong in (judged, between, between.fill_(torch.nan)):
        assert [verdict.ok for verdict in law.verdicts({"out0": wrong})] == [False]


def test_luck_is_drawn_again_where_few_sums_decide():
    assert len(video_law("spatial_norm_silu", douts=False)[0].redraws) == len(REDRAWS)
    assert video_law("temporal_conv", douts=False)[0].redraws == []


def test_gradients_are_laid_out_as_what_they_are_of():
    x = torch.zeros(2, 3, 4, 5, 6).contiguous(memory_format=torch.channels_last_3d)
    (dout,) = inputs.cotangents((x.requires_grad_(),), 0)
    assert dout.stride() == x.stride() and not dout.requires_grad and bool(dout.any())


@pytest.mark.parametrize("info", [info for info in OPS.values() if info.videos], ids=str)
def test_every_op_on_videos_is_there_in_both_layouts(info):
    calls = inputs.conventions(info, SIZES["tiny"])
    model, contiguous = (
        {name: spec.layout for name, spec in calls[call].specs().items() if name in info.videos}
        for call in ("model", "contiguous")
    )
    assert model.keys() == contiguous.keys() and set(model.values()) <= {"channels_last", "behind"}
    assert set(contiguous.values()) == {"contiguous"}


def test_adds_to_its_csv_and_to_no_other(tmp_path):
    path = tmp_path / "results.csv"
    company = dict.fromkeys(conditions.CONDITIONS, "x")
    row = report.Row("op", "size", "model", "forward", "eager", "float32", "cpu")
    report.add_to_csv(path, [row], company)
    report.add_to_csv(path, [row, row], company)
    assert path.read_text().count("\n") == 4
    path.write_text("something,else\n")
    with pytest.raises(ValueError, match="other columns"):
        report.add_to_csv(path, [row], company)
