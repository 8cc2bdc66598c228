// The contract of the frame cache: what every device is told, and the door they share.
#pragma once

#include <cstdint>

#include <torch/csrc/stable/tensor.h>

namespace cogvx {

// A column is what one (batch, channel, row, col) holds over all frames. Columns never meet: a
// thread that owns a column may read it from the cache and write the next cache in any device's
// time, and no other thread will notice.
constexpr int kColumnDims = 4;

// One tensor, seen as frames of columns. All strides count elements, not bytes, and are int64: the
// last block of a 1.5 decoder holds more than 2^31 elements.
struct FrameView {
  char* data;
  int64_t frame_stride;
  int64_t strides[kColumnDims];
};

// What an append does, in full: for t in [0, kept + arriving) the value v is cache[t] while
// t < kept and frames[t - kept] after; joined[t] = v; and where t >= arriving, cache[t - arriving]
// = v. In ascending t a cached frame is read before it is overwritten, also when the chunk is
// shorter than the cache.
struct FrameCacheAppend {
  FrameView cache;
  FrameView frames;
  FrameView joined;
  int64_t kept;          // frames in the cache
  int64_t arriving;      // frames in the chunk
  int64_t element_size;  // bytes: 1, 2, 4, 8 or 16
  // How many columns there are: batch, channel, row, col, the last one fastest. Dimensions that
  // follow one another without a gap in all three tensors come merged; the first are 1 then.
  int64_t sizes[kColumnDims];

  int64_t columns() const { return sizes[0] * sizes[1] * sizes[2] * sizes[3]; }
};

// How a device runs an append; `device` is its index, -1 on CPU.
using FrameCacheRun = void (*)(const FrameCacheAppend& append, int32_t device);

// The door, for every device: checks the arguments, allocates what is returned, describes the work
// and hands it to `run` (not at all when there is nothing to move). In frame_cache_cpu.cpp.
torch::stable::Tensor frame_cache_append(const torch::stable::Tensor& cache,
                                         const torch::stable::Tensor& frames, FrameCacheRun run);

}  // namespace cogvx
