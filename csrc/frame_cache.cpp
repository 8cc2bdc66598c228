// Entry points of the frame cache for all devices: argument checks, description of the append.
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
constexpr Dim kColumnOrder[kColumnDims] = {kBatch, kChannel, kRow, kCol};

// ---- formatting ---------------------------------------------------------------------------------

std::string to_string(torch::headeronly::IntHeaderOnlyArrayRef values) {
  std::ostringstream text;
  for (size_t i = 0; i < values.size(); ++i) text << (i == 0 ? "(" : ", ") << values[i];
  text << (values.empty() ? "()" : values.size() == 1 ? ",)" : ")");
  return text.str();
}

std::string to_string(const torch::stable::Device& device) {
  if (device.is_cpu()) return "cpu";
  const std::string type = device.is_cuda() ? "cuda" : "another device type";
  return type + ":" + std::to_string(device.index());
}

int32_t dtype_of(const Tensor& tensor) {
  int32_t dtype;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(tensor.get(), &dtype));
  return dtype;
}

// For messages: the stable ABI has names for the dtypes of its target version, not for later ones.
std::string dtype_name(const Tensor& tensor) {
  try {
    return torch::headeronly::toString(tensor.scalar_type());
  } catch (const std::exception&) {
    return "a newer dtype";
  }
}

// ---- checks -------------------------------------------------------------------------------------

bool empty(const Tensor& tensor) { return tensor.numel() == 0; }

// True if strides prove that no two elements share memory: from the smallest stride up, every
// dimension steps over all that the smaller ones reach.
bool is_non_overlapping(const Tensor& tensor) {
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
                  ", height, width); got shape ", to_string(tensor.sizes()));
}

void check(const char* op, const Tensor& cache, const Tensor& frames) {
  check_video(op, "cache", cache, "kept");
  check_video(op, "frames", frames, "frames");
  for (const Dim dim : kColumnOrder) {
    STD_TORCH_CHECK(frames.size(dim) == cache.size(dim), op, ": frames must agree with cache ",
                    to_string(cache.sizes()), " in every dimension but the third; got ",
                    to_string(frames.sizes()));
  }
  STD_TORCH_CHECK(frames.device() == cache.device(), op,
                  ": frames must be on the device of cache, ", to_string(cache.device()), "; got ",
                  to_string(frames.device()));
  STD_TORCH_CHECK(dtype_of(frames) == dtype_of(cache), op,
                  ": frames must have the dtype of cache, ", dtype_name(cache), "; got ",
                  dtype_name(frames));
  STD_TORCH_CHECK(empty(cache) || is_non_overlapping(cache), op,
                  ": cache is written to and must have its elements apart in memory; got shape ",
                  to_string(cache.sizes()), " with strides ", to_string(cache.strides()),
                  " (an expanded tensor? pass cache.contiguous())");
}

