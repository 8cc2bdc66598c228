"""Builds cogvx_kernels._C from csrc/: C++ always, CUDA with nvcc. The rest is in pyproject.toml.

COGVX_CUDA=1 requires the CUDA half, COGVX_CUDA=0 disables it; TORCH_CUDA_ARCH_LIST selects its
architectures. Nothing is downloaded, and no GPU is needed. There is no _C without a compiler, or
from an isolated build (`pip install .`), which has no torch to build against.
"""

import os
import re
import shutil
import subprocess
from pathlib import Path

from setuptools import setup
from setuptools.command.build_ext import build_ext

try:
    import torch
except ImportError:
    torch = None

if torch is not None:
    try:
        import pybind11
        from torch.utils import cpp_extension
    except ImportError as error:
        raise SystemExit(
            f"cogvx is built against the torch that will run it, but here: {error}. Install "
            "setuptools, wheel, pybind11 and ninja, then: pip install --no-build-isolation ."
        ) from error

ROOT = Path(__file__).resolve().parent
REQUESTED = os.environ.get("COGVX_CUDA", "")
TORCH = tuple(int(number) for number in re.findall(r"\d+", torch.__version__)[:2]) if torch else ()


def find_cuda() -> tuple[str, str]:
    """(output of nvcc with its folders, ""), or ("", reason why there is no CUDA half)."""
    if REQUESTED == "0":
        return "", "COGVX_CUDA=0 disables it"
    if torch is None:
        return "", "no torch to build against; --no-build-isolation takes the one that is installed"
    if torch.version.hip or (torch.version.cuda is None and TORCH < (2, 13)):
        return "", f"torch {torch.__version__} has no CUDA; use a CUDA build, or torch >= 2.13"
    places = [f"{os.environ[n]}/bin" for n in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(n)]
    nvcc = shutil.which("nvcc", path=os.pathsep.join([*places, os.environ.get("PATH", "")]))
    if nvcc is None:
        looked = ", ".join(places) or "CUDA_HOME, CUDA_PATH (not set)"
        return "", f"no nvcc in {looked} or on PATH; install the CUDA toolkit or set CUDA_HOME"
    output = subprocess.run([nvcc, "--dryrun", "_.cu"], capture_output=True, text=True).stderr
    if "_HERE_=" not in output:
        return "", f"{nvcc} does not work: {output.strip()}"
    return output, ""


def extension(cuda: str):
    """_C on torch's stable ABI, for the oldest torch with the symbols that it uses."""
    sources = ["csrc/ops.cpp", "csrc/frame_cache.cpp", "csrc/frame_cache_cpu.cpp"]
    ext = cpp_extension.CppExtension("cogvx_kernels._C", sources)
    ext.include_dirs.insert(0, pybind11.get_include())
    host = f"-fvisibility=hidden,-ffile-prefix-map={ROOT}/="
    ext.extra_compile_args = {"cxx": ["-O3", "-g0", *host.split(",")]}
    # 2.10, or 2.13 for CUDA: the first with the current stream outside libtorch_cuda
    target = "0x020D000000000000" if cuda and TORCH >= (2, 13) else "0x020A000000000000"
    ext.define_macros.append(("TORCH_TARGET_VERSION", target))
    if cuda:
        # torch empties CUDA_HOME in its CPU build; nvcc knows its folders, even behind a wrapper
        nvcc = Path(re.search("_HERE_=(.+)", cuda)[1], "nvcc")
        cpp_extension.CUDA_HOME = str(nvcc.parents[1])
        ext.include_dirs += re.findall('"-I([^"]+)"', re.search("INCLUDES=.*", cuda)[0])
        ext.library_dirs += re.findall('"-L([^"]+)"', re.search("LIBRARIES=.*", cuda)[0])
        ext.libraries += ["cudart_static", "dl", "pthread", "rt"]
        ext.extra_link_args = ["-Wl,--exclude-libs,ALL"]  # keeps our libcudart apart from torch's
        ext.sources.append("csrc/frame_cache_cuda.cu")
        known = subprocess.check_output([nvcc, "--list-gpu-arch"], text=True)
        archs = [a for a in ("8.0", "9.0", "10.0") if f"compute_{a.replace('.', '')}\n" in known]
        archs = os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip() or ";".join(archs) + "+PTX"
        os.environ["TORCH_CUDA_ARCH_LIST"] = archs  # where torch looks, before it would ask a GPU
        ext.extra_compile_args["cxx"].append("-DCOGVX_CUDA_ARCHS=" + re.sub("[; ]+", ",", archs))
        # ninja does not track includes of a .cu: this define changes with the header
        header = f"-DCOGVX_HEADER={os.stat(ROOT / 'csrc/frame_cache.h').st_mtime_ns}"
        ext.extra_compile_args["nvcc"] = ["-O3", "-DUSE_CUDA", header, f"-Xcompiler={host}"]
        if TORCH < (2, 13):
            ext.libraries.append("torch_cuda")
    return ext


class Build(cpp_extension.BuildExtension if torch else build_ext):
    def build_extensions(self) -> None:
        [ext] = self.extensions
        self.build_temp = f"build/torch-{torch.__version__}"  # kept between builds, for ninja
        try:
            return super().build_extensions()
        except Exception as error:  # compilers raise many types
            if REQUESTED == "1":
                raise
            print(f"cogvx: could not compile {', '.join(ext.sources)}: {error}")
        if "csrc/frame_cache_cuda.cu" in ext.sources:
            vars(ext).update(vars(extension("")))
            return self.build_extensions()
        print("cogvx: installing without cogvx_kernels._C; the plain-torch reference takes over")
        (ROOT / self.get_ext_filename(ext.name)).unlink(missing_ok=True)
        self.extensions = []


cuda, reason = find_cuda()
if reason and REQUESTED == "1":
    raise SystemExit(f"COGVX_CUDA=1 requires the CUDA half of cogvx, but {reason}.")
part = "the CUDA half of cogvx_kernels._C" if torch else "cogvx_kernels._C"
print(f"cogvx: {part} is {'left out: ' + reason if reason else 'in'}")
setup(**({"ext_modules": [extension(cuda)], "cmdclass": {"build_ext": Build}} if torch else {}))
