"""Memory instructions, shuffles and barriers of the PTX machine: results, faults, counters."""

import pytest
import torch

from cogvx_kernels.ptx.parse import Unsupported

from .snippets import at, run, site

STORE = "cvt.u32.u64 %r20, %d2;\n"


def put_shared(shift: int = 0) -> str:
    """Each thread stores its number to word (its number + shift) of shared memory."""
    return (
        "mov.u32 %r1, global_smem;\nshl.b32 %r2, %r0, 2;\nadd.s32 %r1, %r1, %r2;\n"
        f"st.shared.b32 [%r1 + {4 * shift}], %r0;\n"
    )


def get_other(distance: int, threads: int) -> str:
    """Each thread loads the word of the thread `distance` further, and stores it to %d1."""
    return (
        f"add.u32 %r3, %r0, {distance};\nrem.u32 %r3, %r3, {threads};\nshl.b32 %r3, %r3, 2;\n"
        "mov.u32 %r4, global_smem;\nadd.s32 %r3, %r3, %r4;\nld.shared.b32 %r5, [%r3];\n"
        + at("%d1", "%d9", 4)
        + "st.global.b32 [%d9], %r5;\n"
    )


def faults_of(state) -> str:
    return " | ".join(state.faults.texts)


# --- shuffles and votes ----------------------------------------------------------------------

SHUFFLES = {
    "bfly.b32 %r1, %r0, 5, 31, -1": [n ^ 5 for n in range(32)],
    "down.b32 %r1, %r0, 4, 31, -1": [*range(4, 32), 28, 29, 30, 31],
    "up.b32 %r1, %r0, 4, 0, -1": [0, 1, 2, 3, *range(28)],
    "idx.b32 %r1, %r0, 3, 31, 0xffffffff": [3] * 32,
    "idx.b32 %r1, %r0, %r7, 31, -1": [31 - n for n in range(32)],
}


@pytest.mark.parametrize("text", SHUFFLES)
def test_shuffles(text):
    """Within each of two warps."""
    out = torch.zeros(64, dtype=torch.int32)
    run(f"sub.u32 %r7, 31, %r0;\nand.b32 %r7, %r7, 31;\nshfl.sync.{text};\n" + at("%d1", "%d2", 4)
        + "st.global.b32 [%d2], %r1;", out, threads=64)  # fmt: skip
    lanes = SHUFFLES[text]
    assert out.tolist() == lanes + [32 + n for n in lanes]


def test_votes():
    out = torch.zeros(3, 64, dtype=torch.int32)
    run("""setp.eq.u32 %p1, %r0, 33;
        vote.sync.ballot.b32 %r1, %p1, -1;
        vote.sync.any.pred %p2, %p1, -1;
        vote.sync.all.pred %p3, %p1, -1;
        selp.b32 %r2, 1, 0, %p2;
        selp.b32 %r3, 1, 0, %p3;
        """ + at("%d1", "%d2", 4)
        + "st.global.b32 [%d2], %r1;\nst.global.b32 [%d2 + 256], %r2;\n"
        "st.global.b32 [%d2 + 512], %r3;", out, threads=64)  # fmt: skip
    assert out[0].tolist() == [0] * 32 + [2] * 32
    assert out[1].tolist() == [0] * 32 + [1] * 32 and not out[2].any()


@pytest.mark.parametrize("text", ["bar.sync 0;", "shfl.sync.bfly.b32 %r1, %r0, 1, 31, -1;"])
def test_what_all_threads_must_reach_is_refused_in_a_branch(text):
    with pytest.raises(Unsupported, match="not all threads"):
        run("setp.lt.u32 %p1, %r0, 7;\n@%p1 bra $L__skip;\n" + text + "\n$L__skip:")


# --- global memory ---------------------------------------------------------------------------

GLOBAL_FAULTS = {
    "ld.global.b32 %r1, [%d9 + 4];": "out of bounds: byte 128 of p0",
    "ld.global.v4.b32 {%r1, %r2, %r3, %r4}, [%d9];": "misaligned",
    "st.global.b32 [%d9 + -4], %r0;": "out of bounds: byte -4 of p0",
    "st.global.b32 [%d9 + 68719476736], %r0;": "out of bounds",
    "st.global.b16 [%d9 + 1], %h1;": "misaligned",
}


@pytest.mark.parametrize("text", GLOBAL_FAULTS)
def test_global_faults(text):
    x = torch.zeros(32, dtype=torch.int32)
    assert GLOBAL_FAULTS[text] in faults_of(run(at("%d1", "%d9", 4) + text, x))


def test_storage_between_tensors_is_out_of_bounds():
    """A view of the even rows does not own the last odd one."""
    whole = torch.zeros(8, 4, dtype=torch.int32)
    load = "setp.lt.u32 %p1, %r0, {};\n" + at("%d1", "%d9", 4) + "@%p1 ld.global.b32 %r1, [%d9];"
    assert not run(load.format(28), whole[::2]).faults.texts
    assert "out of bounds" in faults_of(run(load.format(29), whole[::2]))


