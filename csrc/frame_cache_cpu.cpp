// The frame cache's door (checks, and the description of the work), and its way on CPU.
#include "frame_cache.h"

#include <algorithm>
#include <cstring>
#include <exception>
#include <sstream>
#include <string>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

namespace cogvx {
namespace {

using torch::stable::Tensor;

enum Dim { kBatch, kChannel, kFrame, kRow, kCol, kDims };

std::string in_words(torch::headeronly::IntHeaderOnlyArrayRef values) {
  std::ostringstream words;
  for (size_t i = 0; i < values.size(); ++i) words << (i == 0 ? "(" : ", ") << values[i];
  words << (values.empty() ? "()" : values.size() == 1 ? ",)" : ")");
  return words.str();
}

std::string in_words(const torch::stable::Device& device) {
  if (device.is_cpu()) return "cpu";
  const std::string type = device.is_cuda() ? "cuda" : "another device type";
  return type + ":" + std::to_string(device.index());
}

int32_t dtype_of(const Tensor& tensor) {
  int32_t dtype;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(tensor.get(), &dtype));
  return dtype;
}

// Only to be read: the stable ABI names the dtypes that its target version knew, and no later one.
std::string dtype_in_words(const Tensor& tensor) {
  try {
    return torch::headeronly::toString(tensor.scalar_type());
  } catch (const std::exception&) {
    return "a newer dtype";
  }
}

bool empty(const Tensor& tensor) { return tensor.numel() == 0; }

// ---- checks -------------------------------------------------------------------------------------

// True when no two elements share memory, as far as strides can prove it: taken from the smallest
// stride up, every dimension steps over all that the smaller ones reach.
bool elements_apart(const Tensor& tensor) {
  int64_t order[kDims] = {0, 1, 2, 3, 4};
  std::sort(order, order + kDims,
            [&](int64_t a, int64_t b) { return tensor.stride(a) < tensor.stride(b); });
  int64_t reach = 0;
  for (const int64_t dim : order) {
    if (tensor.size(dim) <= 1) continue;
    if (tensor.stride(dim) <= reach) return false;
    reach += (tensor.size(dim) - 1) * tensor.stride(dim);
  }
  return true;
}

void check(const Tensor& cache, const Tensor& frames) {
  STD_TORCH_CHECK(cache.defined(), "frame_cache_append: cache must be a tensor; got None");
  STD_TORCH_CHECK(frames.defined(), "frame_cache_append: frames must be a tensor; got None");
  STD_TORCH_CHECK(cache.dim() == kDims,
                  "frame_cache_append: cache must have 5 dimensions (batch, channels, kept, "
                  "height, width); got shape ",
                  in_words(cache.sizes()));
  STD_TORCH_CHECK(frames.dim() == kDims,
                  "frame_cache_append: frames must have 5 dimensions (batch, channels, frames, "
                  "height, width); got shape ",
                  in_words(frames.sizes()));
  for (const Dim dim : {kBatch, kChannel, kRow, kCol}) {
    STD_TORCH_CHECK(frames.size(dim) == cache.size(dim),
                    "frame_cache_append: frames must agree with cache ", in_words(cache.sizes()),
                    " in every dimension but the third; got ", in_words(frames.sizes()));
  }
  STD_TORCH_CHECK(frames.device() == cache.device(),
                  "frame_cache_append: frames must be on the device of cache, ",
                  in_words(cache.device()), "; got ", in_words(frames.device()));
  STD_TORCH_CHECK(dtype_of(frames) == dtype_of(cache),
                  "frame_cache_append: frames must have the dtype of cache, ",
                  dtype_in_words(cache), "; got ", dtype_in_words(frames));
  STD_TORCH_CHECK(empty(cache) || elements_apart(cache),
                  "frame_cache_append: cache is written to and must have its elements apart in "
                  "memory; got shape ",
                  in_words(cache.sizes()), " with strides ", in_words(cache.strides()),
                  " (an expanded tensor? pass cache.contiguous())");
}

// ---- description --------------------------------------------------------------------------------

// One past the last byte that the tensor reaches.
const char* end_of(const Tensor& tensor) {
  int64_t last = 0;
  for (int dim = 0; dim < kDims; ++dim) last += (tensor.size(dim) - 1) * tensor.stride(dim);
  return static_cast<const char*>(tensor.data_ptr()) +
         (last + 1) * static_cast<int64_t>(tensor.element_size());
}

// Frames may be a view of the cache's own storage. Where the two could touch, frames are read from
// a private copy: what is returned must not depend on who is faster.
bool could_touch(const Tensor& cache, const Tensor& frames) {
  return !empty(cache) && !empty(frames) && cache.data_ptr() < end_of(frames) &&
         frames.data_ptr() < end_of(cache);
}

FrameCacheAppend describe(const Tensor& cache, const Tensor& frames, const Tensor& joined) {
  FrameCacheAppend append{};
  append.kept = cache.size(kFrame);
  append.arriving = frames.size(kFrame);
  append.element_size = static_cast<int64_t>(joined.element_size());

  const Tensor* tensors[] = {&cache, &frames, &joined};
  FrameView* views[] = {&append.cache, &append.frames, &append.joined};
  for (int i = 0; i < 3; ++i) {
    views[i]->data = static_cast<char*>(tensors[i]->data_ptr());
    views[i]->frame_stride = tensors[i]->stride(kFrame);
    std::fill_n(views[i]->strides, kColumnDims, 1);
  }

  // From the fastest dimension to the slowest: join the one before when none of the three tensors
  // has a gap between them, else begin a new one.
  std::fill_n(append.sizes, kColumnDims, 1);
  int at = kColumnDims;
  for (const Dim dim : {kCol, kRow, kChannel, kBatch}) {
    const int64_t size = joined.size(dim);
    if (size == 1) continue;
    bool gapless = at < kColumnDims;
    for (int i = 0; gapless && i < 3; ++i) {
      gapless = tensors[i]->stride(dim) == views[i]->strides[at] * append.sizes[at];
    }
    if (!gapless) --at;
    append.sizes[at] *= size;
    for (int i = 0; !gapless && i < 3; ++i) views[i]->strides[at] = tensors[i]->stride(dim);
  }
  return append;
}

// ---- the way on CPU -----------------------------------------------------------------------------

constexpr int64_t kBytesPerTask = 65536;  // less than this is not worth waking another thread

template <int kBytes>
void copy_strided(char* to, int64_t to_stride, const char* from, int64_t from_stride, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    std::memcpy(to + i * to_stride * kBytes, from + i * from_stride * kBytes, kBytes);
  }
}

