// The frame cache's doors, the same for every device: checks, and the description of the work.
#include "frame_cache.h"

#include <algorithm>
#include <array>
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
constexpr Dim kOfColumns[kColumnDims] = {kBatch, kChannel, kRow, kCol};

// ---- words --------------------------------------------------------------------------------------

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

// ---- checks -------------------------------------------------------------------------------------

bool empty(const Tensor& tensor) { return tensor.numel() == 0; }

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

void check_video(const char* op, const char* name, const Tensor& tensor, const char* frames) {
  STD_TORCH_CHECK(tensor.defined(), op, ": ", name, " must be a tensor; got None");
  STD_TORCH_CHECK(tensor.dim() == kDims, op, ": ", name,
                  " must have 5 dimensions (batch, channels, ", frames,
                  ", height, width); got shape ", in_words(tensor.sizes()));
}

void check_written(const char* op, const char* name, const Tensor& tensor) {
  STD_TORCH_CHECK(empty(tensor) || elements_apart(tensor), op, ": ", name,
                  " is written to and must have its elements apart in memory; got shape ",
                  in_words(tensor.sizes()), " with strides ", in_words(tensor.strides()),
                  " (an expanded tensor? pass ", name, ".contiguous())");
}

// `other`, called `name`, goes with the cache.
void check(const char* op, const Tensor& cache, const char* name, const Tensor& other) {
  check_video(op, "cache", cache, "kept");
  check_video(op, name, other, "frames");
  for (const Dim dim : kOfColumns) {
    STD_TORCH_CHECK(other.size(dim) == cache.size(dim), op, ": ", name, " must agree with cache ",
                    in_words(cache.sizes()), " in every dimension but the third; got ",
                    in_words(other.sizes()));
  }
  STD_TORCH_CHECK(other.device() == cache.device(), op, ": ", name,
                  " must be on the device of cache, ", in_words(cache.device()), "; got ",
                  in_words(other.device()));
  STD_TORCH_CHECK(dtype_of(other) == dtype_of(cache), op, ": ", name,
                  " must have the dtype of cache, ", dtype_in_words(cache), "; got ",
                  dtype_in_words(other));
  check_written(op, "cache", cache);
}

Past past_of(const char* op, const Start& start, int64_t kept, int64_t arriving) {
  if (!start.has_value()) return Past::kCache;
  STD_TORCH_CHECK(*start == "replicate" || *start == "zeros", op,
                  ": start must be None, \"replicate\" or \"zeros\"; got \"", *start, "\"");
  if (*start == "zeros") return Past::kZeros;
  STD_TORCH_CHECK(arriving > 0 || kept == 0, op,
                  ": start=\"replicate\" must have a first frame to replicate; got no frames");
  return Past::kFirstFrame;
}

// One past the last byte that the tensor reaches.
const char* end_of(const Tensor& tensor) {
  int64_t last = 0;
  for (int dim = 0; dim < kDims; ++dim) last += (tensor.size(dim) - 1) * tensor.stride(dim);
  return static_cast<const char*>(tensor.data_ptr()) +
         (last + 1) * static_cast<int64_t>(tensor.element_size());
}

bool could_touch(const Tensor& a, const Tensor& b) {
  return !empty(a) && !empty(b) && a.data_ptr() < end_of(b) && b.data_ptr() < end_of(a);
}

// Frames may be a view of the cache's own storage. Where the two could touch, frames are read from
// a private copy: what is returned must not depend on who is faster.
Tensor apart_from(const Tensor& cache, const Tensor& frames) {
  return could_touch(cache, frames) ? torch::stable::clone(frames) : frames;
}

// ---- description --------------------------------------------------------------------------------

using Order = std::array<Dim, kColumnDims>;  // dimensions of columns, the closest last

Order order_of(const Tensor& tensor) {
  Order order{kBatch, kChannel, kRow, kCol};
  std::stable_sort(order.begin(), order.end(),
                   [&](Dim a, Dim b) { return tensor.stride(a) > tensor.stride(b); });
  return order;
}