def test_ctas_that_share_an_address_race():
    x = torch.zeros(64, dtype=torch.int32)
    write = at("%d1", "%d9", 4) + "st.global.b32 [%d9], %r0;"
    assert "race of CTAs, write after another's write" in faults_of(run(write, x, grid=2))
    assert not run(write, x, grid=1).faults.texts
    read = at("%d1", "%d9", 4) + "ld.global.b32 %r1, [%d9 + 4];\nmov.u32 %r2, %ctaid.x;\n"
    read += "cvt.u64.u32 %d3, %r2;\nmad.lo.u64 %d9, %d3, 128, %d9;\nst.global.b32 [%d9], %r1;"
    assert "race of CTAs" in faults_of(run(read, x, grid=2))


def test_threads_that_store_different_values_to_one_global_address():
    x = torch.zeros(1, dtype=torch.int32)
    assert "store different values" in faults_of(run("st.global.b32 [%d1], %r0;", x))
    assert not run("mov.b32 %r1, 7;\nst.global.b32 [%d1], %r1;", x).faults.texts


def test_chosen_ctas_run_alone():
    x = torch.zeros(8, dtype=torch.int32)
    text = "mov.u32 %r1, %ctaid.x;\ncvt.u64.u32 %d0, %r1;\n" + at("%d1", "%d9", 4)
    state = run(text + "add.u32 %r1, %r1, 1;\nst.global.b32 [%d9], %r1;", x, grid=8, ctas=[2, 7])
    assert x.tolist() == [0, 0, 3, 0, 0, 0, 0, 8] and state.counters.ctas == 2
    with pytest.raises(ValueError, match=r"ctas must be in \[0, 8\); got 8 to 8"):
        run(text, x, grid=8, ctas=[8])


