"""Properties and golden values of the tables of `rope3d` (docs/model.md, sections 3 and 9)."""

import pytest
import torch

import cogvx_kernels as ck

BASE_GRID = (30, 45)  # tokens of 480x720
SPLIT = (16, 24, 24)


def angles(cos, sin):
    return torch.atan2(sin, cos)


@pytest.mark.parametrize(
    ("headdim", "split"),
    [(64, (16, 24, 24)), (40, (8, 16, 16)), (128, (32, 48, 48)), (80, (20, 30, 30)),
     (96, (24, 36, 36)), (8, (4, 2, 2)), (6, (2, 2, 2))],
)  # fmt: skip
def test_split_headdim(headdim, split):
    assert ck.split_headdim(headdim) == split
    assert sum(split) == headdim


@pytest.mark.parametrize("headdim", [4, 15, 0])
def test_split_headdim_refuses_odd_and_small_heads(headdim):
    with pytest.raises(ValueError, match=f"headdim must be even and at least 6; got {headdim}"):
        ck.split_headdim(headdim)


def test_golden_frequencies():
    """The angles of token (1, 1, 1) are the frequencies of time, height and width."""
    found = angles(*ck.rope3d_tables(ck.slice_positions((2, 2, 2)), SPLIT))[-1]
    time = torch.tensor([1, 0.31623, 0.1, 0.031623, 0.01, 0.0031623, 0.001, 0.00031623])
    side = torch.tensor([1, 0.464159, 0.215443, 0.1, 0.0464159, 0.0215443, 0.01, 0.00464159,
                         0.00215443, 0.001, 0.000464159, 0.000215443])  # fmt: skip
    torch.testing.assert_close(found, torch.cat([time, side, side]), rtol=2e-5, atol=0)


def test_golden_row_of_a_token():
    """At 480x720 token (t, h, w) is row (t·30 + h)·45 + w; angles are t, h, w times frequency."""
    cos, sin = ck.rope3d_tables(ck.crop_positions((13, *BASE_GRID)), SPLIT)
    assert cos.shape == sin.shape == (17550, 32)
    assert cos.dtype == sin.dtype == torch.float32
    for t, h, w in ((0, 0, 0), (12, 29, 44), (5, 17, 31)):
        row = (t * 30 + h) * 45 + w
        expected = torch.cat([
            t * 10000.0 ** (-2 * torch.arange(8).double() / 16),
            h * 10000.0 ** (-2 * torch.arange(12).double() / 24),
            w * 10000.0 ** (-2 * torch.arange(12).double() / 24),
        ])  # fmt: skip
        torch.testing.assert_close(cos[row], expected.cos().float(), rtol=0, atol=5e-6)
        torch.testing.assert_close(sin[row], expected.sin().float(), rtol=0, atol=5e-6)


def test_crop_positions_at_the_base_grid_are_exact_integers():
    for ours, integers in zip(
        ck.crop_positions((13, *BASE_GRID)), ck.slice_positions((13, *BASE_GRID)), strict=True
    ):
        assert torch.equal(ours, integers)


@pytest.mark.parametrize(
    ("grid", "top_left", "bottom_right"),
    [((48, 85), (2, 0), (27, 45)), ((45, 30), (0, 12), (30, 32)),
     ((24, 36), (0, 0), (30, 45)), ((32, 32), (0, 8), (30, 38))],
)  # fmt: skip
def test_golden_crop_regions(grid, top_left, bottom_right):
    frames, *sides = ck.crop_positions((3, *grid), BASE_GRID)
    assert frames.tolist() == [0, 1, 2]
    for side, n, start, stop in zip(sides, grid, top_left, bottom_right, strict=True):
        assert len(side) == n
        assert side[0] == start
        assert side[-1].item() == pytest.approx(stop * (n - 1) / n, rel=1e-6)


def test_golden_crop_positions():
    _, height, _ = ck.crop_positions((1, 48, 85))
    assert height[:3].tolist() == pytest.approx([2, 2.520, 3.040], abs=5e-4)
    _, height, width = ck.crop_positions((1, 45, 30))
    assert (height[-1].item(), width[-1].item()) == pytest.approx((29.33, 30.93), abs=5e-3)


def test_slice_positions_refuse_more_than_max_grid():
    assert [len(p) for p in ck.slice_positions((11, 48, 85), (48, 85))] == [11, 48, 85]
    with pytest.raises(ValueError, match=r"grid \(1, 60, 85\) exceeds max_grid \(48, 85\) in hei"):
        ck.slice_positions((1, 60, 85), (48, 85))


