// What the kernels that write maps share: the statistics of the splits, and mass and entropy of a row.
#pragma once

#include "cuda/capture/capture.cuh"

namespace carve {
namespace {

// Adds a maximum and a sum of 2^(logit - maximum) to another such pair.
__device__ __forceinline__ void add_stats(float other_top, float other_sum, float& top, float& sum) {
  const float larger = fmaxf(top, other_top);
  sum = sum * exp2_fast(top - larger) + other_sum * exp2_fast(other_top - larger);
  top = larger;
}

// The maximum of a row and one over its sum, from the splits first, first + step, ... Many loads are in flight: one after
// the other they would take as many times the latency of the L2 cache.
template <int kInFlight>
__device__ __forceinline__ void merge_splits(const float2* stats, int splits, int first, int step, float& top,
                                             float& sum) {
#pragma unroll 1
  for (int split = first; split < splits; split += step * kInFlight) {
    float2 others[kInFlight];
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      others[i] = make_float2(kLowest, 0.0f);
      if (split + i * step < splits) others[i] = load_coherent(stats + split + i * step);
    }
    float larger = top;
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) larger = fmaxf(larger, others[i].x);
    sum *= exp2_fast(top - larger);
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) sum += others[i].y * exp2_fast(others[i].x - larger);
    top = larger;
  }
}

// A natural logit in base 2, less a maximum of scores times `factor`. Either may be of thousands, whose digits the product
// with log2(e) would lose: its low part is added, and what `factor` lost of its own digits is taken from the maximum.
__device__ __forceinline__ float above(const Logit& logit, float natural, float top) {
  return fmaf(natural, kLog2E, -top) + fmaf(natural, kLog2ELow, -top * logit.residual);
}

// A maximum and a sum as the maximum and the factor that makes probabilities, with the sink of the head.
__device__ __forceinline__ float2 normal_of(const CaptureLaunch& launch, const CaptureLayer& layer, int head, float top,
                                            float sum) {
  if (layer.sink != nullptr) sum += exp2_fast(above(launch.logit, load(layer.sink + head), top));
  return make_float2(top, sum == 0.0f ? 0.0f : 1.0f / sum);
}

// The same where the log-sum-exp is known.
__device__ __forceinline__ float2 known_normal(const CaptureLaunch& launch, int batch, int head, int row) {
  const float lse = load(launch.params.lse + (batch * launch.params.heads + head) * launch.lse_rows + row);
  if (lse == -INFINITY) return make_float2(0.0f, 0.0f);
  const float top = lse * kLog2E;
  return make_float2(top, exp2_fast(-above(launch.logit, lse, top)));
}

// The probability of a score; 0 for -inf, which is the score of a hidden key.
__device__ __forceinline__ float probability(float score, float factor, float2 normal) {
  return exp2_fast(fmaf(score, factor, -normal.x)) * normal.y;
}

// Some tokens of a row: the sum of their probabilities, the entropy of their shares in that sum, and how many are keys.
struct Part {
  float mass = 0.0f;
  float entropy = 0.0f;
  float used = 0.0f;
};

__device__ __forceinline__ float entropy_term(float share) { return share <= 0.0f ? 0.0f : -share * logf(share); }

// Entropies of parts add up without cancellation: one token with all the mass has exactly 0. The order of the two does not
// matter.
__device__ __forceinline__ Part merge_parts(const Part& a, const Part& b) {
  Part both{a.mass + b.mass, 0.0f, a.used + b.used};
  if (both.mass == 0.0f) return both;
  const float share_a = a.mass / both.mass, share_b = b.mass / both.mass;
  both.entropy = fmaf(share_a, a.entropy, entropy_term(share_a)) + fmaf(share_b, b.entropy, entropy_term(share_b));
  return both;
}

__device__ __forceinline__ Part merge_lanes(Part part) {
#pragma unroll 1
  for (int distance = 16; distance > 0; distance /= 2) {
    const Part other{__shfl_xor_sync(kAllLanes, part.mass, distance), __shfl_xor_sync(kAllLanes, part.entropy, distance),
                     __shfl_xor_sync(kAllLanes, part.used, distance)};
    part = merge_parts(part, other);
  }
  return part;
}

// The outputs of this block's layer and batch row, in the current step.
struct Outputs {
  bool exist;  // false if the step is out of range
  float* maps;
  float* mass;
  float* entropy;
};

__device__ __forceinline__ Outputs outputs_of(const CaptureLaunch& launch, const Problem& problem) {
  const CaptureParams& p = launch.params;
  const CaptureDevice& d = launch.device;
  const CaptureLayer& layer = problem.arguments;
  const int64_t step = d.step == nullptr ? 0 : load_uniform(d.step);
  if (step < 0 || step >= d.steps) return {false, nullptr, nullptr, nullptr};
  return {true, layer.maps + step * d.step_strides[0] + problem.batch * p.maps_strides[0],
          layer.mass + step * d.step_strides[1] + problem.batch * p.mass_strides[0],
          layer.entropy + step * d.step_strides[2] + problem.batch * p.entropy_strides[0]};
}

// Stores the part of a block by its first warp, whose lane 0 has it, and takes a ticket: true in the last of `blocks` blocks.
// That leaves the ticket as it was, 0, and sees what the others have stored.
__device__ __forceinline__ bool store_part(const CaptureLaunch& launch, int line, int block, const Part& part,
                                           unsigned* ticket) {
  unsigned taken = 0;
  if (threadIdx.x == 0) {
    store(launch.parts + static_cast<int64_t>(line) * launch.token_blocks + block,
          make_float4(part.mass, part.entropy, part.used, 0.0f));
    fence();
    taken = atomicAdd(ticket, 1u);
    fence();
    if (taken + 1 == static_cast<unsigned>(launch.token_blocks)) store(ticket, 0u);
  }
  return __shfl_sync(kAllLanes, taken, 0) + 1 == static_cast<unsigned>(launch.token_blocks);
}

// Mass and entropy of a row from the parts of its blocks, by one warp, in a fixed order.
__device__ __forceinline__ void summarize(const CaptureLaunch& launch, const Problem& problem, const Outputs& out, int row) {
  constexpr int kInFlight = 4;
  const CaptureParams& p = launch.params;
  const int blocks = launch.token_blocks;
  const float4* parts = launch.parts + static_cast<int64_t>(problem.row_line(p, row)) * blocks;
  Part total;
#pragma unroll 1
  for (int start = threadIdx.x % 32; start < blocks; start += 32 * kInFlight) {
    float4 own[kInFlight];
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      own[i] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
      if (start + 32 * i < blocks) own[i] = load_coherent(parts + start + 32 * i);
    }
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) total = merge_parts(total, Part{own[i].x, own[i].y, own[i].z});
  }
  total = merge_lanes(total);
  if (threadIdx.x % 32 != 0) return;
  store(out.mass + row * p.mass_strides[1], total.mass);
  store(out.entropy + row * p.entropy_strides[1],
        total.used < 2.0f || total.mass == 0.0f ? 0.0f : total.entropy / logf(total.used));
}

}  // namespace
}  // namespace carve
