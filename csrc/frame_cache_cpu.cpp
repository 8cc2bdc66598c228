// The frame cache on CPU: torch's threads copy tiles of columns through all frames.
#include "frame_cache.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

namespace cogvx {
namespace {

constexpr int64_t kBytesPerTask = 65536;  // less is not worth another thread
constexpr int64_t kTileBytes = 65536;     // of one frame: fits the CPU cache
constexpr int64_t kTileSide = 128;        // if the innermost dims of two tensors differ

// ---- one frame of a tile ------------------------------------------------------------------------

// Rows of elements; strides count elements.
struct Plane {
  char* data;
  int64_t row;
  int64_t element;
};

struct Extent {
  int64_t rows;
  int64_t run;
};

template <typename T>
T* at(const Plane& plane, int64_t row, int64_t element) {
  return reinterpret_cast<T*>(plane.data) + row * plane.row + element * plane.element;
}

// By memcpy: a tensor may not be aligned to its elements.
template <typename T>
void copy_each(const Plane& to, const Plane& from, int64_t row, int64_t rows, int64_t element,
               int64_t run) {
  for (int64_t r = row; r < rows; ++r) {
    for (int64_t e = element; e < run; ++e) {
      std::memcpy(at<T>(to, r, e), at<T>(from, r, e), sizeof(T));
    }
  }
}

#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define COGVX_VECTORS 1
#endif
#endif

#ifdef COGVX_VECTORS

template <typename T>
struct Vector {
  static constexpr int kLanes = 16 / sizeof(T);
  typedef T Type __attribute__((vector_size(16)));

  // Lanes alternately from a and b: of the first halves of both, or of the second.
  template <int kHalf, int... lane>
  static Type interleave(Type a, Type b, std::integer_sequence<int, lane...>) {
    return __builtin_shufflevector(a, b,
                                   (kHalf * (kLanes / 2) + lane / 2 + (lane % 2 ? kLanes : 0))...);
  }

  // Transposes a square of vectors. Each round doubles the lanes that belong together, until they
  // fill a vector.
  static void transpose(Type (&square)[kLanes]) {
    constexpr auto lanes = std::make_integer_sequence<int, kLanes>();
    for (int width = 1; width < kLanes; width *= 2) {
      Type next[kLanes];
      for (int i = 0; i < kLanes / 2; ++i) {
        next[2 * i] = interleave<0>(square[i], square[i + kLanes / 2], lanes);
        next[2 * i + 1] = interleave<1>(square[i], square[i + kLanes / 2], lanes);
      }
      std::copy_n(next, kLanes, square);
    }
  }
};

// For dense runs of `to` and dense rows of `from`: squares of vectors, then the remainder.
template <typename T>
void copy_transposed(const Plane& to, const Plane& from, Extent extent) {
  using V = Vector<T>;
  constexpr int kLanes = V::kLanes;
  const int64_t rows = extent.rows / kLanes * kLanes, run = extent.run / kLanes * kLanes;
  for (int64_t element = 0; element < run; element += kLanes) {
    for (int64_t row = 0; row < rows; row += kLanes) {
      typename V::Type square[kLanes];
      for (int i = 0; i < kLanes; ++i) std::memcpy(&square[i], at<T>(from, row, element + i), 16);
      V::transpose(square);
      for (int i = 0; i < kLanes; ++i) std::memcpy(at<T>(to, row + i, element), &square[i], 16);
    }
  }
  copy_each<T>(to, from, 0, rows, run, extent.run);
  copy_each<T>(to, from, rows, extent.rows, 0, extent.run);
}

#else

template <typename T>
void copy_transposed(const Plane& to, const Plane& from, Extent extent) {
  copy_each<T>(to, from, 0, extent.rows, 0, extent.run);
}

#endif

Plane transposed(const Plane& plane) { return {plane.data, plane.element, plane.row}; }

template <typename T>
void copy_elements(const Plane& to, const Plane& from, Extent extent) {
  if (to.element == 1 && from.row == 1) {
    copy_transposed<T>(to, from, extent);
  } else if (to.row == 1 && from.element == 1) {
    copy_transposed<T>(transposed(to), transposed(from), {extent.run, extent.rows});
  } else {
    copy_each<T>(to, from, 0, extent.rows, 0, extent.run);
  }
}

struct Wide {  // no register holds 16 bytes of every dtype
  char bytes[16];
};

template <>
void copy_elements<Wide>(const Plane& to, const Plane& from, Extent extent) {
  copy_each<Wide>(to, from, 0, extent.rows, 0, extent.run);
}

void copy(const Plane& to, const Plane& from, Extent extent, int64_t element_size) {
  if (to.element == 1 && from.element == 1) {
    const auto run = static_cast<size_t>(extent.run * element_size);
    for (int64_t row = 0; row < extent.rows; ++row) {
      std::memcpy(to.data + row * to.row * element_size, from.data + row * from.row * element_size,
                  run);
    }
    return;
  }
  switch (element_size) {
    case 1: return copy_elements<uint8_t>(to, from, extent);
    case 2: return copy_elements<uint16_t>(to, from, extent);
    case 4: return copy_elements<uint32_t>(to, from, extent);
    case 8: return copy_elements<uint64_t>(to, from, extent);
    default: return copy_elements<Wide>(to, from, extent);
  }
}

void zero(const Plane& to, Extent extent, int64_t element_size) {
  const int64_t step = to.element * element_size;
  for (int64_t row = 0; row < extent.rows; ++row) {
    char* const run = to.data + row * to.row * element_size;
    if (to.element == 1) {
      std::memset(run, 0, static_cast<size_t>(extent.run * element_size));
      continue;
    }
    for (int64_t i = 0; i < extent.run; ++i) {
      std::memset(run + i * step, 0, static_cast<size_t>(element_size));
    }
  }
}

// ---- tiles --------------------------------------------------------------------------------------

// Tiles of columns: cut in the two innermost dimensions, of size 1 in the others.
struct Tiles {
  const int64_t* sizes;
  Extent extent;  // of a tile, less at the edges
  int64_t across[kColumnDims];
  int64_t count;

