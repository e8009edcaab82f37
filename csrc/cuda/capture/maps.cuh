// The second launch of capture: probabilities at the tokens, their mean over the heads, mass and entropy.
#pragma once

#include "cuda/capture/stats.cuh"

namespace carve {
namespace {

template <typename S>
struct MapsShared {
  Tile<S> tile;
  float mean[S::kSlots * kMaxRows];
  float tops[kTile];
  float factors[kTile];
  int keys[S::kSlots];
  float partial[kWarps];
  int counts[kWarps];
  bool is_last;
};

// Merges a maximum and a sum with another such pair. fmaxf ignores NaN and sums do not: the sum of a pair may be NaN
// although its maximum is -inf, so such a pair is added like any other.
__device__ __forceinline__ void merge_stats(float other_top, float other_sum, float& top, float& sum) {
  const float larger = fmaxf(top, other_top), offset = larger == -INFINITY ? 0.0f : larger;
  sum = sum * exponential(top, offset) + other_sum * exponential(other_top, offset);
  top = larger;
}

// Merges the splits of each query of a tile, by eight threads per query, to its maximum and the inverse of its sum.
template <typename S>
__device__ __forceinline__ void merge_splits(const CaptureLaunch& launch, const CaptureLayer& layer, int64_t batch,
                                             const TileQueries& part, MapsShared<S>& shared) {
  constexpr int kEach = kThreads / kTile;
  const CaptureParams& p = launch.params;
  const int line = threadIdx.x / kEach, member = threadIdx.x % kEach;
  const int head = part.head + line / part.stride, query = part.begin + line % part.stride;
  const bool used = line / part.stride < part.heads && line % part.stride < part.count && head < p.key_heads;
  const int rows = static_cast<int>(p.rows);
  const int64_t at = used ? head * (p.heads / p.key_heads) + query / rows : 0, row = query % rows;
  float top = -INFINITY, sum = 0.0f;
  if (used && p.lse == nullptr) {
    const float2* stats = stats_of(launch, batch, at, row);
    for (int split = member; split < launch.splits; split += kEach) {
      const float2 other = load(stats + split);
      merge_stats(other.x, other.y, top, sum);
    }
    if (member == 0 && layer.sink != nullptr) {
      merge_stats(load(layer.sink + at), 1.0f, top, sum);
    }
  } else if (used && member == 0) {
    top = load(p.lse + (batch * p.heads + at) * p.rows + row);
    sum = top == -INFINITY ? 0.0f : 1.0f;
  }
#pragma unroll
  for (int distance = kEach / 2; distance > 0; distance /= 2) {
    const float other_top = __shfl_xor_sync(kAllLanes, top, distance);
    const float other_sum = __shfl_xor_sync(kAllLanes, sum, distance);
    merge_stats(other_top, other_sum, top, sum);
  }
  if (member == 0) {
    shared.tops[line] = top == -INFINITY ? 0.0f : top;
    shared.factors[line] = sum == 0.0f ? 0.0f : 1.0f / sum;
  }
}

// The outputs of this block's layer and batch row, in the current step.
struct Outputs {
  bool exist;  // false if the step is out of range
  float* maps;
  float* mass;
  float* entropy;
};

__device__ __forceinline__ Outputs outputs_of(const CaptureLaunch& launch, const CaptureLayer& layer, int64_t batch) {
  const CaptureParams& p = launch.params;
  const CaptureDevice& d = launch.device;
  const int64_t step = d.step == nullptr ? 0 : load_uniform(d.step);
  if (step < 0 || step >= d.steps) return {false, nullptr, nullptr, nullptr};
  return {true, layer.maps + step * d.step_strides[0] + batch * p.maps_strides[0],
          layer.mass + step * d.step_strides[1] + batch * p.mass_strides[0],
          layer.entropy + step * d.step_strides[2] + batch * p.entropy_strides[0]};
}

// Turns scores into probabilities, for each query of the tile and each (key head, token) of the block.
template <typename S>
__device__ __forceinline__ void fill_values(const CaptureLaunch& launch, const TileQueries& part, int batch, int first,
                                            const float (&keys)[kUnroll][S::kElements], float* maps,
                                            MapsShared<S>& shared) {
  const CaptureParams& p = launch.params;
  const int rows = static_cast<int>(p.rows), group = static_cast<int>(p.heads / p.key_heads);
  const int tokens = S::kSlots / launch.heads_at_once, slot = threadIdx.x / S::kLanes * kUnroll;
  const int local = slot / tokens, head = part.head + local;
  for (int start = 0; start < part.count; start += kAtOnce) {
    LaneSums<S> sums;
    sums.multiply(shared.tile.queries + local * part.stride + start, keys);
    sums.add_lanes();
#pragma unroll
    for (int i = 0; i < LaneSums<S>::kKept; ++i) {
      const int number = sums.first() + i, index = start + number / kUnroll, at = slot + number % kUnroll;
      if (!sums.writes() || index >= part.count) continue;
      const int query = part.begin + index, token = at % tokens, key = shared.keys[token];
      const int query_head = head * group + query / rows, row = query % rows;
      float value = 0.0f;
      if (head < p.key_heads && key >= 0 && visible_to(p, batch, query_head, row).at(key)) {
        const int line = local * part.stride + index;
        value = exponential(logit(p, sums.values[i]), shared.tops[line]) * shared.factors[line];
      }
      shared.tile.values[index][at] = value;
      if (p.each && head < p.key_heads && first + token < p.token_count) {
        store(maps + query_head * p.maps_strides[1] + row * p.maps_strides[2] +
                  (first + token) * launch.device.token_stride, value);
      }
    }
  }
}

// Adds the heads of a tile to the sums of each token and row; the same thread owns a sum in all tiles.
template <typename S>
__device__ __forceinline__ void add_heads(const TileQueries& part, int tokens, int rows, MapsShared<S>& shared) {
  for (int item = threadIdx.x; item < tokens * rows; item += kThreads) {
    const int token = item % tokens, row = item / tokens;
    // The first query of the tile that belongs to this row.
    const int start = (row - part.begin % rows + rows) % rows;
    float sum = part.head == 0 && part.begin == 0 ? 0.0f : shared.mean[item];
    for (int local = 0; local < part.heads; ++local) {
      for (int index = start; index < part.count; index += rows) {
        sum += shared.tile.values[index][local * tokens + token];
      }
    }
    shared.mean[item] = sum;
  }
}

// The sum of `value` over all threads of a row's warps; it does not depend on the order of blocks and warps.
__device__ __forceinline__ float row_total(float value, int row, int warps, float (&partial)[kWarps]) {
  value = warp_sum(value);
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = value;
  __syncthreads();
  float total = 0.0f;
  for (int warp = 0; warp < warps; ++warp) total += partial[row * warps + warp];
  __syncthreads();
  return total;
}

// Mass and entropy of every row, by the last block of a batch row; the rows share its 8 warps.
template <typename S>
__device__ __forceinline__ void summarize(const CaptureParams& p, const float* mean, int64_t row_stride,
                                          int64_t token_stride, int batch, const Outputs& out, MapsShared<S>& shared) {
  const int rows = static_cast<int>(p.rows), warp = threadIdx.x / 32;
  const int warps = rows == 1 ? 8 : rows == 2 ? 4 : rows <= 4 ? 2 : 1;
  const int row = warp / warps;
  const int64_t start = warp % warps * 32 + threadIdx.x % 32, end = row < rows ? p.token_count : 0;
  const float* from = mean + row * row_stride;
  float part = 0.0f, used = 0.0f;
  for (int64_t token = start; token < end; token += warps * 32) {
    part += load_coherent(from + token * token_stride);
    const int64_t key = index_at(p.tokens, batch, token);
    used += key >= 0 && key < p.keys ? 1.0f : 0.0f;
  }
  const float mass = row_total(part, row, warps, shared.partial);
  const float count = row_total(used, row, warps, shared.partial);
  part = 0.0f;
  for (int64_t token = start; token < end && mass != 0.0f; token += warps * 32) {
    const float share = load_coherent(from + token * token_stride) / mass;
    if (!(share <= 0.0f)) part -= share * logf(share);
  }
  const float entropy = row_total(part, row, warps, shared.partial);
  if (threadIdx.x % (32 * warps) != 0 || row >= rows) return;
  store(out.mass + row * p.mass_strides[1], mass);
  store(out.entropy + row * p.entropy_strides[1], count < 2.0f || mass == 0.0f ? 0.0f : entropy / logf(count));
}

// A block: some tokens, all heads and rows. Grid: [batch x token blocks, 1, layers]. It processes up to 8 key heads at
// a time, so that 32 key heads take the latency of 4 iterations, not 32. At D = 128 and 4 key heads a block has 16
// tokens: 36 blocks per layer for 576 tokens.
template <typename S>
__global__ void __launch_bounds__(kThreads, 2) capture_maps(const __grid_constant__ CaptureLaunch launch) {
  using T = typename S::Element;
  MapsShared<S>& shared = block_shared<MapsShared<S>>();
  const CaptureParams& p = launch.params;
  const CaptureLayer& layer = launch.layers[blockIdx.z];
  const int block = blockIdx.x % launch.token_blocks, batch = blockIdx.x / launch.token_blocks;
  const int rows = static_cast<int>(p.rows), queries = static_cast<int>(p.heads / p.key_heads) * rows;
  const int at_once = launch.heads_at_once, tokens = S::kSlots / at_once, stride = kTile / at_once;
  const int first = block * tokens, slot = threadIdx.x / S::kLanes * kUnroll;
  const Outputs out = outputs_of(launch, layer, batch);
  if (!out.exist) return;
  for (int token = threadIdx.x; token < tokens; token += kThreads) {
    const int64_t key = first + token < p.token_count ? index_at(p.tokens, batch, first + token) : -1;
    shared.keys[token] = key >= 0 && key < p.keys ? static_cast<int>(key) : -1;
  }
  __syncthreads();

  for (int head = 0; head < p.key_heads; head += at_once) {
    const int key_head = head + slot / tokens;
    const T* from = static_cast<const T*>(layer.key) + batch * layer.key_strides[0] + key_head * layer.key_strides[1];
    const T* keys_at[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int key = shared.keys[(slot + u) % tokens];
      keys_at[u] = key >= 0 && key_head < p.key_heads ? from + key * layer.key_strides[2] : nullptr;
    }
    float keys[kUnroll][S::kElements];
    load_keys<S>(keys_at, launch.aligned, static_cast<int>(p.size), keys);
    for (int begin = 0; begin < queries; begin += stride) {
      const TileQueries part{head, at_once, begin, min(stride, queries - begin), stride};
      stage_queries<S>(p, layer, batch, part, shared.tile);
      merge_splits<S>(launch, layer, batch, part, shared);
      __syncthreads();
      fill_values<S>(launch, part, batch, first, keys, out.maps, shared);
      __syncthreads();
      add_heads<S>(part, tokens, rows, shared);
      __syncthreads();
    }
  }

  float* mean = p.each ? launch.mean + (blockIdx.z * p.batch + batch) * p.rows * p.token_count : out.maps;
  const int64_t row_stride = p.each ? p.token_count : p.maps_strides[2];
  const int64_t token_stride = p.each ? 1 : launch.device.token_stride;
  for (int item = threadIdx.x; item < tokens * rows; item += kThreads) {
    const int64_t token = first + item % tokens;
    if (token >= p.token_count) continue;
    store(mean + item / tokens * row_stride + token * token_stride, shared.mean[item] / static_cast<float>(p.heads));
  }
  // After the barrier, the fence of one thread makes the stores of all visible to the block with the last ticket.
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    const unsigned ticket = atomicAdd(launch.tickets + blockIdx.z * p.batch + batch, 1u);
    __threadfence();
    shared.is_last = ticket + 1 == static_cast<unsigned>(launch.token_blocks);
  }
  __syncthreads();
  if (shared.is_last) summarize<S>(p, mean, row_stride, token_stride, batch, out, shared);
}

}  // namespace
}  // namespace carve
