"""Tables of 3-D rotary positions: positions along frames, height and width, cos and sin.

A table has one row for each video token, frames slowest and width fastest, and one column for each
rotated pair of dims: first the pairs of the time axis, then of height, then of width.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _checks

AXES = ("frames", "height", "width")


def split_headdim(headdim: int) -> tuple[int, int, int]:
    """Split a head's dims among time, height and width: 16, 24, 24 of 64.

    Height and width get the even number nearest to 3/8 of headdim (ties up, but time keeps at
    least 2), time the rest; 8, 16, 16 of 40 and 32, 48, 48 of 128. At 64 it is CogVideoX's split.

    Raises TypeError if headdim is not an integer, ValueError if it is odd or less than 6.
    """
    if not _is_integer(headdim):
        raise TypeError(
            f"split_headdim: headdim must be an integer; got {_checks.describe(headdim)}"
        )
    if headdim % 2 or headdim < 6:
        raise ValueError(f"split_headdim: headdim must be even and at least 6; got {headdim}")
    side = 2 * ((3 * headdim + 8) // 16)  # 3/8 of headdim, to the nearest even number, ties up
    side = min(side, 2 * ((headdim - 2) // 4))
    return headdim - 2 * side, side, side


def crop_positions(
    grid: Sequence[int], base_grid: tuple[int, int] = (30, 45)
) -> tuple[Tensor, Tensor, Tensor]:
    """Positions of CogVideoX 1.0: a centred crop of the training grid.

    The crop has the aspect of the token grid and is the largest that fits in `base_grid`. The n
    rows are evenly spaced from top to bottom·(n - 1)/n, and the columns likewise: the *absolute*
    end is scaled, so with an offset the step is not extent/n. Where grid and base_grid are equal,
    as at 480x720, the positions are integers.

    grid       (frames, height, width) in tokens, positive
    base_grid  (height, width) in tokens of the training size; 30, 45 for 480x720
    returns    three 1-D fp32 tensors: frames, height, width

    Raises TypeError for sizes that are not integers, ValueError for sizes below 1.
    Source: diffusers' get_resize_crop_region_for_grid and linspace grid of get_3d_rotary_pos_embed.
    """
    frames, height, width = _grid("crop_positions", grid)
    base_height, base_width = _sizes("crop_positions", "base_grid", base_grid, AXES[1:])
    if height / width > base_height / base_width:
        crop_height, crop_width = base_height, round(base_height / height * width)
    else:
        crop_height, crop_width = round(base_width / width * height), base_width
    top = round((base_height - crop_height) / 2)
    left = round((base_width - crop_width) / 2)
    return (
        torch.arange(frames, dtype=torch.float32),
        _linspace(top, (top + crop_height) * (height - 1) / height, height),
        _linspace(left, (left + crop_width) * (width - 1) / width, width),
    )


def slice_positions(
    grid: Sequence[int], max_grid: tuple[int, int] | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Positions of CogVideoX 1.5: the integers along each axis.

    grid      (frames, height, width) in tokens, positive; frames after the temporal patch
    max_grid  largest (height, width) in tokens; None for no bound
    returns   three 1-D fp32 tensors: frames, height, width

    Raises TypeError for sizes that are not integers, ValueError for sizes below 1 or a grid larger
    than max_grid. Source: diffusers' get_3d_rotary_pos_embed with grid_type="slice".
    """
    sizes = _grid("slice_positions", grid)
    bounds: tuple[int, ...] = sizes[1:]
    if max_grid is not None:
        bounds = _sizes("slice_positions", "max_grid", max_grid, AXES[1:])
    for axis, size, bound in zip(AXES[1:], sizes[1:], bounds, strict=True):
        if size > bound:
            raise ValueError(
                f"slice_positions: grid {sizes} exceeds max_grid {max_grid} in {axis}: "
                f"at most {bound}, got {size}"
            )
    frames, height, width = (torch.arange(size, dtype=torch.float32) for size in sizes)
    return frames, height, width


