"""The comparison that precedes timing sees errors, wherever they are; inputs, conventions, CSV."""

from dataclasses import replace

import pytest
import torch

from benchmarks import conditions, inputs, oracle, report
from cogvx_kernels.testing import OPS, REDRAWS, SIZES, as_tuple


def test_slice_of_the_call_gives_the_slice_of_the_result():
    info, size = OPS["qk_norm_rope3d"], SIZES["tiny"]
    arguments = inputs.make(info.at_size(size), torch.float64, "cpu", 0)
    whole = info.reference(**arguments)
    for start, stop in ((0, 10), (0, 20), (10, 40), (20, 30), (0, size.seqlen)):
        part = info.reference(**oracle.cut(info, arguments, start, stop))
        for a, b in zip(part, whole, strict=True):
            assert torch.equal(a, b[:, start:stop])


def sequence(op, monkeypatch, grad=False):
    """An oracle of three short slices, and the reference's results."""
    monkeypatch.setattr(oracle, "SLICE", 8)
    info = OPS[op]
    arguments = inputs.make(info.at_size(SIZES["tiny"]), torch.float32, "cpu", 0)
    back = inputs.grad_outputs_like(info.reference(**arguments), 0) if grad else None
    made = oracle.Oracle(info, arguments, back)
    return made, oracle.results_of(info.reference, arguments, made, back)


def failed(made, results):
    return [x.name for x in made.compare(results) if not x.ok]


def test_row_between_the_slices_is_compared(monkeypatch):
    made, results = sequence("rope3d", monkeypatch)
    assert len(made.spans) == 3 and "coarsely" in str(made)
    assert not failed(made, results)
    results["out0"][0, 12, 1] += 0.5  # of a token in none of the slices
    assert failed(made, results) == ["out0, between what fp64 is of"]
    results["out0"][0, 12, 1] = torch.nan
    assert len(failed(made, results)) == 1


def test_sums_are_compared_over_all_tokens(monkeypatch):
    made, results = sequence("qk_norm_rope3d", monkeypatch, grad=True)
    assert {f"d{name}" for name in made.info.summed} < results.keys()
    assert not failed(made, results)
    results["dk_bias"] = results["dk_bias"] * 1.01
    assert failed(made, results) == ["dk_bias"]


# --- videos ----------------------------------------------------------------------------------


def video(op, monkeypatch=None, grad=True):
    """An oracle of a small call and the reference's results; with a monkeypatch of some rows and
    columns alone."""
    info = OPS[op]
    size = replace(SIZES["tiny"], height=1, width=2)
    arguments = inputs.make(info.at_size(size), torch.float32, "cpu", 0)
    if monkeypatch is not None:
        monkeypatch.setattr(oracle, "THIN", arguments["x"].numel() // 9 + 1)
    outputs = as_tuple(info.reference(**arguments))
    back = inputs.grad_outputs_like(outputs, 0) if grad else None
    made = oracle.Oracle(info, arguments, back)
    return made, oracle.results_of(info.reference, arguments, made, back)


@pytest.mark.parametrize("op", ["spatial_norm_silu", "residual_moments", "temporal_conv"])
def test_videos_are_compared_whole(op):
    made, results = video(op)
    assert str(made) == "every element"
    assert not failed(made, results)
    assert made.summed <= results.keys()
    for name, x in results.items():
        assert failed(made, {**results, name: x + 0.01 * x.abs().max()}) == [name]


def test_pixel_between_those_in_fp64_is_compared(monkeypatch):
    made, results = video("temporal_conv", monkeypatch, grad=False)
    assert "one in 3 rows" in str(made) and "coarsely" in str(made)
    assert not failed(made, results)
    inside, between = results["out0"].clone(), results["out0"].clone()
    inside[0, 5, 1, 0, 0] += 0.1
    between[0, 5, 1, 1, 2] += 2.0
    for wrong in (inside, between, between.fill_(torch.nan)):
        assert len(failed(made, {"out0": wrong})) == 1


def test_redraws_where_few_sums_decide():
    assert len(video("spatial_norm_silu", grad=False)[0].redraws) == len(REDRAWS)
    assert video("temporal_conv", grad=False)[0].redraws == []


def test_gradients_have_the_strides_of_outputs():
    x = torch.zeros(2, 3, 4, 5, 6).contiguous(memory_format=torch.channels_last_3d)
    (grad,) = inputs.grad_outputs_like((x.requires_grad_(),), 0)
    assert grad.stride() == x.stride() and not grad.requires_grad and bool(grad.any())


@pytest.mark.parametrize("info", [info for info in OPS.values() if info.videos], ids=str)
def test_ops_on_videos_have_both_layouts(info):
    calls = inputs.conventions(info, SIZES["tiny"])
    model, contiguous = (
        {name: spec.layout for name, spec in calls[call].specs().items() if name in info.videos}
        for call in ("model", "contiguous")
    )
    assert model.keys() == contiguous.keys() and set(model.values()) <= {"channels_last", "behind"}
    assert set(contiguous.values()) == {"contiguous"}


def test_csv_is_appended_to_only_with_its_columns(tmp_path):
    path = tmp_path / "results.csv"
    known = dict.fromkeys(conditions.CONDITIONS, "x")
    row = report.Row("op", "size", "model", "forward", "eager", "float32", "cpu")
    report.add_to_csv(path, [row], known)
    report.add_to_csv(path, [row, row], known)
    assert path.read_text().count("\n") == 4
    path.write_text("something,else\n")
    with pytest.raises(ValueError, match="other columns"):
        report.add_to_csv(path, [row], known)
