// The contract of the frame cache: what every device is told, and the doors they share.
#pragma once

#include <cstdint>
#include <optional>
#include <string>

#include <torch/csrc/stable/tensor.h>

namespace cogvx {

// A column is what one (batch, channel, row, col) holds over all frames. Columns never meet: a
// thread that owns a column may read it from the cache and write the next cache in any device's
// time, and no other thread will notice.
constexpr int kColumnDims = 4;
constexpr int kInner = kColumnDims - 1;  // the fastest of them

// One tensor, seen as frames of columns; without data if the work has none. All strides count
// elements, not bytes, and are int64: the last block of a 1.5 decoder holds more than 2^31
// elements.
struct FrameView {
  char* data;
  int64_t frame_stride;
  int64_t strides[kColumnDims];
};

// A box of pixels of joined, over batch and channels, that is zero in every frame.
struct Border {
  char* data;
  int64_t sizes[kColumnDims];
  int64_t strides[kColumnDims];
  int64_t columns;
};
constexpr int kBorders = 4;  // above, below, left, right

// What lies before the chunk: the cache's frames, copies of the chunk's first one, or zeros.
enum class Past : int32_t { kCache, kFirstFrame, kZeros };

// What an append does, in full: for t in [0, kept + arriving) the value v is past[t] while t < kept
// and frames[t - kept] after; where t < joining, joined[t] = v; and where t >= arriving,
// cache[t - arriving] = v. In ascending t a cached frame is read before it is overwritten, also
// when the chunk is shorter than the cache.
//
// The ops differ in `joining`: an append joins all frames, a push none, and an exchange, whose
// frames are in joined already, the past alone.
struct FrameCacheAppend {
  FrameView cache;
  FrameView frames;
  FrameView joined;
  Border borders[kBorders];
  Past past;
  int64_t kept;          // frames in the cache
  int64_t arriving;      // frames in the chunk
  int64_t joining;       // frames of joined that are written
  int64_t skipped;       // frames from `joining` on that nobody gets: they are stepped over
  int64_t element_size;  // bytes: 1, 2, 4, 8 or 16
  // How many columns there are, in each dimension and in all; of the dimensions batch, channel, row
  // and col, the one that lies closest in the tensor written most is last. Those that follow one
  // another without a gap in every tensor come merged; the first are 1 then.
  int64_t sizes[kColumnDims];
  int64_t columns;

  // Steps in time: step i is frame i, or i + skipped from `joining` on.
  int64_t steps() const { return kept + arriving - skipped; }
};

// How a device runs an append; `device` is its index, -1 on CPU.
using FrameCacheRun = void (*)(const FrameCacheAppend& append, int32_t device);

// The doors, for every device: each checks its arguments, allocates what is returned, describes the
// work and hands it to `run` (not at all when there is nothing to move). In frame_cache.cpp.
using Start = std::optional<std::string>;  // none: the cache counts; "replicate" or "zeros"

torch::stable::Tensor frame_cache_append(const torch::stable::Tensor& cache,
                                         const torch::stable::Tensor& frames, const Start& start,
                                         int64_t padding, bool channels_last, FrameCacheRun run);
void frame_cache_push(const torch::stable::Tensor& cache, const torch::stable::Tensor& frames,
                      const Start& start, FrameCacheRun run);
void frame_cache_exchange(const torch::stable::Tensor& cache, const torch::stable::Tensor& joined,
                          const Start& start, FrameCacheRun run);

// The ops as a device registers them.
template <FrameCacheRun run>
struct FrameCacheOps {
  static torch::stable::Tensor append(torch::stable::Tensor cache, torch::stable::Tensor frames,
                                      Start start, int64_t padding, bool channels_last) {
    return frame_cache_append(cache, frames, start, padding, channels_last, run);
  }
  static void push(torch::stable::Tensor cache, torch::stable::Tensor frames, Start start) {
    frame_cache_push(cache, frames, start, run);
  }
  static void exchange(torch::stable::Tensor cache, torch::stable::Tensor joined, Start start) {
    frame_cache_exchange(cache, joined, start, run);
  }
};

}  // namespace cogvx
