"""The harness finds the bug of each known bad kernel, and none in its correct twin."""

import math
import os
import re
import resource
import signal
import time
import types
from pathlib import Path

import pytest
import torch
from torch import Tensor

from cogvx_kernels import _backend, _launch

if not (_backend.HAS_TRITON and _backend.INTERPRETED):
    pytest.skip("needs Triton's interpreter", allow_module_level=True)

from triton.runtime.interpreter import GridExecutor, InterpreterBuilder

from tests.harness import known_bad_kernels, workers
from tests.harness.fence import Fence, untouched
from tests.harness.observe import GRID_LIMITS, Launch, observe
from tests.harness.virtual import VirtualMemoryRefused, wide_strides
from tests.harness.workers import run_cases

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int8, torch.int64)


def test_readme_example(capsys: pytest.CaptureFixture[str]) -> None:
    page = Path(known_bad_kernels.__file__).with_name("README.md").read_text()
    [example] = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    exec(example, {})
    assert capsys.readouterr().out.split() == ["0", "passed", "1", "crashed", "SIGSEGV"]


def _fenced_copy(fence: Fence, n: int = 100, **shifts: int) -> tuple[Tensor, Tensor]:
    x, y = fence.new((n,)), fence.new((n,))
    x.copy_(torch.arange(n))
    known_bad_kernels.copy(x, y, **shifts)
    return x, y


# --- fence ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_fenced_tensor_is_aligned_and_poisoned(side: str, dtype: torch.dtype) -> None:
    with Fence(side) as fence:
        for shape in ((), (1,), (3, 5), (8, 1000)):
            x = fence.new(shape, dtype)
            assert x.shape == shape and x.is_contiguous() and x in fence and x._base is None
            assert x.data_ptr() % dtype.itemsize == 0
            if side == "left" or math.prod(shape) * dtype.itemsize % 16 == 0:
                assert x.data_ptr() % 16 == 0
            assert x.isnan().all() if dtype.is_floating_point else untouched(x).all()
            assert untouched(x).all() and not untouched(x.zero_()).any()


def test_fenced_tensor_may_be_empty() -> None:
    with Fence() as fence:
        assert fence.new((0, 3), torch.float16).shape == (0, 3)
        known_bad_kernels.copy(fence.new((0,)), fence.new((0,)))


def test_fenced_tensor_outlives_its_fence() -> None:
    with Fence() as fence:
        x = fence.new((1000,)).fill_(3.0)
    assert (x == 3.0).all() and x not in fence


def test_correct_kernel_passes_the_fence() -> None:
    for side in ("right", "left"):
        with Fence(side) as fence:
            x, y = _fenced_copy(fence)
            assert torch.equal(x, y)


# side of the fence, load_shift, store_shift
OVERRUNS = {
    "load past the end": ("right", 1, 0),
    "store past the end": ("right", 0, 1),
    "load before the start": ("left", -1, 0),
    "store before the start": ("left", 0, -1),
}


def _copy_or_overrun(case: str) -> None:
    side, load_shift, store_shift = OVERRUNS.get(case, ("right", 0, 0))
    with Fence(side) as fence:
        print("copying", case)
        _fenced_copy(fence, load_shift=load_shift, store_shift=store_shift)


def test_overrun_by_one_element_fails_one_case() -> None:
    cases = [case for overrun in OVERRUNS for case in (overrun, f"sound, after {overrun}")]
    for outcome in run_cases(_copy_or_overrun, cases, timeout=30):
        assert outcome.ok == (outcome.case not in OVERRUNS), outcome
        assert f"copying {outcome.case}" in outcome.output
        if not outcome.ok:
            assert (outcome.status, outcome.detail) == ("crashed", "SIGSEGV")
            assert "known_bad_kernels.py" in outcome.output  # where it crashed


@pytest.mark.parametrize(("side", "shift"), [("right", -1), ("left", 1)])
def test_written_slack_fails_the_check(side: str, shift: int) -> None:
    where = "before its start, from -4 to -1" if side == "right" else "after its end, from +0 to +3"
    with pytest.raises(AssertionError, match=re.escape(f"float32 (100,): 4 bytes {where}")):
        with Fence(side) as fence:
            _fenced_copy(fence, store_shift=shift)