def rope3d_tables(
    positions: Sequence[Tensor] | Tensor,
    split: Sequence[int],
    *,
    theta: float = 10000.0,
    frequencies: Sequence[Tensor] | None = None,
    precision: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """cos and sin for `rope3d`, each (video_len, sum(split) // 2) fp32.

    Axis i rotates split[i] dims: pair j by position · theta^(-2j / split[i]).

    positions    three 1-D tensors (frames, height, width), whose product is the grid, as
                 `crop_positions` and `slice_positions` give them; or (video_len, 3), a position
                 for each token. Any unit: fractions and offsets are as good as integers.
    split        even dims of time, height, width: (16, 24, 24) for CogVideoX, `split_headdim` for
                 others, (44, 42, 42) for Wan, (16, 56, 56) for HunyuanVideo
    theta        base of the frequencies: 10000 for CogVideoX and Wan, 256 for HunyuanVideo
    frequencies  instead of theta: three tensors (split[i] // 2,), radians per position
    precision    dtype in which angles are computed; float32 as in CogVideoX, float64 as in Wan

    Raises TypeError for a wrong type, ValueError for shapes that do not fit. The tables are on the
    device of the positions.
    Source: diffusers' get_3d_rotary_pos_embed; arXiv 2408.06072, section 2.2.
    """
    op = "rope3d_tables"
    split = _integers(op, "split", split, ("time", "height", "width"))
    _check_tensors(op, "positions", positions, "(frames, height, width), or one (video_len, 3)")
    if not isinstance(precision, torch.dtype) or not precision.is_floating_point:
        raise TypeError(
            f"{op}: precision must be a floating-point dtype; got {_checks.describe(precision)}"
        )
    if len(split) != 3 or any(dims < 0 or dims % 2 for dims in split) or not sum(split):
        raise ValueError(f"{op}: split must be three even numbers of dims; got {tuple(split)}")
    if frequencies is None:
        _checks.positive(op, "theta", theta)
        frequencies = [
            1.0 / theta ** (torch.arange(0, dims, 2, dtype=precision) / dims) for dims in split
        ]
    _check_tensors(op, "frequencies", frequencies, "(split[i] // 2,)")
    if [tuple(f.shape) for f in frequencies] != [(dims // 2,) for dims in split]:
        raise ValueError(
            f"{op}: frequencies must be tensors of shapes {[(dims // 2,) for dims in split]} for "
            f"split {tuple(split)}; got {[tuple(f.shape) for f in frequencies]}"
        )
    if isinstance(positions, Tensor):
        _checks.shape(op, "positions", positions, (len(positions), 3), "(video_len, 3)")
        columns = list(positions.unbind(1))
    else:
        if len(positions) != 3 or any(p.dim() != 1 for p in positions):
            raise ValueError(
                f"{op}: positions must be three 1-D tensors (frames, height, width) or one "
                f"(video_len, 3); got {[tuple(p.shape) for p in positions]}"
            )
        columns = [p.flatten() for p in torch.meshgrid(*positions, indexing="ij")]
    angles = torch.cat(
        [
            torch.outer(column.to(precision), frequency.to(column.device, precision))
            for column, frequency in zip(columns, frequencies, strict=True)
        ],
        1,
    )
    return angles.cos().float(), angles.sin().float()


def _check_tensors(op: str, name: str, value: Sequence[Tensor] | Tensor, shapes: str) -> None:
    several = value if isinstance(value, list | tuple) else [value]
    if not all(isinstance(each, Tensor) for each in several):
        raise TypeError(
            f"{op}: {name} must be three tensors {shapes}; got {_checks.describe(value)}"
        )


def _grid(op: str, grid: Sequence[int]) -> tuple[int, int, int]:
    frames, height, width = _sizes(op, "grid", grid, AXES)
    return frames, height, width


def _sizes(op: str, name: str, value: Sequence[int], axes: Sequence[str]) -> tuple[int, ...]:
    """Positive integers, one for each axis."""
    sizes = _integers(op, name, value, axes)
    if len(sizes) != len(axes) or any(size < 1 for size in sizes):
        raise ValueError(f"{op}: {name} must be positive ({', '.join(axes)}); got {sizes}")
    return sizes


def _integers(op: str, name: str, value: Sequence[int], axes: Sequence[str]) -> tuple[int, ...]:
    if isinstance(value, Iterable) and not isinstance(value, str):
        numbers = tuple(value)
        if all(_is_integer(number) for number in numbers):
            return numbers
    raise TypeError(
        f"{op}: {name} must be integers ({', '.join(axes)}); got {_checks.describe(value)}"
    )


def _is_integer(value: Any) -> bool:
    """True for integers of Python, torch and NumPy, and the torch.SymInt of a traced shape."""
    if isinstance(value, Tensor):
        return not value.is_floating_point() and not value.dim()
    return isinstance(value, (int, torch.SymInt)) or hasattr(value, "__index__")


def _linspace(start: float, stop: float, count: int) -> Tensor:
    return torch.linspace(start, stop, count, dtype=torch.float32)