@pytest.mark.parametrize(
    ("stride", "sectors", "least"), [(4, 4, 4), (8, 8, 4), (32, 32, 4), (0, 1, 1)]
)
def test_sectors(stride, sectors, least):
    """Sectors of 32 bytes that a warp's load of 4 bytes a thread takes."""
    x = torch.zeros(32 * max(1, stride // 4), dtype=torch.int32)
    state = run(at("%d1", "%d9", stride) + "ld.global.b32 %r1, [%d9];", x)
    count = state.counters.sites[site(state, "ld.global.b32")]
    assert (count.requests, count.units, count.least) == (1, sectors, least)


# --- shared memory ---------------------------------------------------------------------------


@pytest.mark.parametrize(("words", "wavefronts"), [(1, 1), (2, 2), (8, 8), (32, 32), (33, 1)])
def test_wavefronts(words, wavefronts):
    """A bank gives one word of 4 bytes in a wavefront."""
    text = f"mov.u32 %r1, global_smem;\nmad.lo.u32 %r1, %r0, {4 * words}, %r1;\n"
    state = run(text + "st.shared.b32 [%r1], %r0;", shared=4 * 33 * 32)
    count = state.counters.sites[site(state, "st.shared.b32")]
    assert (count.requests, count.units, count.least) == (1, wavefronts, 1)


@pytest.mark.parametrize(
    ("threads", "distance", "between", "fault"),
    [
        (64, 32, "", "read after write, no barrier between warps"),
        (64, 32, "bar.warp.sync -1;", "read after write, no barrier between warps"),
        (64, 32, "bar.sync 0;", None),
        (64, 1, "bar.sync 0;", None),
        (32, 1, "", "read after write, no barrier within a warp"),
        (32, 1, "bar.warp.sync -1;", None),
        (32, 0, "", None),
    ],
)
def test_reads_of_what_another_thread_wrote(threads, distance, between, fault):
    out = torch.zeros(threads, dtype=torch.int32)
    body = put_shared() + between + "\n" + get_other(distance, threads)
    state = run(body, out, threads=threads, shared=4 * threads)
    assert out.tolist() == [(n + distance) % threads for n in range(threads)], "in lock-step"
    assert (fault in faults_of(state)) if fault else not state.faults.texts


@pytest.mark.parametrize("barrier", [True, False])
def test_writes_of_what_another_thread_read(barrier):
    out = torch.zeros(64, dtype=torch.int32)
    body = put_shared() + "bar.sync 0;\n" + get_other(32, 64)
    other = put_shared().replace("], %r0", "], %r5")
    state = run(body + "bar.sync 0;\n" * barrier + other, out, threads=64, shared=256)
    assert ("write after read, no barrier between warps" in faults_of(state)) != barrier


def test_threads_that_store_different_values_to_one_address():
    same = "mov.u32 %r1, global_smem;\nst.shared.b32 [%r1], {};\n"
    assert "store different values" in faults_of(run(same.format("%r0"), shared=4))
    assert not run(same.format(7), shared=4).faults.texts


def test_warps_that_store_the_same_values_do_not_race():
    """A constant of which each warp stores a copy; with another value by the second warp it is."""
    first = "mov.u32 %r1, global_smem;\nshr.u32 %r2, %r0, 5;\nsetp.eq.u32 %p1, %r2, 0;\n"
    first += "@%p1 st.shared.b32 [%r1], 7;\n"
    for value, fault in ((7, False), (8, True)):
        state = run(first + f"@!%p1 st.shared.b32 [%r1], {value};", threads=64, shared=4)
        assert ("write after write, no barrier" in faults_of(state)) == fault


def test_shared_memory_ends_where_the_kernel_requested():
    assert "out of bounds: shared byte 128 of 128" in faults_of(run(put_shared(1), shared=128))
    assert not run(put_shared(0), shared=128).faults.texts


def test_shared_memory_is_poison_before_it_is_written():
    out = torch.zeros(32, dtype=torch.int32)
    run(get_other(0, 32), out, shared=128)
    assert out.tolist() == [-1] * 32


# --- copies ----------------------------------------------------------------------------------


def copy(size: int, rest: str = "", source: str = "%d1", first: int = 0) -> str:
    """Each thread copies `size` bytes of its own from global to shared memory."""
    return (
        f"mov.u32 %r10, global_smem;\nmad.lo.u32 %r11, %r0, {size}, %r10;\n"
        + at(source, "%d11", size)
        + f"cp.async.ca.shared.global [%r11 + {first}], [%d11], {size}{rest};\n"
        "cp.async.commit_group;\n"
    )


def fetch(first: int = 0, size: int = 16) -> str:
    """Each thread loads the first word of its copy, and stores it to %d2."""
    return (
        f"ld.shared.b32 %r12, [%r11 + {first}];\n"
        + at("%d2", "%d12", 4)
        + "st.global.b32 [%d12], %r12;\n"
    )


def test_copies_are_there_after_the_wait():
    x, out = torch.arange(128, dtype=torch.int32), torch.zeros(32, dtype=torch.int32)
    state = run(copy(16) + "cp.async.wait_group 0;\n" + fetch(), x, out, shared=512)
    assert out.tolist() == list(range(0, 128, 4)) and not state.faults.texts
    out.zero_()
    state = run(copy(16) + fetch() + "cp.async.wait_all;", x, out, shared=512)
    assert out.tolist() == [-1] * 32, "poison"
    assert "access to what a copy is still writing" in faults_of(state)


@pytest.mark.parametrize(("pending", "ok"), [(0, True), (1, True), (2, False)])
def test_waits_for_a_number_of_groups(pending, ok):
    """Of two groups; the first is read."""
    x, out = torch.arange(128, dtype=torch.int32), torch.zeros(32, dtype=torch.int32)
    body = copy(16) + copy(16, first=512) + f"cp.async.wait_group {pending};\n" + fetch()
    state = run(body + "cp.async.wait_all;", x, out, shared=1024)
    assert (out.tolist() == list(range(0, 128, 4))) == ok == (not state.faults.texts)


@pytest.mark.parametrize("size", [0, 4, 6, 12, 16])
def test_copies_of_a_part_fill_with_zeros(size):
    """The source's other bytes are not read, and may be out of bounds."""
    x = torch.arange(1, 257, dtype=torch.int16)
    out = torch.zeros(32, 8, dtype=torch.int16)
    body = copy(16, f", {size}") + "cp.async.wait_group 0;\n" + at("%d2", "%d12", 16)
    body += """ld.shared.v4.b32 {%r1, %r2, %r3, %r4}, [%r11];
        st.global.v4.b32 [%d12], {%r1, %r2, %r3, %r4};"""
    inside = x[: 248 + size // 2]
    state = run(body, inside if size else x[:8], out, shared=512)
    wanted = x.reshape(32, 8).clone()
    wanted[:, size // 2 :] = 0
    assert torch.equal(out, wanted) and not state.faults.texts


def test_copies_of_a_part_that_differs_by_thread():
    """Four bytes by every second thread, nothing by the others."""
    x, out = torch.arange(1, 129, dtype=torch.int32), torch.ones(32, dtype=torch.int32)
    sizes = "and.b32 %r15, %r0, 1;\nshl.b32 %r15, %r15, 2;\n"
    body = sizes + copy(16, ", %r15") + "cp.async.wait_group 0;\n" + fetch()
    state = run(body, x, out, shared=512)
    assert out.tolist() == [4 * n + 1 if n % 2 else 0 for n in range(32)]
    assert not state.faults.texts


def test_copies_that_nobody_waits_for_are_reported():
    x = torch.zeros(128, dtype=torch.int32)
    assert "in flight at the end" in faults_of(run(copy(16), x, shared=512))


def test_a_barrier_stands_between_a_copy_and_another_thread():
    x, out = torch.arange(256, dtype=torch.int32), torch.zeros(64, dtype=torch.int32)
    for barrier in (True, False):
        body = copy(4) + "cp.async.wait_group 0;\n" + "bar.sync 0;\n" * barrier
        body += "mov.b64 %d1, %d2;\n" + get_other(32, 64)
        state = run(body, x, out, threads=64, shared=256)
        assert ("read after write" in faults_of(state)) != barrier
