// The frame cache: the description of one operation for a device, and the shared entry points.
#pragma once

#include <cstdint>
#include <optional>
#include <string>

#include <torch/csrc/stable/tensor.h>

namespace cogvx {

// A column is one (batch, channel, row, col) over all frames. Columns are independent: the thread
// that owns a column reads it from the cache and writes the next cache without synchronization.
constexpr int kColumnDims = 4;
constexpr int kInner = kColumnDims - 1;  // the fastest of them

// One tensor as frames of columns; `data` is null for an absent tensor. Strides count elements, not
// bytes, in int64: the last block of a 1.5 decoder holds more than 2^31 elements.
struct FrameView {
  char* data;
  int64_t frame_stride;
  int64_t strides[kColumnDims];
};

// A box of pixels of `joined`, over batch and channels, that is zero in every frame: padding.
struct Border {
  char* data;
  int64_t sizes[kColumnDims];
  int64_t strides[kColumnDims];
  int64_t columns;
};
constexpr int kBorders = 4;  // above, below, left, right

// The frames before the chunk: the cache, copies of the chunk's first frame, or zeros.
enum class Past : int32_t { kCache, kFirstFrame, kZeros };

// An append, for t in [0, cache_len + chunk_len): v = past[t] if t < cache_len, else
// frames[t - cache_len]; if t < joined_len, joined[t] = v; if t >= chunk_len,
// cache[t - chunk_len] = v. In ascending t a cached frame is read before it is overwritten, also
// when the chunk is shorter than the cache.
// A push has no joined, and begins at the first frame that stays in the cache.
struct FrameCacheAppend {
  FrameView cache;
  FrameView frames;
  FrameView joined;
  Border borders[kBorders];
  Past past;
  int64_t cache_len;     // frames in the cache
  int64_t chunk_len;     // frames in the chunk
  int64_t joined_len;    // frames of joined; 0 without it
  int64_t skipped;       // first frames that are not written anywhere
  int64_t element_size;  // bytes: 1, 2, 4, 8 or 16
  // Number of columns in each dimension, and in total. Dimensions are ordered by the strides of the
  // tensor written most, the smallest last. Those without a gap between them in any tensor are
  // merged; the leading sizes are then 1.
  int64_t sizes[kColumnDims];
  int64_t columns;

  // Frames to visit, from `skipped` on.
  int64_t steps() const { return cache_len + chunk_len - skipped; }
};

// Runs an append on a device; `device` is its index, -1 on CPU.
using FrameCacheRun = void (*)(const FrameCacheAppend& append, int32_t device);

// Entry points for every device: check the arguments, allocate the result, describe the append and
// pass it to `run`, unless there is nothing to move. In frame_cache.cpp.
using Start = std::optional<std::string>;  // none: read the cache; else "replicate" or "zeros"

torch::stable::Tensor frame_cache_append(const torch::stable::Tensor& cache,
                                         const torch::stable::Tensor& frames, const Start& start,
                                         int64_t padding, bool channels_last, FrameCacheRun run);
void frame_cache_push(const torch::stable::Tensor& cache, const torch::stable::Tensor& frames,
                      const Start& start, FrameCacheRun run);

// The ops of a device, for registration.
template <FrameCacheRun run>
struct FrameCacheOps {
  static torch::stable::Tensor append(torch::stable::Tensor cache, torch::stable::Tensor frames,
                                      Start start, int64_t padding, bool channels_last) {
    return frame_cache_append(cache, frames, start, padding, channels_last, run);
  }
  static void push(torch::stable::Tensor cache, torch::stable::Tensor frames, Start start) {
    frame_cache_push(cache, frames, start, run);
  }
};

}  // namespace cogvx