  Tiles(const int64_t (&sizes)[kColumnDims], Extent extent)
      : sizes(sizes),
        extent(extent),
        across{sizes[0], sizes[1], (sizes[kInner - 1] + extent.rows - 1) / extent.rows,
               (sizes[kInner] + extent.run - 1) / extent.run},
        count(across[0] * across[1] * across[2] * across[3]) {}
};

struct Tile {
  int64_t first[kColumnDims];
  Extent extent;

  Tile(const Tiles& tiles, int64_t number) {
    for (int dim = kInner; dim >= 0; --dim) {
      first[dim] = number % tiles.across[dim];
      number /= tiles.across[dim];
    }
    first[kInner - 1] *= tiles.extent.rows;
    first[kInner] *= tiles.extent.run;
    extent = {std::min(tiles.extent.rows, tiles.sizes[kInner - 1] - first[kInner - 1]),
              std::min(tiles.extent.run, tiles.sizes[kInner] - first[kInner])};
  }

  Plane in(char* data, const int64_t (&strides)[kColumnDims], int64_t element_size) const {
    int64_t offset = 0;
    for (int dim = 0; dim < kColumnDims; ++dim) offset += first[dim] * strides[dim];
    return {data + offset * element_size, strides[kInner - 1], strides[kInner]};
  }
};

Extent rows_of_runs(const int64_t (&sizes)[kColumnDims], int64_t element_size) {
  const int64_t elements = kTileBytes / element_size;
  const int64_t run = std::clamp<int64_t>(sizes[kInner], 1, elements);
  return {std::clamp<int64_t>(sizes[kInner - 1], 1, elements / run), run};
}

Tiles interior_tiles(const FrameCacheAppend& append) {
  for (const FrameView* view : {&append.cache, &append.frames, &append.joined}) {
    if (view->data != nullptr && view->strides[kInner] != 1) {
      return Tiles(append.sizes, {kTileSide, kTileSide});
    }
  }
  return Tiles(append.sizes, rows_of_runs(append.sizes, append.element_size));
}

// ---- append -------------------------------------------------------------------------------------

// Copies a tile in all frames.
void append_tile(const FrameCacheAppend& append, const Tile& tile) {
  const auto in_frame = [&](const FrameView& view, int64_t t) {
    char* const data = view.data + t * view.frame_stride * append.element_size;
    return tile.in(data, view.strides, append.element_size);
  };
  const auto put = [&](const Plane& to, int64_t t) {
    if (t < append.cache_len && append.past == Past::kZeros) {
      zero(to, tile.extent, append.element_size);
    } else {
      const bool cached = t < append.cache_len && append.past == Past::kCache;
      const Plane from = cached
                             ? in_frame(append.cache, t)
                             : in_frame(append.frames, std::max<int64_t>(0, t - append.cache_len));
      copy(to, from, tile.extent, append.element_size);
    }
  };
  // Without a chunk the cache does not change, unless the clip begins.
  const bool moves = append.chunk_len > 0 || append.past != Past::kCache;
  for (int64_t t = append.skipped; t < append.cache_len + append.chunk_len; ++t) {
    if (t < append.joined_len) put(in_frame(append.joined, t), t);
    if (t >= append.chunk_len && moves) put(in_frame(append.cache, t - append.chunk_len), t);
  }
}

Tiles tiles_of(const FrameCacheAppend& append, const Border& border) {
  return Tiles(border.sizes, rows_of_runs(border.sizes, append.element_size));
}

void zero_tile(const FrameCacheAppend& append, const Border& border, const Tile& tile) {
  for (int64_t t = 0; t < append.joined_len; ++t) {
    char* const data = border.data + t * append.joined.frame_stride * append.element_size;
    zero(tile.in(data, border.strides, append.element_size), tile.extent, append.element_size);
  }
}

// One parallel loop over all tiles, of the interior, then of the borders: starting threads costs.
void run_on_cpu(const FrameCacheAppend& append, int32_t /*device*/) {
  const Tiles interior = interior_tiles(append);
  int64_t count = interior.count;
  for (const Border& border : append.borders) count += tiles_of(append, border).count;
  const Extent& tile = interior.extent;
  const int64_t tile_bytes = tile.rows * tile.run * append.element_size * append.steps();
  const int64_t grain = std::max<int64_t>(1, kBytesPerTask / tile_bytes);
  torch::stable::parallel_for(0, count, grain, [&](int64_t number, int64_t end) {
    for (; number < std::min(end, interior.count); ++number) {
      append_tile(append, Tile(interior, number));
    }
    int64_t first = interior.count;
    for (const Border& border : append.borders) {
      const Tiles tiles = tiles_of(append, border);
      for (; number < std::min(end, first + tiles.count); ++number) {
        zero_tile(append, border, Tile(tiles, number - first));
      }
      first += tiles.count;
    }
  });
}

using Ops = FrameCacheOps<run_on_cpu>;

}  // namespace
}  // namespace cogvx

STABLE_TORCH_LIBRARY_IMPL(cogvx, CPU, m) {
  m.impl("frame_cache_append", TORCH_BOX(&cogvx::Ops::append));
  m.impl("frame_cache_push", TORCH_BOX(&cogvx::Ops::push));
}
