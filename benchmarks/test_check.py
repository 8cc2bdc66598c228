"""Laws of what the benchmarks stand on: `pytest benchmarks/test_check.py`; `tests/` runs it too."""

import pytest
import torch

from cogvx_kernels.testing import OPS, SIZES

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
