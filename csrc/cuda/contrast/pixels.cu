// The second kernel of contrast: the chunks of the grid added up and normalized, and resized to the pixels of each view.

#include "cuda/contrast/contrast.cuh"

namespace carve {
namespace {

constexpr int kChunksAtOnce = 8;
constexpr int kTapsAtOnce = 2;

struct PixelsShared {
  float low[kContrastWarps];
  float high[kContrastWarps];
  float sum[kContrastWarps];
  float blended[1];  // [rows, most_cells]: rows of pixels, of which the columns are still cells
};

// Bilinear weights of an axis, widened by the scale where the axis shrinks: those of the triangle filter, times twice
// the cells and pixels, so that they are exact integers.
struct Axis {
  int cells, pixels;

  __device__ __forceinline__ int longer() const { return cells > pixels ? cells : pixels; }
  // Two where the axis grows, cells / pixels on each side where it shrinks.
  __device__ __forceinline__ int taps() const { return (2 * longer() + pixels - 1) / pixels; }
  // The first cell that has a weight.
  __device__ __forceinline__ int first(int pixel) const {
    const int beyond = (2 * pixel + 1) * cells - 2 * longer() - pixels;
    return beyond < 0 ? 0 : beyond / (2 * pixels) + 1;
  }
  __device__ __forceinline__ float weight(int cell, int pixel) const {
    const int distance = (2 * cell + 1) * pixels - (2 * pixel + 1) * cells;
    const int inside = 2 * longer() - (distance < 0 ? -distance : distance);
    return cell < cells && inside > 0 ? static_cast<float>(inside) : 0.0f;
  }
};

// What normalizing subtracts, and its divisor: 0 where the result is 0 everywhere.
struct Range {
  float low;
  float span;

  __device__ __forceinline__ float apply(float value) const { return span > 0.0f ? value / span : 0.0f; }
};

// Propagates NaN, so that every span is NaN, too.
__device__ __forceinline__ float higher(float a, float b) { return b > a || b != b ? b : a; }

// A value of the grid: its chunks, in a fixed order.
__device__ __forceinline__ float add_chunks(const PixelsLaunch& launch, int token) {
  float sum = 0.0f;
#pragma unroll 1
  for (int chunk = 0; chunk < launch.chunks; chunk += kChunksAtOnce) {
    const float* from = launch.partials + int64_t{chunk} * launch.tokens + token;
    float parts[kChunksAtOnce];
#pragma unroll
    for (int i = 0; i < kChunksAtOnce; ++i) {
      parts[i] = 0.0f;
      if (chunk + i < launch.chunks) parts[i] = load_coherent(from);
      from += launch.tokens;
    }
#pragma unroll
    for (int i = 0; i < kChunksAtOnce; ++i) sum += parts[i];
  }
  return sum;
}

// Every block finds the range of the whole grid by itself, in the same order.
__device__ __forceinline__ Range range_of(const PixelsLaunch& launch, PixelsShared& shared) {
  float low = INFINITY, high = -INFINITY, sum = 0.0f;
#pragma unroll 1
  for (int token = threadIdx.x; token < launch.tokens; token += kContrastThreads) {
    const float value = add_chunks(launch, token);
    low = fminf(low, value), high = higher(high, value), sum += value;
  }
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) {
    low = fminf(low, __shfl_xor_sync(kAllLanes, low, distance));
    high = higher(high, __shfl_xor_sync(kAllLanes, high, distance));
    sum += __shfl_xor_sync(kAllLanes, sum, distance);
  }
  if (threadIdx.x % 32 == 0) {
    shared.low[threadIdx.x / 32] = low, shared.high[threadIdx.x / 32] = high, shared.sum[threadIdx.x / 32] = sum;
  }
  __syncthreads();
  low = shared.low[0], high = shared.high[0], sum = shared.sum[0];
#pragma unroll
  for (int warp = 1; warp < kContrastWarps; ++warp) {
    low = fminf(low, shared.low[warp]), high = higher(high, shared.high[warp]), sum += shared.sum[warp];
  }
  if (launch.normalize == Normalize::kSum) return {0.0f, sum};
  return launch.normalize == Normalize::kMax ? Range{0.0f, high} : Range{low, high - low};
}

// The cells above and below a row of pixels, in one column of cells. A cell without weight does not count: it may be
// NaN, or no cell of this view, and the first one is read instead.
__device__ __forceinline__ float blend(const PixelsLaunch& launch, const PixelView& view, int y, int column,
                                       float low) {
  const Axis axis{view.grid_h, view.height};
  const int first = axis.first(y), taps = axis.taps();
  const float* cell = launch.partials + view.first_token + first * view.grid_w + column;
  float sum = 0.0f, total = 0.0f;
#pragma unroll 1
  for (int tap = 0; tap < taps; tap += kTapsAtOnce) {
    float weights[kTapsAtOnce], cells[kTapsAtOnce] = {};
    const float* from[kTapsAtOnce];
#pragma unroll
    for (int t = 0; t < kTapsAtOnce; ++t) {
      weights[t] = axis.weight(first + tap + t, y);
      from[t] = weights[t] > 0.0f ? cell + (tap + t) * view.grid_w : cell;
    }
#pragma unroll 1
    for (int chunk = 0; chunk < launch.chunks; chunk += kChunksAtOnce) {
      float parts[kTapsAtOnce][kChunksAtOnce];
#pragma unroll
      for (int i = 0; i < kChunksAtOnce; ++i) {
#pragma unroll
        for (int t = 0; t < kTapsAtOnce; ++t) {
          parts[t][i] = 0.0f;
          if (chunk + i < launch.chunks) parts[t][i] = load_coherent(from[t]);
          from[t] += launch.tokens;
        }
      }
#pragma unroll
      for (int t = 0; t < kTapsAtOnce; ++t) {
#pragma unroll
        for (int i = 0; i < kChunksAtOnce; ++i) cells[t] += parts[t][i];
      }
    }
#pragma unroll
    for (int t = 0; t < kTapsAtOnce; ++t) {
      sum = fmaf(weights[t], weights[t] > 0.0f ? cells[t] - low : 0.0f, sum);
      total += weights[t];
    }
  }
  return sum / total;
}

// The two cells of a pixel where the axis grows, from the first of the tile on, and their shares.
struct Pair {
  int near;
  float near_share, far_share;

