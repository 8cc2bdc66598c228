// The frame cache on CUDA. Kernel and launch do not use torch; the ops at the end of the file do.
#include "frame_cache.h"

#include <algorithm>

#include <cuda_runtime.h>

namespace cogvx {
namespace {

constexpr int kThreads = 256;
constexpr int kBlocks = 4;             // per multiprocessor at least: 64 KiB of loads in flight
constexpr int kInFlight = 4;           // frames that a thread loads at once
constexpr int64_t kMaxBlocks = 65536;  // beyond, a grid-stride loop

// The index of a column in each dimension, from its number.
struct Column {
  int64_t index[kColumnDims];

  __device__ Column(const int64_t (&sizes)[kColumnDims], int64_t column) {
#pragma unroll
    for (int dim = kInner; dim >= 0; --dim) {
      index[dim] = 0;
      if (sizes[dim] == 1) continue;  // uniform over threads
      index[dim] = dim == 0 ? column : column % sizes[dim];
      column /= sizes[dim];
    }
  }

  template <typename Unit>
  __device__ Unit* in(char* data, const int64_t (&strides)[kColumnDims]) const {
    int64_t offset = 0;
#pragma unroll
    for (int dim = 0; dim < kColumnDims; ++dim) offset += index[dim] * strides[dim];
    return reinterpret_cast<Unit*>(data) + offset;
  }
};

// Copies one column, a few frames at a time: all are read before the first is written, so that
// loads overlap and a cached frame is read before it is overwritten.
template <typename Unit>
__device__ void copy_column(const FrameCacheAppend& append, const Column& column, int64_t end) {
  Unit* const cache = column.in<Unit>(append.cache.data, append.cache.strides);
  const Unit* const frames = column.in<Unit>(append.frames.data, append.frames.strides);
  Unit* const joined = column.in<Unit>(append.joined.data, append.joined.strides);
  const bool cached = append.past == Past::kCache;
  const Unit* const past = cached ? cache : frames;
  const int64_t past_stride = cached ? append.cache.frame_stride : 0;  // 0 repeats a frame

  for (int64_t first = append.skipped; first < end; first += kInFlight) {
    Unit values[kInFlight];
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      const int64_t t = first + i;
      const bool before = t < append.cache_len;
      const Unit* const from = before
                                   ? past + t * past_stride
                                   : frames + (t - append.cache_len) * append.frames.frame_stride;
      values[i] = Unit{};
      if (t < end && !(before && append.past == Past::kZeros)) values[i] = *from;
    }
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      const int64_t t = first + i;
      if (t >= end) break;
      if (t < append.joined_len) joined[t * append.joined.frame_stride] = values[i];
      if (t >= append.chunk_len) {
        cache[(t - append.chunk_len) * append.cache.frame_stride] = values[i];
      }
    }
  }
}

// A thread owns a column of units (an element, or as many neighbouring ones as alignment allows),
// then columns of the borders.
template <typename Unit>
__global__ void __launch_bounds__(kThreads, kBlocks)
    frame_cache_append_kernel(const __grid_constant__ FrameCacheAppend append, const int64_t end) {
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  for (int64_t column = first; column < append.columns; column += stride) {
    copy_column<Unit>(append, Column(append.sizes, column), end);
  }
#pragma unroll
  for (int i = 0; i < kBorders; ++i) {
    const Border& border = append.borders[i];
    for (int64_t column = first; column < border.columns; column += stride) {
      Unit* const joined = Column(border.sizes, column).in<Unit>(border.data, border.strides);
#pragma unroll 4
      for (int64_t t = 0; t < append.joined_len; ++t) {
        joined[t * append.joined.frame_stride] = Unit{};
      }
    }
  }
}

// ---- units --------------------------------------------------------------------------------------

// Narrows `unit`, in bytes, until it divides the innermost run of elements, every other stride, and
// the address. Elements that are not contiguous are moved one by one. 0 if even those are not
// aligned.
int64_t narrow_unit(int64_t unit, int64_t element, const char* data,
                    const int64_t (&sizes)[kColumnDims], const int64_t (&strides)[kColumnDims],
                    int64_t frame_stride) {
  uint64_t bits = reinterpret_cast<uint64_t>(data) | frame_stride * element;
  for (int dim = 0; dim < kInner; ++dim) {
    if (sizes[dim] != 1) bits |= strides[dim] * element;
  }
  bits |= sizes[kInner] * element;
  if (strides[kInner] != 1) unit = std::min(unit, element);
  while (unit > element && bits % unit != 0) unit /= 2;
  return bits % element == 0 ? unit : 0;
}

int64_t unit_size(const FrameCacheAppend& append) {
  int64_t unit = 16;
  for (const FrameView* view : {&append.cache, &append.frames, &append.joined}) {
    if (view->data == nullptr || append.columns == 0) continue;
    unit = narrow_unit(unit, append.element_size, view->data, append.sizes, view->strides,
                       view->frame_stride);
  }
  for (const Border& border : append.borders) {
    if (border.columns == 0) continue;
    unit = narrow_unit(unit, append.element_size, border.data, border.sizes, border.strides,
                       append.joined.frame_stride);
  }
  return unit;
}

// The same append, counted in units in place of elements.
FrameCacheAppend in_units(FrameCacheAppend append, int64_t unit) {
  const int64_t elements = unit / append.element_size;
  const auto rescale = [&](int64_t (&strides)[kColumnDims]) {
    for (int dim = 0; dim < kInner; ++dim) strides[dim] /= elements;
  };
  append.element_size = unit;
  append.sizes[kInner] /= elements;
  append.columns /= elements;
  for (FrameView* view : {&append.cache, &append.frames, &append.joined}) {
    view->frame_stride /= elements;
    rescale(view->strides);
  }
  for (Border& border : append.borders) {
    border.sizes[kInner] /= elements;
    border.columns /= elements;
    rescale(border.strides);
  }
  return append;
}

template <typename Unit>
void launch(const FrameCacheAppend& append, cudaStream_t stream) {
  int64_t columns = append.columns;
  for (const Border& border : append.borders) columns = std::max(columns, border.columns);
  const int64_t blocks = std::min((columns + kThreads - 1) / kThreads, kMaxBlocks);
  frame_cache_append_kernel<Unit><<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(
      append, append.cache_len + append.chunk_len);
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

// ---- ops ----------------------------------------------------------------------------------------

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

namespace cogvx {
namespace {

using torch::stable::Tensor;

// Since 2.13 the current stream is in a library that CPU builds of torch have too. Before, it was
// only in that of CUDA builds, and setup.py compiles this file only for those.
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
  const torch::stable::accelerator::DeviceGuard guard(device);
  const cudaError_t status = launch(append, current_stream(device));
  STD_TORCH_CHECK(status == cudaSuccess, "frame_cache: the kernel must launch on cuda:", device,
                  "; got ", cudaGetErrorName(status), ", ", cudaGetErrorString(status));
}

using Ops = FrameCacheOps<run_on_cuda>;

}  // namespace
}  // namespace cogvx

STABLE_TORCH_LIBRARY_IMPL(cogvx, CUDA, m) {
  m.impl("frame_cache_append", TORCH_BOX(&cogvx::Ops::append));
  m.impl("frame_cache_push", TORCH_BOX(&cogvx::Ops::push));
}