@pytest.mark.parametrize(("side", "shift"), [("right", -1), ("left", 1)])
def test_slack_copied_to_slack_fails_the_check(side: str, shift: int) -> None:
    fence = Fence(side)
    _fenced_copy(fence, load_shift=shift, store_shift=shift)
    with pytest.raises(AssertionError, match="written out of bounds"):
        fence.check()


@pytest.mark.parametrize("dtype", DTYPES[:4], ids=str)
def test_slack_reads_as_nan(dtype: torch.dtype) -> None:
    with Fence() as fence:
        for _ in range(16):  # all stripes there are
            x, y = (fence.new((5,), dtype).zero_() for _ in range(2))
            known_bad_kernels.copy(x, y, load_shift=-1)
            assert y.isnan().tolist() == [True, False, False, False, False]


def test_unwritten_elements_stay_poison() -> None:
    with Fence() as fence:
        y = fence.new((10,))
        known_bad_kernels.all_but_last_kernel[(1,)](y, 10, BLOCK=16)
        assert untouched(y).tolist() == [False] * 9 + [True]
        assert y[9].isnan()


def _allocate(x: Tensor) -> dict[str, Tensor]:
    return {
        "empty": torch.empty(x.shape, dtype=x.dtype, device=x.device),
        "empty_like": torch.empty_like(x),
        "empty_strided": torch.empty_strided((2, 3), (1, 2)),
        "new_empty": x.new_empty((2, 3)),
        "zeros": torch.zeros(2, 3),
        "contiguous": x.contiguous(),
        "no copy": x.t().contiguous(),
        "meta": torch.empty(2, 3, device="meta"),
        "grad": torch.empty(2, 3, requires_grad=True),
        "nothing": torch.empty(0),
    }


def test_allocations_of_the_package_are_fenced() -> None:
    x = torch.randn(3, 2).t()
    in_package = types.FunctionType(
        _allocate.__code__, {"__name__": "cogvx_kernels.op.kernel", "torch": torch}
    )
    factories = torch.empty, Tensor.new_empty, Tensor.contiguous
    with Fence() as fence:
        with fence.allocations():
            ours, others = in_package(x), _allocate(x)
        plain = {"no copy", "meta", "grad", "nothing"}
        assert {name for name, y in ours.items() if y in fence} == ours.keys() - plain
        assert not any(y in fence for y in others.values())
        for name, y in ours.items():
            expected = others[name]
            assert (y.shape, y.stride(), y.dtype) == (
                expected.shape,
                expected.stride(),
                expected.dtype,
            )
            if name in ("empty", "empty_like", "empty_strided", "new_empty"):
                assert y.isnan().all()
        assert torch.equal(ours["zeros"], torch.zeros(2, 3))
        assert torch.equal(ours["contiguous"], x)
    assert factories == (torch.empty, Tensor.new_empty, Tensor.contiguous)
    assert "new_empty" not in vars(Tensor)


# --- observe -------------------------------------------------------------------------------------


def test_bytes_are_those_requested() -> None:
    for dtype in (torch.float32, torch.float16, torch.float64, torch.bool):
        x, y = torch.ones(100).to(dtype), torch.zeros(100, dtype=dtype)
        with observe() as seen:
            known_bad_kernels.copy(x, y, block=32)
            known_bad_kernels.copy(x[:7], y[:7], block=32)
        assert [launch.grid for launch in seen.launches] == [(4, 1, 1), (1, 1, 1)]
        assert [launch.kernel for launch in seen.launches] == ["_copy_kernel"] * 2
        sizes = [100 * dtype.itemsize, 7 * dtype.itemsize]
        assert [launch.bytes_read for launch in seen.launches] == sizes
        assert [launch.bytes_written for launch in seen.launches] == sizes
        assert (seen.bytes_read, seen.bytes_written) == (sum(sizes), sum(sizes))
        assert not seen.faults()


def test_bytes_of_descriptors_and_atomics() -> None:
    x, y = torch.ones(5), torch.zeros(5)
    with observe() as seen:
        known_bad_kernels.descriptor_kernel[(1,)](x, y, 5, BLOCK=8)
        known_bad_kernels.count_kernel[(3,)](y, ATOMIC=True)
    assert not seen.races and not seen.unmasked
    assert [(launch.bytes_read, launch.bytes_written) for launch in seen.launches] == [
        (20, 20),
        (12, 12),
    ]
    assert [launch.atomics for launch in seen.launches] == [0, 3]
    assert y.tolist() == [4.0, 1.0, 1.0, 1.0, 1.0]


