// The frame cache's way on CUDA. The first half knows the struct and the stream and no torch; the
// second half, at the foot of the file, knows torch.
#include "frame_cache.h"

#include <algorithm>

#include <cuda_runtime.h>

namespace cogvx {
namespace {

constexpr int kThreads = 256;
constexpr int kInFlight = 4;           // frames that a thread has under way at once
constexpr int64_t kMaxBlocks = 65536;  // beyond, the grid strides

// A thread owns a column of units (an element, or as many neighbouring ones as alignment allows)
// and carries it through time, a few frames at a time: all of them are read before the first is
// written, so loads overlap, and a cached frame is read before it is overwritten.
template <typename Unit>
__global__ void __launch_bounds__(kThreads)
    frame_cache_append_kernel(const __grid_constant__ FrameCacheAppend append,
                              const int64_t columns) {
  const int64_t total = append.kept + append.arriving;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads;
  int64_t column = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  for (; column < columns; column += stride) {
    int64_t cache_offset = 0, frames_offset = 0, joined_offset = 0;
    int64_t rest = column;
#pragma unroll
    for (int dim = kColumnDims - 1; dim >= 0; --dim) {
      if (append.sizes[dim] == 1) continue;  // the same for all threads: merged away
      const int64_t index = dim == 0 ? rest : rest % append.sizes[dim];
      rest /= append.sizes[dim];
      cache_offset += index * append.cache.strides[dim];
      frames_offset += index * append.frames.strides[dim];
      joined_offset += index * append.joined.strides[dim];
    }
    Unit* const cache = reinterpret_cast<Unit*>(append.cache.data) + cache_offset;
    const Unit* const frames = reinterpret_cast<const Unit*>(append.frames.data) + frames_offset;
    Unit* const joined = reinterpret_cast<Unit*>(append.joined.data) + joined_offset;

    for (int64_t first = 0; first < total; first += kInFlight) {
      Unit values[kInFlight];
#pragma unroll
      for (int i = 0; i < kInFlight; ++i) {
        const int64_t t = first + i;
        if (t < append.kept) {
          values[i] = cache[t * append.cache.frame_stride];
        } else if (t < total) {
          values[i] = frames[(t - append.kept) * append.frames.frame_stride];
        }
      }
#pragma unroll
      for (int i = 0; i < kInFlight; ++i) {
        const int64_t t = first + i;
        if (t >= total) break;
        joined[t * append.joined.frame_stride] = values[i];
        if (t >= append.arriving) {
          cache[(t - append.arriving) * append.cache.frame_stride] = values[i];
        }
      }
    }
  }
}

// The widest unit, in bytes, that every access of the append can be made of: one that divides the
// run of neighbouring elements, every other stride, and every address. Elements that are not
// neighbours in all three tensors are moved one by one. 0 when even those are not aligned.
int64_t unit_size(const FrameCacheAppend& append) {
  constexpr int kInner = kColumnDims - 1;
  const uint64_t element = append.element_size;
  uint64_t bits = append.sizes[kInner] * element;
  uint64_t unit = 16;
  for (const FrameView* view : {&append.cache, &append.frames, &append.joined}) {
    if (view->strides[kInner] != 1) unit = element;
    bits |= reinterpret_cast<uint64_t>(view->data) | view->frame_stride * element;
    for (int dim = 0; dim < kInner; ++dim) {
      if (append.sizes[dim] != 1) bits |= view->strides[dim] * element;
    }
  }
  while (unit > element && bits % unit != 0) unit /= 2;
  return bits % unit == 0 ? static_cast<int64_t>(unit) : 0;
}

// The same append, counted in units in place of elements.
FrameCacheAppend in_units(FrameCacheAppend append, int64_t unit) {
  constexpr int kInner = kColumnDims - 1;
  const int64_t elements = unit / append.element_size;
  append.sizes[kInner] /= elements;
  append.element_size = unit;
  for (FrameView* view : {&append.cache, &append.frames, &append.joined}) {
    view->frame_stride /= elements;
    for (int dim = 0; dim < kInner; ++dim) view->strides[dim] /= elements;
  }
  return append;
}

template <typename Unit>
void launch(const FrameCacheAppend& append, cudaStream_t stream) {
  const int64_t columns = append.columns();
  const int64_t blocks = std::min((columns + kThreads - 1) / kThreads, kMaxBlocks);
  frame_cache_append_kernel<Unit>
      <<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(append, columns);
}

cudaError_t launch(const FrameCacheAppend& elements, cudaStream_t stream) {
  const int64_t unit = unit_size(elements);
  if (unit == 0) return cudaErrorMisalignedAddress;
  const FrameCacheAppend append = in_units(elements, unit);
  switch (append.element_size) {
    case 1: launch<uint8_t>(append, stream); break;
    case 2: launch<uint16_t>(append, stream); break;
    case 4: launch<uint32_t>(append, stream); break;
    case 8: launch<uint2>(append, stream); break;
    case 16: launch<uint4>(append, stream); break;
    default: return cudaErrorInvalidValue;
  }
  return cudaGetLastError();
}

}  // namespace
}  // namespace cogvx

// ---- from here on, torch ------------------------------------------------------------------------

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

namespace cogvx {
namespace {

using torch::stable::Tensor;

// Since 2.13 torch hands the stream out of a library that its CPU build has too. Before, only the
// library of its CUDA build could say; setup.py then compiles this file where that one is.
cudaStream_t current_stream(int32_t device) {
  void* stream = nullptr;
#if TORCH_FEATURE_VERSION >= 0x020D000000000000
  stream = torch::stable::accelerator::getCurrentStream(device).nativeHandle();
#else
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
#endif
  return static_cast<cudaStream_t>(stream);
}

void run_on_cuda(const FrameCacheAppend& append, int32_t device) {
  const cudaError_t status = launch(append, current_stream(device));
  STD_TORCH_CHECK(status == cudaSuccess,
                  "frame_cache_append: the kernel must launch on cuda:", device, "; got ",
                  cudaGetErrorName(status), ", ", cudaGetErrorString(status));
}

Tensor frame_cache_append_cuda(Tensor cache, const Tensor& frames) {
  // Either may be elsewhere; the door refuses that.
  const Tensor& on_device = cache.is_cuda() ? cache : frames;
  const torch::stable::accelerator::DeviceGuard guard(on_device.get_device_index());
  return frame_cache_append(cache, frames, run_on_cuda);
}

}  // namespace
}  // namespace cogvx

STABLE_TORCH_LIBRARY_IMPL(cogvx, CUDA, m) {
  m.impl("frame_cache_append", TORCH_BOX(&cogvx::frame_cache_append_cuda));
}