  __device__ __forceinline__ Pair(const Axis& axis, int pixel, int first_cell) {
    const int first = axis.first(pixel);
    const float near_weight = axis.weight(first, pixel), far_weight = axis.weight(first + 1, pixel);
    near = first - first_cell;
    const float scale = 1.0f / (near_weight + far_weight);
    near_share = computed(near_weight * scale), far_share = computed(far_weight * scale);
  }

  __device__ __forceinline__ float of(const float* cells) const {
    // 0 * NaN is NaN: instead of a cell without weight, read the one that has all of it.
    return fmaf(near_share, cells[near], far_share * cells[far_share > 0.0f ? near + 1 : near]);
  }
};

// A pixel of a row that shrinks.
__device__ __forceinline__ float reduce(const Axis& axis, int pixel, int first_cell, const float* cells) {
  const int first = axis.first(pixel), taps = axis.taps();
  float sum = 0.0f, total = 0.0f;
#pragma unroll 1
  for (int cell = first; cell < first + taps; ++cell) {
    const float weight = axis.weight(cell, pixel);
    if (weight > 0.0f) sum = fmaf(weight, cells[cell - first_cell], sum);
    total += weight;
  }
  return sum / total;
}

__device__ __forceinline__ const PixelView& view_of_block(const PixelsLaunch& launch) {
  int index = 0;
  while (index + 1 < launch.views && static_cast<int>(blockIdx.x) >= launch.view[index + 1].first_block) ++index;
  return launch.view[index];
}

// A block: a tile of pixels of one view. Rows of cells become rows of pixels in shared memory, then columns do. A
// thread has four columns and, from its first row on, every so many rows.
__global__ void __launch_bounds__(kContrastThreads, 3) contrast_pixels(const __grid_constant__ PixelsLaunch launch) {
  start_next_launch();
  PixelsShared& shared = block_shared<PixelsShared>();
  const PixelView& view = view_of_block(launch);
  const int tile = static_cast<int>(blockIdx.x) - view.first_block, thread = static_cast<int>(threadIdx.x);
  const int quads = view.quads, tile_y = tile / view.across;
  const int top = tile_y * view.rows, bottom = min(top + view.rows, view.height);
  const int left = (tile - tile_y * view.across) * kQuad * quads, right = min(left + kQuad * quads, view.width);
  const Axis axis{view.grid_w, view.width};
  const int first_cell = axis.first(left);
  const int cells = min(axis.first(right - 1) + axis.taps(), view.grid_w) - first_cell;
  const bool grows = view.width >= view.grid_w;
  const int at_once = kContrastThreads / quads, own_row = thread / quads, quad = thread - own_row * quads;
  // Neighbouring pixels, or else neighbouring threads have neighbouring pixels.
  const int start = left + (view.is_vector ? kQuad * quad : quad), by = view.is_vector ? 1 : quads;
  const Pair pairs[kQuad] = {
      Pair(axis, min(start, right - 1), first_cell), Pair(axis, min(start + by, right - 1), first_cell),
      Pair(axis, min(start + 2 * by, right - 1), first_cell), Pair(axis, min(start + 3 * by, right - 1), first_cell)};

  // What follows depends on the first kernel; all before it does not.
  wait_for_launch();
  Range range{0.0f, 0.0f};
  const bool is_normalized = launch.normalize != Normalize::kNone;
  if (is_normalized) range = range_of(launch, shared);
#pragma unroll 1
  for (int item = thread; item < (bottom - top) * cells; item += kContrastThreads) {
    const int row = item / cells, column = item - row * cells;
    float value = blend(launch, view, top + row, first_cell + column, range.low);
    if (is_normalized) value = range.apply(value);
    shared.blended[row * view.most_cells + column] = value;
  }
  __syncthreads();
  if (own_row >= at_once) return;
#pragma unroll 1
  for (int y = top + own_row; y < bottom; y += at_once) {
    const float* row = shared.blended + (y - top) * view.most_cells;
    float* to = view.out + int64_t{y} * view.width + start;
    if (!grows) {
#pragma unroll 1
      for (int i = 0; i < kQuad && start + i * by < right; ++i) {
        store(to + i * by, reduce(axis, start + i * by, first_cell, row));
      }
      continue;
    }
    float values[kQuad];
#pragma unroll
    for (int i = 0; i < kQuad; ++i) values[i] = pairs[i].of(row);
    if (view.is_vector) {
      if (start < right) {
        store(reinterpret_cast<float4*>(to), make_float4(values[0], values[1], values[2], values[3]));
      }
      continue;
    }
#pragma unroll
    for (int i = 0; i < kQuad; ++i) {
      if (start + i * by < right) store(to + i * by, values[i]);
    }
  }
}

}  // namespace

void launch_pixels(const PixelsLaunch& launch, int64_t blended, const ContrastGrid& how) {
  const size_t bytes = sizeof(PixelsShared) + sizeof(float) * static_cast<size_t>(blended);
  carve::launch({"contrast_pixels", how.blocks, kContrastThreads, bytes, how.stream, how.overlaps},
                contrast_pixels, launch);
}

}  // namespace carve
