// The first kernel: it reads each key once, and leaves the scores of the keys around the tokens and, for each split of
// the keys, the maximum and the sum of every query. Each element type has a source file that includes this.
#pragma once

#include <algorithm>

#include "cuda/capture/hide.cuh"
#include "cuda/capture/merge.cuh"
#include "cuda/launch.cuh"

namespace carve {
namespace {

// How many queries of a key head a block takes: up to 8, whose statistics stay in registers; up to 64; up to 256, two
// tiles at a time, whose independent instructions hide the latency that more blocks would. kBlocks run on a
// multiprocessor.
struct Few {
  static constexpr int kAtOnce = 1;
  static constexpr int kMostTiles = 1;
  static constexpr int kTiles = 1;
  static constexpr int kHalves = 1;
  static constexpr int kBlocks = 3;
};
struct Some {
  static constexpr int kAtOnce = 4;
  static constexpr int kMostTiles = 4;
  static constexpr int kTiles = 1;
  static constexpr int kHalves = 2;
  static constexpr int kBlocks = 3;
};
struct Many {
  static constexpr int kAtOnce = 4;
  static constexpr int kMostTiles = 16;
  static constexpr int kTiles = 2;
  static constexpr int kHalves = 2;
  static constexpr int kBlocks = 2;
};

// Shared memory of a block: queries of A; a maximum and a sum for both halves of a tile and lane; what the queries see.
// The maxima and sums of the warps replace the queries in the end.
template <typename S>
struct StreamShared {
  int tiles;