def test_races_are_reported_with_kernel_programs_and_lines() -> None:
    with observe() as seen:
        known_bad_kernels.count_kernel[(1, 4)](torch.zeros(1), ATOMIC=False)
    stores, load_and_store = seen.races
    assert "count_kernel: programs (0, 0, 0) and (0, 1, 0)" in stores
    assert "harness/known_bad_kernels.py:" in stores and "4 bytes contested" in stores
    assert "load at" in load_and_store and "store at" in load_and_store


def test_store_to_a_load_of_another_program_is_a_race() -> None:
    with observe() as seen:
        known_bad_kernels.neighbour_kernel[(4,)](torch.zeros(5))
    (race,) = seen.races
    assert "12 bytes contested" in race


@pytest.mark.parametrize(("half", "races"), [(0, 1), (1, 1), (2, 0)])
def test_races_between_sizes(half: int, races: int) -> None:
    words = torch.zeros(2, dtype=torch.int32)
    with observe() as seen:
        known_bad_kernels.overlap_kernel[(2,)](words, words.view(torch.int16)[half:])
    assert len(seen.races) == races


def test_atomics_race_with_loads_alone() -> None:
    with observe() as seen:
        known_bad_kernels.count_kernel[(4,)](torch.zeros(1), ATOMIC=True)
        assert not seen.races
        known_bad_kernels.atomic_and_plain_kernel[(2,)](torch.zeros(1), torch.zeros(1))
    (race,) = seen.races
    assert "atomic at" in race and "load at" in race


def test_programs_do_not_race_across_launches() -> None:
    x = torch.ones(1)
    with observe() as seen:
        for _ in range(3):
            known_bad_kernels.count_kernel[(1,)](x, ATOMIC=False)
    assert not seen.races and x.item() == 4.0


def test_shuffled_programs_all_run_in_another_order() -> None:
    x, y, last = torch.arange(1000.0), torch.zeros(1000), torch.zeros(1)
    winners = set()
    for shuffle in range(5):
        with observe(shuffle) as seen:
            known_bad_kernels.copy(x, y.zero_(), block=16)
            assert torch.equal(x, y) and not seen.faults()
            known_bad_kernels.last_one_kernel[(4, 3, 5)](last.zero_())
        winners.add(last.item())
    assert len(winners) > 1
    repeated = []
    for _ in range(2):
        with observe(shuffle=7):
            known_bad_kernels.last_one_kernel[(40,)](last)
        repeated.append(last.item())
    assert repeated[0] == repeated[1]


def test_masked_load_without_other_is_reported() -> None:
    x, y = torch.ones(8), torch.zeros(8)
    with observe() as seen:
        known_bad_kernels.no_other_kernel[(1,)](x, y, 8, BLOCK=8)  # no lane is masked off
        assert not seen.unmasked
        known_bad_kernels.no_other_kernel[(2,)](x, y, 5, BLOCK=8)
    (note,) = seen.unmasked
    assert note.startswith(
        "no_other_kernel: masked load without other= at harness/known_bad_kernels.py:"
    )
    assert note in seen.faults()


def test_launch_outside_the_device_context_is_reported() -> None:
    x, y = torch.ones(8), torch.zeros(8)
    with observe() as seen:
        known_bad_kernels.copy(x, y)
        known_bad_kernels.copy_without_device(x, y)
    assert [launch.inside_device_context for launch in seen.launches] == [True, False]
    assert seen.faults() == ["_copy_kernel: launched outside `on_device`"]


def test_too_large_grids_are_reported() -> None:
    with observe() as seen:
        known_bad_kernels.idle_kernel[(1, 65535)]()
        known_bad_kernels.idle_kernel[(1, 1, 65536)]()
    assert [launch.grid_fits for launch in seen.launches] == [True, False]
    assert any("(1, 1, 65536) exceeds" in fault for fault in seen.faults())
    assert Launch("k", True, GRID_LIMITS).grid_fits
    assert not Launch("k", True, (2**31, 1, 1)).grid_fits


