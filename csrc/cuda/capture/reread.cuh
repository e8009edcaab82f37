// The second kernel where the first has stored no scores, or where the log-sum-exp is known: it reads the keys of the
// tokens and multiplies them by all queries. A score costs 4 bytes written and 4 read for each query of a key head; a
// key of 128 elements costs 256 once more: from 32 queries on the second read is cheaper, if the scores do not fit into
// the L2 cache.
#pragma once

#include <algorithm>

#include "cuda/capture/merge.cuh"
#include "cuda/capture/tile.cuh"
#include "cuda/launch.cuh"

namespace carve {
namespace {

constexpr int kRowsAtOnce = 16;

template <typename S>
struct RereadShared {
  // 32 KB of queries: 8 tiles of heads of 128.
  static constexpr int kMostTiles = 32 / S::kPieces;
  uint4 staged[kMostTiles * S::kTileWords];
  float2 normals[kMostTiles * 16];
  int keys[kThreads];
  Part parts[kRowsAtOnce][kWarps];
  bool is_last;
};

// Queries of a key head are numbered in tiles of 16: rows, padded to a power of two, of one head of the group after the
// other. So a lane has the same row in every tile: `row_of(h)`.
struct RereadRows {
  int begin;
  int count;
  int shift;

  __device__ __forceinline__ int row_of(int number) const { return number & ((1 << shift) - 1); }
};

// Maximum and factor of the queries of some tiles, one query a thread.
template <typename S, typename Place>
__device__ __forceinline__ void stage_normals(const CaptureLaunch& launch, const Problem& problem, int queries,
                                              Place place, float2* normals) {
  const CaptureParams& p = launch.params;
#pragma unroll 1
  for (int number = threadIdx.x; number < queries; number += kThreads) {
    int head, row;
    float2 normal = make_float2(0.0f, 0.0f);
    if (place(number, head, row)) {
      if (p.lse != nullptr) {
        normal = known_normal(launch, problem.batch, head, row);
      } else {
        float top = kLowest, sum = 0.0f;
        const float2* stats = launch.stats + static_cast<int64_t>(problem.line(launch, head, row)) * launch.splits;
        merge_splits<8>(stats, launch.splits, 0, 1, top, sum);
        normal = normal_of(launch, problem.arguments, head, top, sum);
      }
    }
    normals[number] = normal;
  }
}

// A block: up to 16 rows and, for each warp, one tile of tokens, with all heads. Grid: [token blocks, row blocks,
// layers x batch]. kGeneral: see is_general; or a map for each head is written.
template <typename S, bool kGeneral>
__global__ void __launch_bounds__(kThreads, kGeneral ? 2 : 3)
    capture_reread(const __grid_constant__ CaptureLaunch launch) {
  using T = typename S::Element;
  using Shared = RereadShared<S>;
  Shared& shared = block_shared<Shared>();
  const CaptureParams& p = launch.params;
  const Problem problem(launch);
  const Lane lane;
  const RereadRows rows{static_cast<int>(blockIdx.y) * kRowsAtOnce,
                        min(kRowsAtOnce, launch.rows - static_cast<int>(blockIdx.y) * kRowsAtOnce),
                        launch.row_shift};
  const int heads = launch.heads, group = launch.group;
  const int all_tiles = ((group << rows.shift) + 15) / 16, size = launch.size;
  const float factor = launch.logit.factor;
  const CaptureLayer& layer = problem.arguments;
  const Outputs out = outputs_of(launch, problem);
  const auto visible_row = [&](int h) {
    return visible_to(p, problem.batch, rows.begin + min(rows.row_of(8 * h + lane.g), rows.count - 1));
  };
  bool waits = true;
  const int64_t first_token = (static_cast<int64_t>(blockIdx.x) * kWarps + lane.warp) * S::kTileKeys;
  const int in_warp = threadIdx.x % 32;
  int* own_keys = shared.keys + 32 * lane.warp;
  own_keys[in_warp] = in_warp < S::kTileKeys ? key_of_token(p, problem.batch, first_token + in_warp) : -1;
  __syncwarp();
  uint4 keys[S::kKeyTiles][S::kPieces];
  const auto load_tile = [&](int key_head) {
    const KeyRows key_rows(static_cast<const T*>(layer.key) + problem.batch * layer.key_strides[0] +
                               key_head * layer.key_strides[1],
                           layer.key_strides[2]);
    load_keys<S, !kGeneral>(key_rows, [&](int column) { return max(own_keys[column], 0); }, size, keys);
  };
  load_tile(0);
  float sums[2][S::kScores] = {};
#pragma unroll 1
  for (int key_head = 0; key_head < launch.key_heads; ++key_head) {
#pragma unroll 1
    for (int start = 0; start < all_tiles; start += Shared::kMostTiles) {
      const int tiles = min(Shared::kMostTiles, all_tiles - start);
      const auto place = [&](int number, int& head, int& row) {
        const int query = start * 16 + number, member = query >> rows.shift, local = rows.row_of(query);
        head = key_head * group + member, row = rows.begin + local;
        return member < group && local < rows.count;
      };
      __syncthreads();
      stage_queries<S, 4, 2>(launch, problem, tiles, place, shared.staged);
      if (waits) wait_for_launch(), waits = false;
      stage_normals<S>(launch, problem, tiles * 16, place, shared.normals);
      __syncthreads();
#pragma unroll 1
      for (int tile = 0; tile < tiles; ++tile) {
        float scores[1][2][S::kScores];
        multiply<S, 1>(keys, shared.staged + tile * S::kTileWords, scores);
        if (start + tile == all_tiles - 1 && key_head + 1 < launch.key_heads) load_tile(key_head + 1);
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const int number = tile * 16 + 8 * h + lane.g;
          // A query that does not exist has the factor 0.
          const float2 normal = shared.normals[number];
          float(&values)[S::kScores] = scores[0][h];
          if (kGeneral && launch.logit.changes()) {
#pragma unroll
            for (int n = 0; n < S::kScores; ++n) values[n] = launch.logit.score(values[n]);
          }
#pragma unroll
          for (int n = 0; n < S::kScores; ++n) values[n] = probability(values[n], factor, normal);
          if (kGeneral) {
            int head, row;
            const bool exists = place(number, head, row);
            const Visible visible = visible_row(h);
#pragma unroll
            for (int n = 0; n < S::kScores; ++n) {
              const int column = key_of_score(n, lane.t), key = own_keys[column];
              // Selected and not multiplied: a hidden key may have given NaN.
              if (!exists || key < 0 || !visible.has(key) ||
                  (p.mask != nullptr && !mask_has(p, problem.batch, head, row, key))) {
                values[n] = 0.0f;
              }
              if (p.each && exists && out.exist && first_token + column < p.token_count) {
                store(out.maps + head * p.maps_strides[1] + row * p.maps_strides[2] +
                          (first_token + column) * launch.device.token_stride,
                      values[n]);
              }
            }
          }
#pragma unroll
          for (int n = 0; n < S::kScores; ++n) sums[h][n] += values[n];
        }
      }
    }
  }
  if (!out.exist) return;
  // Fewer than 16 rows stand in both halves of a tile and, if fewer than 8, in other lanes too.
#pragma unroll
  for (int n = 0; n < S::kScores; ++n) {
    if (rows.shift < 4) sums[0][n] += sums[1][n];
    if (rows.shift <= 2) sums[0][n] += __shfl_xor_sync(kAllLanes, sums[0][n], 16);
    if (rows.shift <= 1) sums[0][n] += __shfl_xor_sync(kAllLanes, sums[0][n], 8);
    if (rows.shift <= 0) sums[0][n] += __shfl_xor_sync(kAllLanes, sums[0][n], 4);
  }
  // Through shared memory, since a register needs a copy of the code for each of its values.
  __syncthreads();
  float* own = reinterpret_cast<float*>(shared.staged) + threadIdx.x * (2 * S::kScores + 1);
#pragma unroll
  for (int n = 0; n < 2 * S::kScores; ++n) own[n] = sums[n / S::kScores][n % S::kScores];
#pragma unroll 1
  for (int h = 0; h < 2; ++h) {
    const int own_row = rows.row_of(8 * h + lane.g);
    const bool is_own = 8 * h + lane.g < 1 << rows.shift && own_row < rows.count;
    const Visible visible = visible_row(h);
    float* maps = out.maps + (rows.begin + own_row) * p.maps_strides[2];
    Part part;
#pragma unroll 1
    for (int n = 0; n < S::kScores; ++n) {
      const int column = key_of_score(n, lane.t), key = own_keys[column];
      float& value = own[h * S::kScores + n];
      value = key >= 0 && visible.has(key) ? value / static_cast<float>(heads) : 0.0f;
      part.mass += value, part.used += key >= 0 ? 1.0f : 0.0f;
      const int64_t token = first_token + column;
      if (!(kGeneral && p.each) && is_own && token < p.token_count) {
        store(maps + token * launch.device.token_stride, value);
      }
    }
    part.mass = lanes_sum<4>(part.mass), part.used = lanes_sum<4>(part.used);
#pragma unroll 1
    for (int n = 0; n < S::kScores; ++n) {
      part.entropy += part.mass == 0.0f ? 0.0f : entropy_term(own[h * S::kScores + n] / part.mass);
    }
    part.entropy = lanes_sum<4>(part.entropy);
    if (lane.t == 0 && is_own) shared.parts[own_row][lane.warp] = part;
  }
  __syncthreads();
  // Eight lanes a row: the parts of this block's warps and, in the last block, those of all blocks.
  constexpr int kLanes = kThreads / kRowsAtOnce;
  const int row = threadIdx.x / kLanes;
  const bool exists = row < rows.count;
  float4* parts = parts_of(launch, problem, rows.begin + (exists ? row : 0));
  const Part all = merge_parts<kLanes>(shared.parts[row], exists ? kWarps : 0);
  if (exists && threadIdx.x % kLanes == 0) store_part(parts + blockIdx.x, all);
  __syncthreads();
  if (threadIdx.x == 0) {
    shared.is_last = take_ticket(launch.device.tickets + problem.row_line(launch, rows.begin), launch.token_blocks);
  }
  __syncthreads();
  if (!shared.is_last) return;
  constexpr int kCapacity = static_cast<int>(sizeof(shared.staged) / sizeof(Part)) / kRowsAtOnce;
  Part* merged = reinterpret_cast<Part*>(shared.staged) + row * kCapacity;
  Part total;
  int carried = 0;
#pragma unroll 1
  for (int start = 0; start < launch.token_blocks; start += kCapacity - 1) {
    const int count = exists ? min(kCapacity - 1, launch.token_blocks - start) : 0;
    load_parts<kLanes>(parts + start, count, merged + carried);
    __syncwarp();
    total = merge_parts<kLanes>(merged, exists ? carried + count : 0);
    __syncwarp();
    if (threadIdx.x % kLanes == 0) merged[0] = total;
    carried = 1;
  }
  if (exists && threadIdx.x % kLanes == 0) store_row(p, out, rows.begin + row, total);
}

template <typename S>
void launch_reread_shape(const CaptureLaunch& launch, const CaptureGrid& grid) {
  static_assert(sizeof(RereadShared<S>) <= kSharedBytes);
  static_assert(sizeof(RereadShared<S>::staged) >= sizeof(float) * kThreads * (2 * S::kScores + 1));
  const dim3 blocks(static_cast<unsigned>(launch.token_blocks), static_cast<unsigned>(grid.row_blocks),
                    static_cast<unsigned>(grid.layers * launch.params.batch));
  carve::launch({"capture_reread", blocks, kThreads, sizeof(RereadShared<S>),
                 static_cast<cudaStream_t>(launch.device.stream), grid.overlaps && launch.params.lse == nullptr},
                is_general(launch.params) || launch.params.each ? capture_reread<S, true> : capture_reread<S, false>,
                launch);
}

template <typename T>
void launch_reread_type(const CaptureLaunch& launch, const CaptureGrid& grid) {
  const int64_t size = launch.params.size;
  if (size <= 64) return launch_reread_shape<Shape<T, 2, 4>>(launch, grid);
  if (size <= 128) return launch_reread_shape<Shape<T, 4, 4>>(launch, grid);
  return launch_reread_shape<Shape<T, 8, 2>>(launch, grid);
}

}  // namespace
}  // namespace carve
