// The second kernel where the first has stored scores: probabilities at the tokens, their mean over the heads, mass and
// entropy.
#pragma once

#include "cuda/capture/merge.cuh"

namespace carve {
namespace {

constexpr int kHeadsAtOnce = 32;  // scores in flight in a thread

struct MapsShared {
  Part parts[kMostParts];
  float2 normals[1];  // [heads], padded to a multiple of kHeadsAtOnce
};

inline size_t maps_bytes(int64_t heads) {
  // Four threads a head: all that they write.
  constexpr int64_t kPadded = kThreads / 4;
  static_assert(kPadded % kHeadsAtOnce == 0);
  return sizeof(MapsShared) + sizeof(float2) * static_cast<size_t>((heads + kPadded - 1) / kPadded * kPadded);
}

// The statistics of all heads, by four threads a head.
__device__ __forceinline__ void merge_heads(const CaptureLaunch& launch, const Problem& problem, int row,
                                            MapsShared& shared) {
  const CaptureParams& p = launch.params;
  const int heads = launch.heads, member = threadIdx.x % 4;
#pragma unroll 1
  for (int start = 0; start < heads; start += kThreads / 4) {
    const int head = start + static_cast<int>(threadIdx.x) / 4;
    float top = kLowest, sum = 0.0f;
    if (head < heads && p.lse == nullptr) {
      const float2* stats = launch.stats + static_cast<int64_t>(problem.line(launch, head, row)) * launch.splits;
      merge_splits<6>(stats, launch.splits, member, 4, top, sum);
    }
#pragma unroll
    for (int distance = 1; distance < 4; distance *= 2) {
      const float other_top = __shfl_xor_sync(kAllLanes, top, distance);
      const float other_sum = __shfl_xor_sync(kAllLanes, sum, distance);
      add_stats(other_top, other_sum, top, sum);
    }
    if (member == 0 && head >= heads) shared.normals[head] = make_float2(0.0f, 0.0f);
    if (member == 0 && head < heads) {
      shared.normals[head] = p.lse != nullptr ? known_normal(launch, problem.batch, head, row)
                                              : normal_of(launch, problem.arguments, head, top, sum);
    }
  }
}

// One of the blocks of tokens of a row. A thread has a token and all heads.
template <bool kEach>
__device__ __forceinline__ void write_maps(const CaptureLaunch& launch, const Problem& problem, int row, int block) {
  MapsShared& shared = block_shared<MapsShared>();
  const CaptureParams& p = launch.params;
  const int heads = launch.heads;
  const int64_t step = int64_t{launch.rows} * launch.padded;
  const float* scores = launch.scores + static_cast<int64_t>(problem.line(launch, 0, row)) * launch.padded;
  int64_t token = int64_t{block} * launch.token_chunks * kThreads + threadIdx.x;
  const Visible visible = visible_to(p, problem.batch, row);
  const Outputs out = outputs_of(launch, problem);
  float* maps = out.maps + row * p.maps_strides[2];
#pragma unroll 1
  for (int chunk = 0; chunk < launch.token_chunks; ++chunk) {
    const int key = key_of_token(p, problem.batch, token);
    const bool is_seen = key >= 0 && visible.has(key);
    if (chunk == 0) wait_for_launch();
    if (!out.exist) return;
    float sums[4] = {};
#pragma unroll 1
    for (int head = 0; head < heads; head += kHeadsAtOnce) {
      float values[kHeadsAtOnce];
      const float* from = scores + head * step + (is_seen ? key : 0);
      const int there = is_seen ? heads - head : 0;
#pragma unroll
      for (int i = 0; i < kHeadsAtOnce; ++i) {
        values[i] = -INFINITY;
        if (i < there) values[i] = load_coherent(from);
        from += step;
      }
      if (chunk == 0 && head == 0) {
        // While the scores are being loaded.
        merge_heads(launch, problem, row, shared);
        __syncthreads();
      }
#pragma unroll
      for (int i = 0; i < kHeadsAtOnce; ++i) {
        // The normals are padded: 2^-inf is 0 beyond the heads.
        values[i] = probability(values[i], launch.logit.factor, shared.normals[head + i]);
        sums[i % 4] += values[i];
      }
      if (kEach && token < p.token_count) {
        float* to = maps + head * p.maps_strides[1] + token * launch.device.token_stride;
#pragma unroll
        for (int i = 0; i < kHeadsAtOnce; ++i) {
          if (head + i < heads) store(to, values[i]);
          to += p.maps_strides[1];
        }
      }
    }
    const float value =
        is_seen ? ((sums[0] + sums[1]) + (sums[2] + sums[3])) / static_cast<float>(heads) : 0.0f;
    if (!kEach && token < p.token_count) store(maps + token * launch.device.token_stride, value);
    Part part{lanes_sum<32>(value), 0.0f, lanes_sum<32>(key >= 0 ? 1.0f : 0.0f)};
    part.entropy = lanes_sum<32>(part.mass == 0.0f ? 0.0f : entropy_term(value / part.mass));
    if (threadIdx.x % 32 == 0) shared.parts[chunk * kWarps + threadIdx.x / 32] = part;
    token += kThreads;
  }
  __syncthreads();
  if (threadIdx.x >= 32) return;
  float4* parts = parts_of(launch, problem, row);
  int count = launch.token_chunks * kWarps;
  // The parts of this block and, in the last block, those of all.
#pragma unroll 1
  for (bool is_last = false;; is_last = true) {
    const Part all = merge_parts<32>(shared.parts, count);
    unsigned goes_on = 0;
    if (threadIdx.x == 0 && is_last) store_row(p, out, row, all);
    if (threadIdx.x == 0 && !is_last) {
      store_part(parts + block, all);
      goes_on = take_ticket(launch.device.tickets + problem.row_line(launch, row), launch.token_blocks);
    }
    if (__shfl_sync(kAllLanes, goes_on, 0) == 0) return;
    count = launch.token_blocks;
    __syncwarp();
    load_parts<32>(parts, count, shared.parts);
    __syncwarp();
  }
}

}  // namespace
}  // namespace carve