@pytest.mark.parametrize("positions", [ck.crop_positions, ck.slice_positions])
@pytest.mark.parametrize("grid", [(0, 3, 4), (3, 4), (2, -1, 4)])
def test_grids_must_be_positive(positions, grid):
    with pytest.raises(ValueError, match="grid must be positive"):
        positions(grid)


def test_positions_of_tokens_equal_the_grid():
    grid = ck.slice_positions((2, 3, 4))
    tokens = torch.cartesian_prod(*grid)
    for ours, expected in zip(
        ck.rope3d_tables(tokens, (16, 24, 24)), ck.rope3d_tables(grid, (16, 24, 24)), strict=True
    ):
        assert torch.equal(ours, expected)


@pytest.mark.parametrize("split", [(44, 42, 42), (16, 56, 56)], ids=["Wan", "HunyuanVideo"])
def test_splits_of_other_models(split):
    cos, sin = ck.rope3d_tables(
        ck.slice_positions((2, 3, 4)), split, theta=256.0, precision=torch.float64
    )
    assert cos.shape == (24, 64)
    expected = torch.arange(4.0).double() * 256.0 ** (-2 / split[2])  # second pair of width
    column = (split[0] + split[1]) // 2 + 1
    torch.testing.assert_close(angles(cos, sin)[:4, column].double(), expected)


def test_custom_frequencies():
    split = (2, 4, 2)
    frequencies = [torch.tensor([0.5]), torch.tensor([0.25, 0.125]), torch.tensor([1.0])]
    cos, sin = ck.rope3d_tables(ck.slice_positions((2, 2, 2)), split, frequencies=frequencies)
    torch.testing.assert_close(angles(cos, sin)[-1], torch.tensor([0.5, 0.25, 0.125, 1.0]))
    with pytest.raises(ValueError, match="frequencies must be tensors of shapes"):
        ck.rope3d_tables(ck.slice_positions((2, 2, 2)), (4, 4, 2), frequencies=frequencies)


@pytest.mark.parametrize("split", [(15, 24, 24), (0, 0, 0), (16, 48), (-2, 4, 4)])
def test_tables_refuse_splits_that_cannot_be_paired(split):
    with pytest.raises(ValueError, match="split must be three even numbers"):
        ck.rope3d_tables(ck.slice_positions((1, 2, 2)), split)


def test_tables_refuse_positions_of_other_shapes():
    with pytest.raises(ValueError, match="positions must be"):
        ck.rope3d_tables(torch.zeros(4, 2), (2, 2, 2))
    with pytest.raises(ValueError, match="positions must be"):
        ck.rope3d_tables([torch.zeros(2), torch.zeros(2)], (2, 2, 2))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ck.slice_positions("abc"), r"slice_positions: grid must be integers \(frames,"),
        (lambda: ck.slice_positions((1, 2.5, 3)), r"slice_positions: grid must be integers"),
        (lambda: ck.slice_positions((1, 2, 3), 45), r"slice_positions: max_grid must be integers"),
        (lambda: ck.crop_positions(None), r"crop_positions: grid must be integers .*; got None"),
        (lambda: ck.crop_positions((1, 2, 3), "ab"), r"crop_positions: base_grid must be integers"),
        (lambda: ck.split_headdim("64"), r"split_headdim: headdim must be an integer; got '64'"),
        (lambda: ck.rope3d_tables("abc", SPLIT), r"positions must be three tensors \(frames,"),
        (lambda: ck.rope3d_tables((1, 2, 3), SPLIT), r"positions must be three tensors"),
        (lambda: ck.rope3d_tables(torch.ones(4, 3), "abc"), r"split must be integers \(time,"),
        (lambda: ck.rope3d_tables(torch.ones(4, 3), SPLIT, frequencies=[1, 2, 3]),
         r"frequencies must be three tensors \(split\[i\] // 2,\)"),
        (lambda: ck.rope3d_tables(torch.ones(4, 3), SPLIT, precision="float32"),
         r"precision must be a floating-point dtype; got 'float32'"),
    ],
)  # fmt: skip
def test_wrong_types_are_refused(call, message):
    with pytest.raises(TypeError, match=message):
        call()


def test_integers_of_any_kind_are_sizes():
    wanted = ck.slice_positions((1, 2, 3))
    for grid in (torch.zeros(1, 2, 3).shape, torch.tensor([1, 2, 3]), [1, 2, 3]):
        for ours, theirs in zip(ck.slice_positions(grid), wanted, strict=True):
            assert torch.equal(ours, theirs)