// A tensor as it comes into a description, and its view there.
struct Part {
  const Tensor* tensor;
  int64_t* strides;
};

// From the closest dimension to the farthest: joins the one before when none of the parts has a gap
// between them, else begins a new one. `size_of` tells how long a dimension is; returns columns.
template <typename SizeOf>
int64_t merge(const Order& order, SizeOf size_of, std::initializer_list<Part> parts,
              int64_t* sizes) {
  std::fill_n(sizes, kColumnDims, 1);
  for (const Part& part : parts) std::fill_n(part.strides, kColumnDims, 1);
  int64_t columns = 1;
  int at = kColumnDims;
  for (int place = kInner; place >= 0; --place) {
    const Dim dim = order[place];
    const int64_t size = size_of(dim);
    columns *= size;
    if (size == 1) continue;
    bool gapless = at < kColumnDims;
    for (const Part& part : parts) {
      gapless = gapless && (part.tensor == nullptr ||
                            part.tensor->stride(dim) == part.strides[at] * sizes[at]);
    }
    if (!gapless) --at;
    sizes[at] *= size;
    for (const Part& part : parts) {
      if (!gapless && part.tensor != nullptr) part.strides[at] = part.tensor->stride(dim);
    }
  }
  return columns;
}

FrameView view_of(const Tensor* tensor, int64_t first_frame = 0) {
  FrameView view{};
  if (tensor == nullptr) return view;
  view.frame_stride = tensor->stride(kFrame);
  view.data = static_cast<char*>(tensor->data_ptr()) +
              first_frame * view.frame_stride * static_cast<int64_t>(tensor->element_size());
  return view;
}

// The middle of a padded tensor: an address for `data`, of the pixel (padding, padding).
int64_t middle(const Tensor& padded, int64_t padding) {
  return padding * (padded.stride(kRow) + padded.stride(kCol)) *
         static_cast<int64_t>(padded.element_size());
}

void describe_borders(FrameCacheAppend& append, const Tensor& padded, int64_t padding) {
  const int64_t height = padded.size(kRow), width = padded.size(kCol);
  const int64_t boxes[kBorders][4] = {
      // first row and col, rows and cols
      {0, 0, padding, width},
      {height - padding, 0, padding, width},
      {padding, 0, height - 2 * padding, padding},
      {padding, width - padding, height - 2 * padding, padding},
  };
  for (int i = 0; i < kBorders; ++i) {
    const auto& [row, col, rows, cols] = boxes[i];
    Border& border = append.borders[i];
    border.data = static_cast<char*>(padded.data_ptr()) +
                  (row * padded.stride(kRow) + col * padded.stride(kCol)) * append.element_size;
    const auto size_of = [&, rows = rows, cols = cols](Dim dim) {
      return dim == kRow ? rows : dim == kCol ? cols : padded.size(dim);
    };
    border.columns = merge(order_of(padded), size_of, {{&padded, border.strides}}, border.sizes);
  }
}

// The work on these tensors; joined is there or not, `in_place` when it holds the frames already.
FrameCacheAppend describe(const Tensor& cache, const Tensor& frames, const Tensor* joined,
                          Past past, int64_t padding, bool in_place) {
  FrameCacheAppend append{};
  append.kept = cache.size(kFrame);
  append.arriving = frames.size(kFrame) - (in_place ? append.kept : 0);
  append.joining = joined == nullptr ? 0 : append.kept + (in_place ? 0 : append.arriving);
  append.skipped = std::max<int64_t>(0, append.arriving - append.joining);
  append.past = past;
  append.element_size = static_cast<int64_t>(cache.element_size());

  const Tensor* const kept = append.kept > 0 ? &cache : nullptr;
  const Tensor* const arriving = append.arriving > 0 ? &frames : nullptr;
  append.cache = view_of(kept);
  append.frames = view_of(arriving, in_place ? append.kept : 0);
  append.joined = view_of(joined);
  append.columns = merge(
      order_of(joined != nullptr ? *joined : cache), [&](Dim dim) { return cache.size(dim); },
      {{kept, append.cache.strides},
       {arriving, append.frames.strides},
       {joined, append.joined.strides}},
      append.sizes);
  if (padding > 0) {
    append.joined.data += middle(*joined, padding);
    describe_borders(append, *joined, padding);
  }
  return append;
}

