"""cogvx_kernels._C: its build, and its ops as in torch.ops.cogvx, bit for bit against torch.cat.

The Python functions are tested in tests/kernels/test_frame_cache.py. Skipped only if the extension
was not built (no C++ compiler); one that is built and does not load is a failure.
"""

import ctypes
import importlib
import importlib.util
import math
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch import Tensor

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("cogvx_kernels._C") is None,
    reason="cogvx_kernels._C is not built: pip install -v --no-build-isolation -e . prints why",
)

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
DTYPES = [
    torch.bool,
    torch.uint8,
    torch.int8,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.float8_e8m0fnu,
    torch.float4_e2m1fn_x2,
    torch.int16,
    torch.uint16,
    torch.float16,
    torch.bfloat16,
    torch.int32,
    torch.uint32,
    torch.float32,
    torch.int64,
    torch.uint64,
    torch.float64,
    torch.complex32,
    torch.complex64,
    torch.complex128,
]
# purpose: (batch, channels, kept, frames, height, width)
SHAPES = {
    "one element": (1, 1, 1, 1, 1, 1),
    "first chunk": (1, 8, 2, 9, 6, 10),
    "chunk of the length of the cache": (2, 3, 2, 2, 5, 7),
    "chunk shorter than the cache": (2, 3, 2, 1, 5, 7),
    "chunk much shorter than the cache": (1, 2, 7, 3, 3, 5),
    "more frames than are copied at once": (1, 2, 5, 13, 3, 5),
    "no frames": (2, 3, 2, 0, 5, 7),
    "no cache": (2, 3, 0, 4, 5, 7),
    "no cache, no frames": (2, 3, 0, 0, 5, 7),
    "batch of 0": (0, 3, 2, 4, 5, 7),
    "no channels": (2, 0, 2, 4, 5, 7),
    "no rows": (2, 3, 2, 4, 0, 7),
    "runs that 16 bytes divide": (1, 4, 2, 3, 8, 16),
    "odd rows and columns": (1, 3, 2, 3, 211, 223),
}


@pytest.fixture(scope="module")
def extension():
    return importlib.import_module("cogvx_kernels._C")


@pytest.fixture
def append(extension, request):
    """The op; a test on CUDA is skipped without a device or a CUDA build."""
    if request.node.get_closest_marker("gpu"):
        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA device")
        if not extension.build_info()["cuda"]:
            pytest.skip("cogvx_kernels._C was built without CUDA: no nvcc then")
    return torch.ops.cogvx.frame_cache_append


def random_bits(shape: tuple[int, ...], dtype: torch.dtype, device: str, seed: int = 0) -> Tensor:
    """Every bit pattern, NaNs with payloads among them."""
    size = math.prod(shape) * torch.empty((), dtype=dtype).element_size()
    high = 2 if dtype == torch.bool else 256
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(0, high, (size,), generator=generator, dtype=torch.uint8)
    return values.view(dtype).view(shape).to(device)


def bits(tensor: Tensor) -> Tensor:
    return tensor.clone(memory_format=torch.contiguous_format).view(torch.uint8)


def assert_appends(append, cache: Tensor, frames: Tensor) -> None:
    """The result and the next cache equal the reference, and nothing else is written."""
    kept = cache.shape[2]
    wanted = torch.cat([bits(cache), bits(frames)], dim=2)
    frames_before = bits(frames)
    joined = append(cache, frames)
    assert joined.is_contiguous()
    assert joined.dtype == cache.dtype and joined.device == cache.device
    assert torch.equal(bits(joined), wanted)
    assert torch.equal(bits(cache), wanted[:, :, wanted.shape[2] - kept :])
    assert torch.equal(bits(frames), frames_before)


# ---- build ---------------------------------------------------------------------------------------


def test_build_info(extension):
    info = extension.build_info()
    assert set(info) == {"torch", "stable_abi", "compiler", "cuda", "cuda_version", "cuda_archs"}
    assert re.fullmatch(r"2\.\d+\.\d+.*", info["torch"])
    assert info["stable_abi"] in ("2.10", "2.13")
    assert info["compiler"].startswith(("gcc ", "clang "))
    assert extension.HAS_CUDA is info["cuda"]
    if info["cuda"]:
        assert re.fullmatch(r"\d+\.\d", info["cuda_version"])
        assert all(re.fullmatch(r"\d+\.\d[af]?(\+PTX)?", arch) for arch in info["cuda_archs"])
    else:
        assert info["cuda_version"] is None and info["cuda_archs"] == []


