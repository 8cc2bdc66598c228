// Schemas of the extension's ops, and the module entry. Implementations are registered in the file
// of their device.
#include <string>

#include <pybind11/pybind11.h>
#include <torch/csrc/stable/library.h>
#include <torch/headeronly/version.h>

#ifdef COGVX_CUDA_ARCHS
#include <cuda.h>
#endif

STABLE_TORCH_LIBRARY(cogvx, m) {
  m.def(
      "frame_cache_append(Tensor(a!) cache, Tensor frames, str? start=None, SymInt padding=0, "
      "bool channels_last=False) -> Tensor");
  m.def("frame_cache_push(Tensor(a!) cache, Tensor frames, str? start=None) -> ()");
}

namespace {

namespace py = pybind11;

#define COGVX_TEXT_OF(...) #__VA_ARGS__
#define COGVX_TEXT(...) COGVX_TEXT_OF(__VA_ARGS__)

std::string compiler() {
#if defined(__clang__)
  return "clang " __clang_version__;
#elif defined(__GNUC__)
  return "gcc " __VERSION__;
#else
  return "unknown";
#endif
}

// How this object was built, for `doctor` and bug reports.
py::dict build_info() {
  constexpr int kAbiMajor = static_cast<int>(TORCH_FEATURE_VERSION >> 56);
  constexpr int kAbiMinor = static_cast<int>(TORCH_FEATURE_VERSION >> 48 & 0xff);
  py::dict info;
  info["torch"] = TORCH_VERSION;
  info["stable_abi"] = std::to_string(kAbiMajor) + "." + std::to_string(kAbiMinor);
  info["compiler"] = compiler();
#ifdef COGVX_CUDA_ARCHS
  info["cuda"] = true;
  info["cuda_version"] =
      std::to_string(CUDA_VERSION / 1000) + "." + std::to_string(CUDA_VERSION % 1000 / 10);
  info["cuda_archs"] = py::str(COGVX_TEXT(COGVX_CUDA_ARCHS)).attr("split")(",");
#else
  info["cuda"] = false;
  info["cuda_version"] = py::none();
  info["cuda_archs"] = py::list();
#endif
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "C++ and CUDA ops of cogvx_kernels, registered in torch.ops.cogvx.";
#ifdef COGVX_CUDA_ARCHS
  m.attr("HAS_CUDA") = true;
#else
  m.attr("HAS_CUDA") = false;
#endif
  m.def("build_info", &build_info,
        "How this object was built: torch's headers, the stable ABI it targets, compiler, CUDA.");
}