Past past_of(const char* op, const Start& start, int64_t cache_len, int64_t chunk_len) {
  if (!start.has_value()) return Past::kCache;
  STD_TORCH_CHECK(*start == "replicate" || *start == "zeros", op,
                  ": start must be None, \"replicate\" or \"zeros\"; got \"", *start, "\"");
  if (*start == "zeros") return Past::kZeros;
  STD_TORCH_CHECK(chunk_len > 0 || cache_len == 0, op,
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

// Frames may be a view of the cache's storage. If the two may overlap, frames are read from a copy,
// since another thread may overwrite them first.
Tensor copy_if_overlapping(const Tensor& cache, const Tensor& frames) {
  const bool may_overlap = !empty(cache) && !empty(frames) && cache.data_ptr() < end_of(frames) &&
                           frames.data_ptr() < end_of(cache);
  return may_overlap ? torch::stable::clone(frames) : frames;
}

// ---- description --------------------------------------------------------------------------------

using Order = std::array<Dim, kColumnDims>;  // dimensions of columns by stride, smallest last

Order order_of(const Tensor& tensor) {
  Order order{kBatch, kChannel, kRow, kCol};
  std::stable_sort(order.begin(), order.end(),
                   [&](Dim a, Dim b) { return tensor.stride(a) > tensor.stride(b); });
  return order;
}

// A tensor, or null, and its strides in the description.
struct Part {
  const Tensor* tensor;
  int64_t* strides;
};

// From the smallest stride up, merges each dimension with the one before if no part has a gap
// between them. `size_of` gives the size of a dimension. Returns the number of columns.
template <typename SizeOf>
int64_t merge(const Order& order, SizeOf size_of, std::initializer_list<Part> parts,
              int64_t* sizes) {
  std::fill_n(sizes, kColumnDims, 1);
  for (const Part& part : parts) std::fill_n(part.strides, kColumnDims, 1);
  int64_t columns = 1;
  int at = kColumnDims;
  for (int position = kInner; position >= 0; --position) {
    const Dim dim = order[position];
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

FrameView view_of(const Tensor* tensor) {
  FrameView view{};
  if (tensor == nullptr) return view;
  view.frame_stride = tensor->stride(kFrame);
  view.data = static_cast<char*>(tensor->data_ptr());
  return view;
}

// Byte offset of the pixel (padding, padding) of a padded tensor.
int64_t interior_offset(const Tensor& padded, int64_t padding) {
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

// The append of these tensors; `joined` is null for a push.
FrameCacheAppend describe(const Tensor& cache, const Tensor& frames, const Tensor* joined,
                          Past past, int64_t padding) {
  FrameCacheAppend append{};
  append.cache_len = cache.size(kFrame);
  append.chunk_len = frames.size(kFrame);
  append.joined_len = joined == nullptr ? 0 : append.cache_len + append.chunk_len;
  append.skipped = joined == nullptr ? append.chunk_len : 0;
  append.past = past;
  append.element_size = static_cast<int64_t>(cache.element_size());

  const Tensor* const cached = append.cache_len > 0 ? &cache : nullptr;
  const Tensor* const chunk = append.chunk_len > 0 ? &frames : nullptr;
  append.cache = view_of(cached);
  append.frames = view_of(chunk);
  append.joined = view_of(joined);
  append.columns = merge(
      order_of(joined != nullptr ? *joined : cache), [&](Dim dim) { return cache.size(dim); },
      {{cached, append.cache.strides},
       {chunk, append.frames.strides},
       {joined, append.joined.strides}},
      append.sizes);
  if (padding > 0) {
    append.joined.data += interior_offset(*joined, padding);
    describe_borders(append, *joined, padding);
  }
  return append;
}

// ---- results ------------------------------------------------------------------------------------

// Uninitialized and dense, with the channels or the columns innermost.
Tensor new_video(const Tensor& like, const int64_t (&sizes)[kDims], bool channels_last) {
  constexpr Dim kColsLast[] = {kBatch, kChannel, kFrame, kRow, kCol};
  constexpr Dim kChannelsLast[] = {kBatch, kFrame, kRow, kCol, kChannel};
  const Dim* const order = channels_last ? kChannelsLast : kColsLast;
  int64_t strides[kDims];
  for (int64_t position = kDims - 1, stride = 1; position >= 0; --position) {
    strides[order[position]] = stride;
    stride *= std::max<int64_t>(1, sizes[order[position]]);
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

void run_if_needed(const FrameCacheAppend& append, const Tensor& cache, FrameCacheRun run) {
  int64_t borders = 0;
  for (const Border& border : append.borders) borders += border.columns;
  const bool moves = append.columns > 0 && append.steps() > 0;
  if (moves || borders > 0) run(append, cache.get_device_index());
}

}  // namespace

Tensor frame_cache_append(const Tensor& cache, const Tensor& frames, const Start& start,
                          int64_t padding, bool channels_last, FrameCacheRun run) {
  const char* const op = "frame_cache_append";
  check(op, cache, frames);
  STD_TORCH_CHECK(padding >= 0, op, ": padding must be at least 0; got ", padding);
  const int64_t cache_len = cache.size(kFrame), chunk_len = frames.size(kFrame);
  const Past past = past_of(op, start, cache_len, chunk_len);
  const int64_t sizes[] = {cache.size(kBatch), cache.size(kChannel), cache_len + chunk_len,
                           cache.size(kRow) + 2 * padding, cache.size(kCol) + 2 * padding};
  const Tensor joined = new_video(frames, sizes, channels_last);
  if (empty(joined)) return joined;
  const Tensor source = copy_if_overlapping(cache, frames);
  run_if_needed(describe(cache, source, &joined, past, padding), cache, run);
  return joined;
}

void frame_cache_push(const Tensor& cache, const Tensor& frames, const Start& start,
                      FrameCacheRun run) {
  const char* const op = "frame_cache_push";
  check(op, cache, frames);
  const Past past = past_of(op, start, cache.size(kFrame), frames.size(kFrame));
  if (empty(cache)) return;
  const Tensor source = copy_if_overlapping(cache, frames);
  run_if_needed(describe(cache, source, nullptr, past, 0), cache, run);
}

}  // namespace cogvx