def test_loads_on_a_torch_without_cuda(extension):
    """All undefined symbols are in torch's CPU library; CUDA is linked statically."""
    if shutil.which("nm") is None:
        pytest.skip("needs nm")
    info = extension.build_info()
    command = ["nm", "-D", "--undefined-only", extension.__file__]
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    symbols = {line.split()[-1].split("@")[0] for line in listing.splitlines()}
    assert not {name for name in symbols if re.match(r"cu[A-Z]|cuda|__cuda", name)}
    if info["cuda"] and info["stable_abi"] == "2.10":
        symbols.discard("aoti_torch_get_current_cuda_stream")  # only a CUDA build of torch has it
    wanted = {name for name in symbols if "torch" in name or "c10" in name}
    assert wanted
    lib = Path(torch.__file__).parent / "lib"
    cpu = ctypes.CDLL(str(next(lib.glob("libtorch_cpu.*"))))
    assert {name for name in wanted if not hasattr(cpu, name)} == set()


def test_cuda_code_for_each_architecture_without_spills(extension):
    info = extension.build_info()
    if not info["cuda"]:
        pytest.skip("cogvx_kernels._C was built without CUDA")
    triton = importlib.util.find_spec("triton")
    bundled = Path(triton.origin).parent / "backends/nvidia/bin" if triton else Path()
    cuobjdump = shutil.which("cuobjdump") or shutil.which("cuobjdump", path=str(bundled))
    if cuobjdump is None:
        pytest.skip("needs cuobjdump, from the CUDA toolkit or from Triton")

    def dump(*options: str) -> str:
        command = [cuobjdump, *options, extension.__file__]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    held = dump("--list-elf", "--list-ptx")
    for arch in info["cuda_archs"]:
        number = arch.removesuffix("+PTX").replace(".", "")
        assert f"sm_{number}.cubin" in held
        assert (f"sm_{number}.ptx" in held) == arch.endswith("+PTX")

    usage = re.findall(r"Function \S*frame_cache_append\S*:\s+(.+)", dump("--dump-resource-usage"))
    assert len(usage) == 5 * len(info["cuda_archs"])  # units of 1, 2, 4, 8 and 16 bytes
    for line in usage:
        assert "STACK:0 " in line and "LOCAL:0 " in line, line
        assert int(re.search(r"REG:(\d+)", line)[1]) <= 64, line


# ---- values --------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", SHAPES)
def test_equals_cat_for_every_shape(append, case, device):
    batch, channels, kept, arriving, height, width = SHAPES[case]
    cache = random_bits((batch, channels, kept, height, width), torch.bfloat16, device)
    frames = random_bits((batch, channels, arriving, height, width), torch.bfloat16, device, 1)
    assert_appends(append, cache, frames)


@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("width", [7, 16])
def test_equals_cat_for_every_dtype(append, dtype, width, device):
    cache = random_bits((2, 3, 2, 5, width), dtype, device)
    for arriving in (1, 4):
        assert_appends(append, cache, random_bits((2, 3, arriving, 5, width), dtype, device, 1))


@pytest.mark.parametrize("device", DEVICES)
def test_chunks_equal_the_whole(append, device):
    """A clip appended in chunks: each joined result is a window of the clip."""
    clip = random_bits((1, 4, 15, 6, 8), torch.float16, device)
    cache = clip[:, :, :2].clone()
    begin = 2
    for length in (1, 4, 0, 1, 1, 6):
        joined = append(cache, clip[:, :, begin : begin + length])
        assert torch.equal(bits(joined), bits(clip[:, :, begin - 2 : begin + length]))
        begin += length
    assert begin == 15 and torch.equal(bits(cache), bits(clip[:, :, 13:]))


def layouts(frames: Tensor) -> dict[str, Tensor]:
    """`frames` in other memory; expanded layouts repeat some of its values."""
    batch, channels, arriving, height, width = frames.shape
    padded = torch.zeros(batch, channels, arriving, height, width + 3).to(frames)
    padded[..., 2:-1] = frames
    doubled = torch.zeros(batch, 2 * channels, arriving, 2 * height, width).to(frames)
    doubled[:, ::2, :, 1::2] = frames
    return {
        "channels_last_3d": frames.to(memory_format=torch.channels_last_3d),
        "frames outermost": frames.permute(2, 0, 1, 3, 4).contiguous().permute(1, 2, 0, 3, 4),
        "transposed": frames.mT.contiguous().mT,
        "sliced columns": padded[..., 2:-1],
        "every other channel and row": doubled[:, ::2, :, 1::2],
        "one frame, expanded": frames[:, :, :1].expand(-1, -1, arriving, -1, -1),
        "one pixel, expanded": frames[..., :1, :1].expand(-1, -1, -1, height, width),
        "one channel, expanded": frames[:, :1].expand(-1, channels, -1, -1, -1),
        "one element, expanded": frames[:1, :1, :1, :1, :1].expand(frames.shape),
        "off by one element": torch.cat([frames.new_zeros(1), frames.flatten()])[1:].view_as(
            frames
        ),
    }


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float16, torch.float32, torch.complex128])
@pytest.mark.parametrize("layout", layouts(torch.zeros(1, 1, 1, 1, 1)))
def test_frames_of_any_strides(append, layout, dtype, device):
    frames = random_bits((2, 4, 3, 6, 16), torch.uint8, device).to(dtype)
    cache = random_bits((2, 4, 2, 6, 16), torch.uint8, device, 1).to(dtype)
    assert_appends(append, cache, layouts(frames)[layout])