void copy(char* to, int64_t to_stride, const char* from, int64_t from_stride, int64_t n,
          int64_t element_size) {
  if (to_stride == 1 && from_stride == 1) {
    std::memcpy(to, from, static_cast<size_t>(n * element_size));
    return;
  }
  switch (element_size) {
    case 1: return copy_strided<1>(to, to_stride, from, from_stride, n);
    case 2: return copy_strided<2>(to, to_stride, from, from_stride, n);
    case 4: return copy_strided<4>(to, to_stride, from, from_stride, n);
    case 8: return copy_strided<8>(to, to_stride, from, from_stride, n);
    default: return copy_strided<16>(to, to_stride, from, from_stride, n);
  }
}

// The address of a column in frame 0.
char* column_of(const FrameCacheAppend& append, const FrameView& view, int64_t column) {
  int64_t offset = 0;
  for (int dim = kColumnDims - 1; dim >= 0; --dim) {
    offset += column % append.sizes[dim] * view.strides[dim];
    column /= append.sizes[dim];
  }
  return view.data + offset * append.element_size;
}

void append_columns(const FrameCacheAppend& append, int64_t begin, int64_t end) {
  constexpr int kInner = kColumnDims - 1;
  const int64_t run = append.sizes[kInner];
  const auto frame = [&](const FrameView& view, char* column, int64_t t) {
    return column + t * view.frame_stride * append.element_size;
  };
  for (int64_t column = begin, n; column < end; column += n) {
    n = std::min(run - column % run, end - column);
    char* const cache = column_of(append, append.cache, column);
    char* const frames = column_of(append, append.frames, column);
    char* const joined = column_of(append, append.joined, column);
    for (int64_t t = 0; t < append.kept + append.arriving; ++t) {
      const bool old = t < append.kept;
      const FrameView& source = old ? append.cache : append.frames;
      const char* from =
          old ? frame(append.cache, cache, t) : frame(append.frames, frames, t - append.kept);
      copy(frame(append.joined, joined, t), append.joined.strides[kInner], from,
           source.strides[kInner], n, append.element_size);
      if (append.arriving > 0 && t >= append.arriving) {
        copy(frame(append.cache, cache, t - append.arriving), append.cache.strides[kInner], from,
             source.strides[kInner], n, append.element_size);
      }
    }
  }
}

void run_on_cpu(const FrameCacheAppend& append, int32_t /*device*/) {
  const int64_t column_bytes = (append.kept + append.arriving) * append.element_size;
  torch::stable::parallel_for(
      0, append.columns(), std::max<int64_t>(1, kBytesPerTask / column_bytes),
      [&](int64_t begin, int64_t end) { append_columns(append, begin, end); });
}

Tensor frame_cache_append_cpu(Tensor cache, const Tensor& frames) {
  return frame_cache_append(cache, frames, run_on_cpu);
}

}  // namespace

Tensor frame_cache_append(const Tensor& cache, const Tensor& frames, FrameCacheRun run) {
  check(cache, frames);
  const int64_t sizes[] = {cache.size(kBatch), cache.size(kChannel),
                           cache.size(kFrame) + frames.size(kFrame), cache.size(kRow),
                           cache.size(kCol)};
  const Tensor joined = torch::stable::new_empty(frames, sizes);
  if (empty(joined)) return joined;
  const Tensor source = could_touch(cache, frames) ? torch::stable::clone(frames) : frames;
  run(describe(cache, source, joined), frames.get_device_index());
  return joined;
}

}  // namespace cogvx

STABLE_TORCH_LIBRARY_IMPL(cogvx, CPU, m) {
  m.impl("frame_cache_append", TORCH_BOX(&cogvx::frame_cache_append_cpu));
}