def test_observers_nest_and_remove_their_hooks() -> None:
    def hooked() -> list[object]:
        names = ("create_masked_load", "create_masked_store", "set_grid_dim", "set_grid_idx")
        methods = [getattr(InterpreterBuilder, name) for name in names]
        return [*methods, GridExecutor.__call__, _launch.on_device, known_bad_kernels.on_device]

    before = hooked()
    with observe() as outer, pytest.raises(RuntimeError, match="stop"), observe(3) as inner:
        known_bad_kernels.copy(torch.ones(8), torch.zeros(8))
        raise RuntimeError("stop")
    assert outer == inner and len(inner.launches) == 1
    assert hooked() == before


# --- virtual memory ------------------------------------------------------------------------------


def _wide_rows() -> Tensor:
    """Row 2 wraps to a negative offset, and row 4 to a small one."""
    return wide_strides((5, 100), torch.float16, 2**30 + 16)


def _copy_wide_rows(wide: bool) -> None:
    before = _most_megabytes()
    x = _wide_rows()
    x.copy_(torch.arange(1, 6)[:, None])
    y = known_bad_kernels.copy_rows(x, wide)
    assert torch.equal(x, y), y[:, 0].tolist()
    print(f"{_most_megabytes() - before:.0f} MB")


def _most_megabytes() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def test_offsets_of_32_bits_are_caught() -> None:
    try:
        _wide_rows()
    except VirtualMemoryRefused as refused:
        pytest.skip(str(refused))
    sound, overflow = run_cases(_copy_wide_rows, [True, False], timeout=30)
    assert sound.ok, sound
    assert float(sound.output.split()[0]) < 200  # MB, of strides that reach over gigabytes
    assert (overflow.status, overflow.detail) == ("crashed", "SIGSEGV"), overflow


def test_wide_strides_must_be_wide() -> None:
    with pytest.raises(ValueError, match=r"at 2\*\*31 or beyond"):
        wide_strides((3, 4), torch.float32, 2**30 - 1)


# --- workers -------------------------------------------------------------------------------------


def _misbehave(case: str) -> None:
    print(f"<{case}>")
    if case == "raise":
        raise ValueError("what went wrong")
    if case == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if case == "exit":
        os._exit(0)
    if case == "backward":  # OpenMP and autograd after a fork
        x = torch.randn(300, 300, requires_grad=True)
        (x @ x).relu().sum().backward()


def test_outcomes_of_workers() -> None:
    cases = ["fine", "raise", "kill", "backward", "exit", "fine", "raise"]
    torch.set_num_threads(2)
    try:  # leave threads about that a fork does not take along
        x = torch.randn(1000, 1000, requires_grad=True)
        (x @ x).sum().backward()
        outcomes = run_cases(_misbehave, iter(cases), timeout=30)
    finally:
        torch.set_num_threads(1)
    assert [outcome.case for outcome in outcomes] == cases
    status = ["passed", "failed", "crashed", "passed", "crashed", "passed", "failed"]
    assert [outcome.status for outcome in outcomes] == status
    assert outcomes[1].detail.endswith("ValueError: what went wrong\n")
    assert outcomes[2].detail == "SIGKILL"
    assert outcomes[4].detail == "the process exited with status 0"
    assert "what went wrong" in str(outcomes[1])
    for outcome in outcomes:  # each has its own output, what preceded a kill perhaps lost
        assert outcome.output in (
            f"<{outcome.case}>\n",
            "" if outcome.status == "crashed" else None,
        )
    assert run_cases(_misbehave, []) == []


def _wait_for_ever(case: str) -> None:
    if case == "endless":
        known_bad_kernels.endless_kernel[(1,)](torch.zeros(1))


def test_case_without_end_times_out() -> None:
    started = time.monotonic()
    before, endless, after = run_cases(_wait_for_ever, ["before", "endless", "after"], timeout=1)
    assert before.ok and after.ok
    assert (endless.status, endless.detail) == ("timed out", "after 1 s")
    assert "endless_kernel" in endless.output  # where it hung
    assert time.monotonic() - started < 10


def test_workers_leave_no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    forked: list[int] = []

    def fork() -> int:
        forked.append(pid := os.fork())
        return pid

    monkeypatch.setattr(workers, "fork", fork)
    run_cases(_misbehave, ["fine", "kill", "fine"])
    assert len(forked) == 2
    for pid in forked:
        with pytest.raises(ChildProcessError):
            os.waitpid(pid, os.WNOHANG)