@pytest.mark.parametrize("device", DEVICES)
def test_only_a_strided_cache_is_written(append, device):
    frames = random_bits((2, 4, 3, 6, 8), torch.float16, device)
    held = torch.full((2, 4, 5, 6, 12), 7.0, dtype=torch.float16, device=device)
    cache = held[:, :, 1:3, :, 2:10]
    assert_appends(append, cache, frames)
    cache.fill_(7.0)
    assert torch.equal(held, torch.full_like(held, 7.0))

    channels_last = cache.to(memory_format=torch.channels_last_3d)
    assert_appends(append, channels_last, frames)


def test_offsets_are_int64(append):
    """Frames 2^31 elements apart, in memory that is reserved but mostly not used."""
    held = torch.empty(2**31 + 64, dtype=torch.int8)
    frames = held.as_strided((1, 1, 2, 4, 8), (1, 1, 2**31, 8, 1))
    frames.copy_(random_bits((1, 1, 2, 4, 8), torch.int8, "cpu"))
    assert_appends(append, torch.zeros(1, 1, 2, 4, 8, dtype=torch.int8), frames)


def test_a_conjugate_view_is_resolved(append):
    cache = torch.randn(1, 2, 2, 3, 4, dtype=torch.complex64)
    frames = torch.randn(1, 2, 3, 3, 4, dtype=torch.complex64).conj()
    assert_appends(append, cache, frames.resolve_conj())
    assert torch.equal(append(cache, frames)[:, :, 2:], frames)


# ---- refusals ------------------------------------------------------------------------------------

