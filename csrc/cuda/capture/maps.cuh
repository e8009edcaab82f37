// The second kernel where the first has stored scores: probabilities at the tokens, their mean over the heads, mass and
// entropy.
#pragma once

#include "cuda/capture/merge.cuh"

namespace carve {
namespace {

constexpr int kHeadsAtOnce = 32;  // scores in flight in a thread

struct MapsShared {
  Part parts[kMostChunks * kWarps];
  float2 normals[1];  // [heads]
};

// The statistics of all heads, by four threads a head.
__device__ __forceinline__ void merge_heads(const CaptureLaunch& launch, const Problem& problem, int row,
                                            MapsShared& shared) {
  const CaptureParams& p = launch.params;
  const int heads = static_cast<int>(p.heads), member = threadIdx.x % 4;
#pragma unroll 1
  for (int start = 0; start < heads; start += kThreads / 4) {
    const int head = start + static_cast<int>(threadIdx.x) / 4;
    float top = kLowest, sum = 0.0f;
    if (head < heads && p.lse == nullptr) {
      const float2* stats = launch.stats + static_cast<int64_t>(problem.line(p, head, row)) * launch.splits;
      merge_splits<6>(stats, launch.splits, member, 4, top, sum);
    }
#pragma unroll
    for (int distance = 1; distance < 4; distance *= 2) {
      const float other_top = __shfl_xor_sync(kAllLanes, top, distance);
      const float other_sum = __shfl_xor_sync(kAllLanes, sum, distance);
      add_stats(other_top, other_sum, top, sum);
    }
    if (member == 0 && head < heads) {
      shared.normals[head] = p.lse != nullptr ? known_normal(launch, problem.batch, head, row)
                                              : normal_of(launch, problem.arguments, head, top, sum);
    }
  }
}

// A block: some tokens of one row. A thread has a token and all heads. Grid: [token blocks, rows, layers x batch].
__global__ void __launch_bounds__(kThreads, 5) capture_maps(const __grid_constant__ CaptureLaunch launch) {
  MapsShared& shared = block_shared<MapsShared>();
  const CaptureParams& p = launch.params;
  const Problem problem(launch);
  const int row = blockIdx.y, heads = static_cast<int>(p.heads);
  const int64_t step = p.rows * launch.padded;
  const float* scores = launch.scores + static_cast<int64_t>(problem.line(p, 0, row)) * launch.padded;
  int64_t token = static_cast<int64_t>(blockIdx.x) * launch.token_chunks * kThreads + threadIdx.x;
  int key = key_of_token(p, problem.batch, token);
  const Visible visible = visible_to(p, problem.batch, row);
  const Outputs out = outputs_of(launch, problem);
  wait_for_launch();
  if (!out.exist) return;
  float* maps = out.maps + row * p.maps_strides[2];
#pragma unroll 1
  for (int chunk = 0; chunk < launch.token_chunks; ++chunk) {
    const bool is_seen = key >= 0 && visible.has(key);
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
        if (head + i >= heads) continue;
        values[i] = is_seen ? probability(values[i], launch.logit.factor, shared.normals[head + i]) : 0.0f;
        sums[i % 4] += values[i];
      }
      if (p.each && token < p.token_count) {
        float* to = maps + head * p.maps_strides[1] + token * launch.device.token_stride;
#pragma unroll
        for (int i = 0; i < kHeadsAtOnce; ++i) {
          if (head + i < heads) store(to, values[i]);
          to += p.maps_strides[1];
        }
      }
    }
    const float value = ((sums[0] + sums[1]) + (sums[2] + sums[3])) / static_cast<float>(heads);
    if (!p.each && token < p.token_count) store(maps + token * launch.device.token_stride, value);
    Part part{lanes_sum<32>(value), 0.0f, lanes_sum<32>(key >= 0 ? 1.0f : 0.0f)};
    part.entropy = lanes_sum<32>(part.mass == 0.0f ? 0.0f : entropy_term(value / part.mass));
    if (threadIdx.x % 32 == 0) shared.parts[chunk * kWarps + threadIdx.x / 32] = part;
    token += kThreads;
    key = chunk + 1 < launch.token_chunks ? key_of_token(p, problem.batch, token) : -1;
  }
  __syncthreads();
  if (threadIdx.x >= 32) return;
  const Part all = merge_parts<32>(launch.token_chunks * kWarps, [&](int part) { return shared.parts[part]; });
  unsigned is_last = 0;
  if (threadIdx.x == 0) {
    store_part(parts_of(launch, problem, row) + blockIdx.x, all);
    is_last = take_ticket(launch.device.tickets + problem.row_line(p, row), launch.token_blocks);
  }
  if (__shfl_sync(kAllLanes, is_last, 0) != 0) summarize<32>(launch, problem, out, row, true);
}

}  // namespace
}  // namespace carve
