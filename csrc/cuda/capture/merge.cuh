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

// The maximum of a row and one over its sum, from the splits first, first + step, ... Many loads are in flight: one
// after the other they would take as many times the latency of the L2 cache.
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

// A natural logit in base 2, less a maximum of scores times `factor`. Either may be of thousands, whose digits the
// product with log2(e) would lose: its low part is added, and what `factor` lost of its own digits is taken from the
// maximum.
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

template <int kLanes>
__device__ __forceinline__ float lanes_sum(float value) {
#pragma unroll
  for (int distance = kLanes / 2; distance > 0; distance /= 2) {
    value += __shfl_xor_sync(kAllLanes, value, distance);
  }
  return value;
}

// Parts in shared memory as one, by kLanes lanes of a warp, in a fixed order; all of them have it. Entropies add up
// without cancellation: one token with all the mass has exactly 0. Every lane of the warp has to call it.
template <int kLanes>
__device__ __forceinline__ Part merge_parts(const Part* parts, int count) {
  const int first = threadIdx.x % kLanes;
  Part all;
#pragma unroll 1
  for (int number = first; number < count; number += kLanes) {
    all.mass += parts[number].mass, all.used += parts[number].used;
  }
  all.mass = lanes_sum<kLanes>(all.mass), all.used = lanes_sum<kLanes>(all.used);
#pragma unroll 1
  for (int number = first; number < count && all.mass != 0.0f; number += kLanes) {
    const float share = parts[number].mass / all.mass;
    all.entropy += fmaf(share, parts[number].entropy, entropy_term(share));
  }
  all.entropy = lanes_sum<kLanes>(all.entropy);
  return all;
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

// The parts of a row's blocks.
__device__ __forceinline__ float4* parts_of(const CaptureLaunch& launch, const Problem& problem, int row) {
  return launch.parts + static_cast<int64_t>(problem.row_line(launch, row)) * launch.token_blocks;
}

__device__ __forceinline__ void store_part(float4* to, const Part& part) {
  store(to, make_float4(part.mass, part.entropy, part.used, 0.0f));
}

// Whether this block is the last of those that share a ticket; it leaves the ticket as it was, 0. What the others
// stored before they took theirs is visible to the thread that takes it, and after a barrier to the block.
__device__ __forceinline__ bool take_ticket(unsigned* ticket, int blocks) {
  fence();
  const bool is_last = atomicAdd(ticket, 1u) + 1 == static_cast<unsigned>(blocks);
  fence();
  if (is_last) atomicExch(ticket, 0u);
  return is_last;
}

// Copies the parts of a row's blocks to shared memory, by kLanes lanes.
template <int kLanes>
__device__ __forceinline__ void load_parts(const float4* from, int count, Part* to) {
  constexpr int kInFlight = 4;
#pragma unroll 1
  for (int start = threadIdx.x % kLanes; start < count; start += kInFlight * kLanes) {
    float4 parts[kInFlight];
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      if (start + i * kLanes < count) parts[i] = load_coherent(from + start + i * kLanes);
    }
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      if (start + i * kLanes < count) to[start + i * kLanes] = Part{parts[i].x, parts[i].y, parts[i].z};
    }
  }
}

__device__ __forceinline__ void store_row(const CaptureParams& p, const Outputs& out, int row, const Part& all) {
  store(out.mass + row * p.mass_strides[1], all.mass);
  store(out.entropy + row * p.entropy_strides[1],
        all.used < 2.0f || all.mass == 0.0f ? 0.0f : all.entropy / logf(all.used));
}

}  // namespace
}  // namespace carve