REFUSALS = {
    "cache of 4 dimensions": (
        lambda cache, frames: (cache[0], frames),
        r"cache must have 5 dimensions \(batch, channels, kept, height, width\); "
        r"got shape \(3, 2, 4, 5\)",
    ),
    "frames of 1 dimension": (
        lambda cache, frames: (cache, frames.flatten()),
        r"frames must have 5 dimensions \(batch, channels, frames, height, width\); "
        r"got shape \(120,\)",
    ),
    "another width": (
        lambda cache, frames: (cache, frames[..., 1:]),
        r"frames must agree with cache \(2, 3, 2, 4, 5\) in every dimension but the third; "
        r"got \(2, 3, 1, 4, 4\)",
    ),
    "another batch": (
        lambda cache, frames: (cache[:1], frames),
        r"frames must agree with cache \(1, 3, 2, 4, 5\).*got \(2, 3, 1, 4, 5\)",
    ),
    "another dtype": (
        lambda cache, frames: (cache, frames.half()),
        r"frames must have the dtype of cache, Float; got Half",
    ),
    "an expanded cache": (
        lambda cache, frames: (cache[:, :, :1].expand(-1, -1, 2, -1, -1), frames),
        r"cache is written to and must have its elements apart in memory; "
        r"got shape \(2, 3, 2, 4, 5\) with strides \(120, 40, 0, 5, 1\)",
    ),
    "a cache that overlaps itself": (
        lambda cache, frames: (cache.flatten().as_strided(cache.shape, (20, 5, 4, 3, 1)), frames),
        r"cache is written to and must have its elements apart",
    ),
    "no cache": (lambda cache, frames: (None, frames), r"cache must be a tensor; got None"),
    "None for frames": (lambda cache, frames: (cache, None), r"frames must be a tensor; got None"),
    "no frames": (lambda cache, frames: (cache,), r"missing value for argument 'frames'"),
    "another start": (
        lambda cache, frames: (cache, frames, "ones"),
        'start must be None, "replicate" or "zeros"; got "ones"',
    ),
    "copies of no frame": (
        lambda cache, frames: (cache, frames[:, :, :0], "replicate"),
        'start="replicate" must have a first frame to replicate; got no frames',
    ),
    "a negative border": (
        lambda cache, frames: (cache, frames, None, -1),
        "padding must be at least 0; got -1",
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_errors_name_argument_wanted_and_got(append, case):
    change, words = REFUSALS[case]
    cache, frames = torch.randn(2, 3, 2, 4, 5), torch.randn(2, 3, 1, 4, 5)
    cache_before = cache.clone()
    with pytest.raises(RuntimeError, match="frame_cache_append") as refusal:
        append(*change(cache, frames))
    assert re.search(words, str(refusal.value)), refusal.value
    assert torch.equal(cache, cache_before)


@pytest.mark.gpu
@pytest.mark.parametrize(("cache_on", "frames_on"), [("cpu", "cuda:0"), ("cuda:0", "cpu")])
def test_refuses_two_devices(append, cache_on, frames_on):
    cache = torch.zeros(1, 1, 2, 2, 2, device=cache_on)
    frames = torch.zeros(1, 1, 1, 2, 2, device=frames_on)
    words = f"frames must be on the device of cache, {cache_on}; got {frames_on}"
    with pytest.raises(RuntimeError, match=words):
        append(cache, frames)


def test_errors_of_the_other_ops_name_the_op(append):
    ops = torch.ops.cogvx
    cache, frames = torch.randn(2, 3, 2, 4, 5), torch.randn(2, 3, 1, 4, 5)
    cache_before = cache.clone()
    for op, arguments, words in (
        (ops.frame_cache_push, (cache, frames[..., 1:]), "frames must agree with cache"),
        (ops.frame_cache_push, (cache, frames, "ones"), "start must be None"),
        (ops.frame_cache_push, (cache[:, :, :1].expand(-1, -1, 2, -1, -1), frames), "cache is"),
        (ops.frame_cache_push, (cache, frames.half()), "frames must have the dtype of cache"),
    ):
        name = str(op).removeprefix("cogvx.")
        with pytest.raises(RuntimeError, match=rf"{name}: .*{words}"):
            op(*arguments)
    assert torch.equal(cache, cache_before)


def test_schemas_declare_mutations(append):
    """opcheck: mutated arguments are declared, and no view is returned."""
    ops = torch.ops.cogvx
    cache = torch.randn(1, 2, 2, 3, 4)
    for frames in (torch.randn(1, 2, 3, 3, 4), torch.randn(1, 2, 3, 3, 4).mT.contiguous().mT):
        for op in (append, ops.frame_cache_push):
            torch.library.opcheck(op, (cache, frames), test_utils=("test_schema",))


# ---- on a GPU only -------------------------------------------------------------------------------


@pytest.mark.gpu
def test_runs_on_the_current_stream(append):
    """Frames arrive on a side stream after a long wait; an op on another stream would be early."""
    cache = torch.zeros(1, 4, 2, 64, 64, device="cuda")
    frames = torch.zeros(1, 4, 3, 64, 64, device="cuda")
    late = torch.rand_like(frames)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)
        frames.copy_(late)
        joined = append(cache, frames)
    side.synchronize()
    assert torch.equal(joined[:, :, 2:], late) and torch.equal(cache, late[:, :, 1:])


@pytest.mark.gpu
def test_is_captured_in_a_graph(append):
    cache = torch.rand(1, 4, 2, 16, 16, device="cuda")
    frames = torch.rand(1, 4, 1, 16, 16, device="cuda")
    append(cache.clone(), frames)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        joined = append(cache, frames)
    for _ in range(3):
        frames.uniform_()
        wanted = torch.cat([cache, frames], dim=2)
        graph.replay()
        assert torch.equal(joined, wanted) and torch.equal(cache, wanted[:, :, 1:])


@pytest.mark.gpu
def test_runs_on_the_device_of_its_arguments(append):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    cache = random_bits((1, 4, 2, 16, 16), torch.float16, "cuda:1")
    frames = random_bits((1, 4, 3, 16, 16), torch.float16, "cuda:1", 1)
    with torch.cuda.device(0):
        assert_appends(append, cache, frames)
        assert torch.cuda.current_device() == 0


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("width", [2**15, 2**15 - 1], ids=["16-byte units", "single elements"])
def test_more_than_2_to_the_31_elements(append, width):
    free, _ = torch.cuda.mem_get_info()
    if free < 16 * 2**30:
        pytest.skip("needs 16 GiB of free GPU memory")
    shape = (1, 2, 1, 2**15, width)  # joined about 2^32 elements, 2^31 from channel to channel
    cache = torch.randint(-128, 128, shape, dtype=torch.int8, device="cuda")
    frames = torch.randint(-128, 128, shape, dtype=torch.int8, device="cuda")
    cache_before = cache.clone()
    joined = append(cache, frames)
    assert torch.equal(joined[:, :, :1], cache_before)
    assert torch.equal(joined[:, :, 1:], frames)
    assert torch.equal(cache, frames)