  __device__ __forceinline__ uint4* staged() const { return &block_shared<uint4>(); }
  __device__ __forceinline__ float4* states() const {
    return reinterpret_cast<float4*>(staged() + tiles * S::kTileWords);
  }
  __device__ __forceinline__ StreamQuery* queries() const {
    return reinterpret_cast<StreamQuery*>(states() + tiles * kThreads);
  }
  __device__ __forceinline__ float2* parts() const { return reinterpret_cast<float2*>(staged()); }
};

template <typename S>
size_t stream_bytes(int tiles) {
  return tiles * (S::kTileWords * sizeof(uint4) + kThreads * sizeof(float4) + 16 * sizeof(StreamQuery));
}

// The keys that any row of the launch sees, of those from `begin` to `end` - 1; by every warp for itself.
__device__ __forceinline__ void clip_to_visible(const CaptureParams& p, int batch, int& begin, int& end) {
  if (p.positions.data == nullptr) return;
  int first = end, last = begin - 1;
#pragma unroll 1
  for (int row = threadIdx.x % 32; row < static_cast<int>(p.rows); row += 32) {
    const Visible visible = visible_to(p, batch, row);
    first = min(first, visible.first), last = max(last, visible.last);
  }
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) {
    first = min(first, __shfl_xor_sync(kAllLanes, first, distance));
    last = max(last, __shfl_xor_sync(kAllLanes, last, distance));
  }
  begin = max(begin, first), end = min(end, last + 1);
}

template <int kScores>
__device__ __forceinline__ void add_scores(const float (&scores)[kScores], float factor, float& top, float& sum) {
  float largest[kScores];
#pragma unroll
  for (int n = 0; n < kScores; ++n) largest[n] = scores[n];
#pragma unroll
  for (int half = kScores / 2; half > 0; half /= 2) {
#pragma unroll
    for (int n = 0; n < half; ++n) largest[n] = fmaxf(largest[n], largest[n + half]);
  }
  const float larger = fmaxf(top, largest[0] * factor);
  float sums[4] = {};
#pragma unroll
  for (int n = 0; n < kScores; ++n) sums[n % 4] += exp2_fast(fmaf(scores[n], factor, -larger));
  sum = sum * exp2_fast(top - larger) + ((sums[0] + sums[1]) + (sums[2] + sums[3]));
  top = larger;
}

// A block: one split of the keys of one key head, and some of its queries. Grid: [splits, key heads x query blocks,
// layers x batch].
template <typename S, typename Q, bool kGeneral>
__global__ void __launch_bounds__(kThreads, Q::kBlocks) capture_stream(const __grid_constant__ CaptureLaunch launch) {
  using T = typename S::Element;
  start_next_launch();
  const CaptureParams& p = launch.params;
  const Problem problem(launch);
  const Lane lane;
  const int query_block = launch.query_blocks == 1 ? 0 : static_cast<int>(blockIdx.y) / launch.key_heads;
  const int key_head = static_cast<int>(blockIdx.y) - query_block * launch.key_heads;
  const int first_query = query_block * launch.queries_at_once;
  const int rows = launch.rows, group = launch.group;
  const int count = min(launch.queries_at_once, group * rows - first_query);
  const int tiles = Q::kMostTiles == 1 ? 1 : (count + 16 * Q::kTiles - 1) / (16 * Q::kTiles) * Q::kTiles;
  const StreamShared<S> shared{tiles};

  const CaptureLayer& layer = problem.arguments;
  const KeyRows key_rows(static_cast<const T*>(layer.key) + problem.batch * layer.key_strides[0] +
                             key_head * layer.key_strides[1],
                         layer.key_strides[2]);
  const int last_key = launch.keys - 1, size = launch.size;
  int base = static_cast<int>(blockIdx.x) * launch.split_keys, end = min(base + launch.split_keys, last_key + 1);
  int first = base;
  clip_to_visible(p, problem.batch, first, end);
  if (first > base) base += (first - base) / S::kBlockKeys * S::kBlockKeys;
  base += lane.warp * S::kTileKeys;
  uint4 keys[S::kKeyTiles][S::kPieces];
  const auto load_tile = [&](int start) {
    load_keys<S, !kGeneral>(key_rows, [&](int column) { return min(start + column, last_key); }, size, keys);
  };
  if (base < end) load_tile(base);

  const auto place = [&](int number, int& head, int& row) {
    split_query(launch, first_query + number, head, row);
    head += key_head * group;
    return number < count;
  };
  stage_queries<S, Q::kAtOnce, Q::kHalves>(launch, problem, tiles, place, shared.staged());
#pragma unroll 1
  for (int number = threadIdx.x; number < tiles * 16; number += kThreads) {
    StreamQuery query{-1, {0, last_key}};
    int head, row;
    if (place(number, head, row)) query = {problem.line(launch, head, row), visible_to(p, problem.batch, row)};
    shared.queries()[number] = query;
  }
  if constexpr (Q::kMostTiles > 1) {
#pragma unroll 1
    for (int tile = 0; tile < tiles; ++tile) {
      shared.states()[tile * kThreads + threadIdx.x] = make_float4(kLowest, 0.0f, kLowest, 0.0f);
    }
  }
  int low = 0, high = -1;
  if (launch.span != nullptr) low = load(launch.span), high = load(launch.span + 1);
  const float factor = launch.logit.factor;
  float4 few = make_float4(kLowest, 0.0f, kLowest, 0.0f);
  __syncthreads();

  while (base < end) {
    const int next = base + S::kBlockKeys;
    const bool is_kept = base <= high && base + S::kTileKeys - 1 >= low;
#pragma unroll 1
    for (int tile = 0; tile < tiles; tile += Q::kTiles) {
      float scores[Q::kTiles][2][S::kScores];
      multiply<S, Q::kTiles>(keys, shared.staged() + tile * S::kTileWords, scores);
      if (tile + Q::kTiles >= tiles && next < end) load_tile(next);
#pragma unroll
      for (int i = 0; i < Q::kTiles; ++i) {
#pragma unroll
        for (int h = 0; h < Q::kHalves; ++h) {
          const StreamQuery query = shared.queries()[(tile + i) * 16 + 8 * h + lane.g];
          hide<S, kGeneral>(launch, problem, query, base, scores[i][h]);
          if (is_kept && query.line >= 0) {
            float* to = launch.scores + static_cast<int64_t>(query.line) * launch.padded + base + 4 * lane.t;
#pragma unroll
            for (int n = 0; n < S::kScores; n += 4) {
              const float* s = scores[i][h] + n;
              store(reinterpret_cast<float4*>(to + 4 * n), make_float4(s[0], s[1], s[2], s[3]));
            }
          }
        }
      }
#pragma unroll
      for (int i = 0; i < Q::kTiles; ++i) {
        float4& shared_state = shared.states()[(tile + i) * kThreads + threadIdx.x];
        float4 state = Q::kMostTiles > 1 ? shared_state : few;
        add_scores(scores[i][0], factor, state.x, state.y);
        if constexpr (Q::kHalves == 2) add_scores(scores[i][1], factor, state.z, state.w);
        if constexpr (Q::kMostTiles > 1) shared_state = state;
        else few = state;
      }
    }
    base = next;
  }

  __syncthreads();
#pragma unroll 1
  for (int tile = 0; tile < tiles; ++tile) {
    float4 state = Q::kMostTiles > 1 ? shared.states()[tile * kThreads + threadIdx.x] : few;
#pragma unroll
    for (int distance = 1; distance < 4; distance *= 2) {
      float other_top = __shfl_xor_sync(kAllLanes, state.x, distance);
      float other_sum = __shfl_xor_sync(kAllLanes, state.y, distance);
      add_stats(other_top, other_sum, state.x, state.y);
      if constexpr (Q::kHalves == 2) {
        other_top = __shfl_xor_sync(kAllLanes, state.z, distance);
        other_sum = __shfl_xor_sync(kAllLanes, state.w, distance);
        add_stats(other_top, other_sum, state.z, state.w);
      }
    }
    if (lane.t == 0) {
      float2* to = shared.parts() + (lane.warp * tiles + tile) * 16 + lane.g;
      to[0] = make_float2(state.x, state.y);
      if constexpr (Q::kHalves == 2) to[8] = make_float2(state.z, state.w);
    }
  }
  __syncthreads();
#pragma unroll 1
  for (int number = threadIdx.x; number < min(count, tiles * 16); number += kThreads) {
    float2 total = shared.parts()[number];
#pragma unroll
    for (int warp = 1; warp < kWarps; ++warp) {
      const float2 other = shared.parts()[warp * tiles * 16 + number];
      add_stats(other.x, other.y, total.x, total.y);
    }
    store(launch.stats + static_cast<int64_t>(shared.queries()[number].line) * launch.splits + blockIdx.x, total);
  }
}

template <typename S, typename Q, bool kGeneral>
void launch_stream_queries(const CaptureLaunch& launch, const CaptureGrid& grid) {
  const CaptureParams& p = launch.params;
  const int64_t queries = std::min<int64_t>(launch.queries_at_once, p.heads / p.key_heads * p.rows);
  const int tiles = static_cast<int>((queries + 16 * Q::kTiles - 1) / (16 * Q::kTiles)) * Q::kTiles;
  const dim3 blocks(static_cast<unsigned>(launch.splits), static_cast<unsigned>(p.key_heads * launch.query_blocks),
                    static_cast<unsigned>(grid.layers * p.batch));
  const auto stream = static_cast<cudaStream_t>(launch.device.stream);
  carve::launch({"capture_stream", blocks, kThreads, stream_bytes<S>(tiles), stream}, capture_stream<S, Q, kGeneral>,
                launch);
}

template <typename S>
void launch_stream_shape(const CaptureLaunch& launch, const CaptureGrid& grid) {
  const CaptureParams& p = launch.params;
  const int64_t queries = std::min<int64_t>(launch.queries_at_once, p.heads / p.key_heads * p.rows);
  // The plan gives a general block no more than Some.
  if (is_general(p)) return launch_stream_queries<S, Some, true>(launch, grid);
  if (queries <= 8) return launch_stream_queries<S, Few, false>(launch, grid);
  if (queries <= 16 * Some::kMostTiles) return launch_stream_queries<S, Some, false>(launch, grid);
  return launch_stream_queries<S, Many, false>(launch, grid);
}

template <typename T>
void launch_stream_type(const CaptureLaunch& launch, const CaptureGrid& grid) {
  const int64_t size = launch.params.size;
  if (size <= 64) return launch_stream_shape<Shape<T, 2, 4>>(launch, grid);
  if (size <= 128) return launch_stream_shape<Shape<T, 4, 4>>(launch, grid);
  return launch_stream_shape<Shape<T, 8, 2>>(launch, grid);
}

}  // namespace
}  // namespace carve