// ---- what is returned ---------------------------------------------------------------------------

// Uninitialised, dense, the channels or the cols closest.
Tensor new_video(const Tensor& like, const int64_t (&sizes)[kDims], bool channels_last) {
  constexpr Dim kColsLast[] = {kBatch, kChannel, kFrame, kRow, kCol};
  constexpr Dim kChannelsLast[] = {kBatch, kFrame, kRow, kCol, kChannel};
  const Dim* const order = channels_last ? kChannelsLast : kColsLast;
  int64_t strides[kDims];
  for (int64_t place = kDims - 1, stride = 1; place >= 0; --place) {
    strides[order[place]] = stride;
    stride *= std::max<int64_t>(1, sizes[order[place]]);
  }
  using torch::stable::detail::from;
  using Sizes = torch::headeronly::IntHeaderOnlyArrayRef;
  std::array<StableIValue, 7> stack{from(like),         from(Sizes(sizes)), from(Sizes(strides)),
                                    from(std::nullopt), from(std::nullopt), from(std::nullopt),
                                    from(std::nullopt)};
  TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::new_empty_strided", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

void start_running(const FrameCacheAppend& append, const Tensor& cache, FrameCacheRun run) {
  int64_t borders = 0;
  for (const Border& border : append.borders) borders += border.columns;
  const bool moves = append.columns > 0 && append.steps() > 0;
  if (moves || borders > 0) run(append, cache.get_device_index());
}

}  // namespace

Tensor frame_cache_append(const Tensor& cache, const Tensor& frames, const Start& start,
                          int64_t padding, bool channels_last, FrameCacheRun run) {
  const char* const op = "frame_cache_append";
  check(op, cache, "frames", frames);
  STD_TORCH_CHECK(padding >= 0, op, ": padding must be at least 0; got ", padding);
  const int64_t kept = cache.size(kFrame), arriving = frames.size(kFrame);
  const Past past = past_of(op, start, kept, arriving);
  const int64_t sizes[] = {cache.size(kBatch), cache.size(kChannel), kept + arriving,
                           cache.size(kRow) + 2 * padding, cache.size(kCol) + 2 * padding};
  const Tensor joined = new_video(frames, sizes, channels_last);
  if (empty(joined)) return joined;
  const Tensor source = apart_from(cache, frames);
  start_running(describe(cache, source, &joined, past, padding, false), cache, run);
  return joined;
}

void frame_cache_push(const Tensor& cache, const Tensor& frames, const Start& start,
                      FrameCacheRun run) {
  const char* const op = "frame_cache_push";
  check(op, cache, "frames", frames);
  const Past past = past_of(op, start, cache.size(kFrame), frames.size(kFrame));
  if (empty(cache)) return;
  const Tensor source = apart_from(cache, frames);
  start_running(describe(cache, source, nullptr, past, 0, false), cache, run);
}

void frame_cache_exchange(const Tensor& cache, const Tensor& joined, const Start& start,
                          FrameCacheRun run) {
  const char* const op = "frame_cache_exchange";
  check(op, cache, "joined", joined);
  check_written(op, "joined", joined);
  const int64_t arriving = joined.size(kFrame) - cache.size(kFrame);
  STD_TORCH_CHECK(arriving >= 0, op, ": joined must have room for the ", cache.size(kFrame),
                  " frames of cache; got shape ", in_words(joined.sizes()));
  const Past past = past_of(op, start, cache.size(kFrame), arriving);
  STD_TORCH_CHECK(!could_touch(cache, joined), op,
                  ": cache and joined are both written to and must lie apart in memory; got two "
                  "that overlap");
  if (empty(cache)) return;
  start_running(describe(cache, joined, &joined, past, 0, true), cache, run);
}

}  // namespace cogvx
