// The first launch of capture: maximum and sum of every query, for each split of the keys.
#pragma once

#include "cuda/capture/tile.cuh"

namespace carve {
namespace {

constexpr int kWarps = kThreads / 32;

__device__ __forceinline__ float2* stats_of(const CaptureLaunch& launch, int64_t batch, int64_t head, int64_t row) {
  const CaptureParams& p = launch.params;
  const int64_t line = ((blockIdx.z * p.batch + batch) * p.heads + head) * p.rows + row;
  return launch.stats + line * launch.splits;
}

// Clips a split to the keys that positions and window make visible to any row; empty where last <= first.
__device__ __forceinline__ void clip_to_visible(const CaptureParams& p, int64_t batch, int64_t& first, int64_t& last) {
  if (p.positions.data == nullptr) return;
  int64_t low = last, high = first;
  for (int64_t row = 0; row < p.rows; ++row) {
    const Visible visible = visible_to(p, batch, 0, row);
    low = visible.first < low ? visible.first : low;
    high = visible.last > high ? visible.last : high;
  }
  first = low > first ? low : first;
  last = high < last ? high : last;
}

// Maximum and sum of one query over the keys of an iteration, merged with those of the previous iterations.
template <typename S>
__device__ __forceinline__ void sum_row(const CaptureParams& p, const float (&scores)[S::kSlots],
                                        const Visible& visible, int64_t first, int64_t last, float2* stats,
                                        bool is_first) {
  const int lane = threadIdx.x % 32;
  float2 before = make_float2(-INFINITY, 0.0f);
  if (lane == 0 && !is_first) before = load_coherent(stats);
  float logits[S::kSlots / 32];
  float top = -INFINITY;
#pragma unroll
  for (int i = 0; i < S::kSlots / 32; ++i) {
    const int64_t key = first + i * 32 + lane;
    logits[i] = key < last && visible.at(key) ? logit(p, scores[i * 32 + lane]) : -INFINITY;
    top = fmaxf(top, logits[i]);
  }
  top = fmaxf(warp_max(top), __shfl_sync(kAllLanes, before.x, 0));
  const float offset = top == -INFINITY ? 0.0f : top;
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < S::kSlots / 32; ++i) sum += exponential(logits[i], offset);
  sum = warp_sum(sum);
  if (lane == 0) store(stats, make_float2(top, sum + before.y * exponential(before.x, offset)));
}

// A block: one split of the keys of one key head, all rows of its group.
// Grid: [batch x key heads x splits, 1, layers].
template <typename S>
__global__ void __launch_bounds__(kThreads, 2) capture_stats(const __grid_constant__ CaptureLaunch launch) {
  using T = typename S::Element;
  Tile<S>& tile = block_shared<Tile<S>>();
  const CaptureParams& p = launch.params;
  const CaptureLayer& layer = launch.layers[blockIdx.z];
  const int split = blockIdx.x % launch.splits, unit = blockIdx.x / launch.splits;
  const int head = unit % static_cast<int>(p.key_heads), batch = unit / static_cast<int>(p.key_heads);
  const int rows = static_cast<int>(p.rows), group = static_cast<int>(p.heads / p.key_heads);
  const int queries = group * rows, slot = threadIdx.x / S::kLanes * kUnroll;
  if (split == 0 && head == 0 && threadIdx.x == 0) store(launch.tickets + blockIdx.z * p.batch + batch, 0u);

  int64_t first = split * launch.split_keys;
  int64_t last = first + launch.split_keys < p.keys ? first + launch.split_keys : p.keys;
  clip_to_visible(p, batch, first, last);
  const T* from = static_cast<const T*>(layer.key) + batch * layer.key_strides[0] + head * layer.key_strides[1];
  // At least once: a split without visible keys has results, too.
  bool is_first = true;
  do {
    const T* keys_at[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      keys_at[u] = first + slot + u < last ? from + (first + slot + u) * layer.key_strides[2] : nullptr;
    }
    float keys[kUnroll][S::kElements];
    load_keys<S>(keys_at, launch.aligned, static_cast<int>(p.size), keys);
    for (int begin = 0; begin < queries; begin += kTile) {
      const TileQueries part{head, 1, begin, min(kTile, queries - begin), kTile};
      __syncthreads();
      if (is_first || queries > kTile) stage_queries<S>(p, layer, batch, part, tile);
      __syncthreads();
      for (int at = 0; at < part.count; at += kAtOnce) {
        LaneSums<S> sums;
        sums.multiply(tile.queries + at, keys);
        sums.add_lanes();
#pragma unroll
        for (int i = 0; i < LaneSums<S>::kKept; ++i) {
          const int index = sums.first() + i;
          if (sums.writes()) tile.values[at + index / kUnroll][slot + index % kUnroll] = sums.values[i];
        }
      }
      __syncthreads();
      for (int index = threadIdx.x / 32; index < part.count; index += kWarps) {
        const int query = begin + index, at = head * group + query / rows;
        sum_row<S>(p, tile.values[index], visible_to(p, batch, at, query % rows), first, last,
                   stats_of(launch, batch, at, query % rows) + split, is_first);
      }
    }
    is_first = false;
    first += S::kSlots;
  } while (first < last);
}

}  // namespace
}  // namespace carve
