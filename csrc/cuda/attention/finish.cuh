// The second kernel of a decode step that attends and captures: the output, and the maps as after a capture.
#pragma once

#include "cuda/attention/attention.cuh"
#include "cuda/capture/maps.cuh"

namespace carve {
namespace {

constexpr int kSplitsAtOnce = 8;  // in flight in a thread

struct OutputShared {
  float2 stats[kWarps];
  float outputs[kWarps][kMaxSize];
};

// The output of a head from those of the splits: each warp has every fourth split, and a lane four elements.
__device__ __forceinline__ void write_output(const AttentionLaunch& launch, const Problem& problem, int head) {
  OutputShared& shared = block_shared<OutputShared>();
  const CaptureLaunch& capture = launch.capture;
  const AttentionValue& value = launch.value;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int splits = capture.splits, size = static_cast<int>(value.size);
  const int64_t first = static_cast<int64_t>(problem.line(capture, head, 0)) * splits;
  wait_for_launch();
#pragma unroll 1
  for (int start = 0; start < size; start += 128) {
    const int element = start + 4 * lane;
    float top = kLowest, sum = 0.0f;
    float4 output = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll 1
    for (int split = warp; split < splits; split += kWarps * kSplitsAtOnce) {
      float2 stats[kSplitsAtOnce];
      float4 parts[kSplitsAtOnce];
#pragma unroll
      for (int i = 0; i < kSplitsAtOnce; ++i) {
        const int64_t from = first + split + i * kWarps;
        stats[i] = make_float2(kLowest, 0.0f);
        parts[i] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        if (split + i * kWarps >= splits) continue;
        stats[i] = load_coherent(capture.stats + from);
        if (element < size) {
          parts[i] = load_coherent(reinterpret_cast<const float4*>(launch.outputs + from * size + element));
        }
      }
      float larger = top;
#pragma unroll
      for (int i = 0; i < kSplitsAtOnce; ++i) larger = fmaxf(larger, stats[i].x);
      const float shrink = exp2_fast(top - larger);
      sum *= shrink;
      output.x *= shrink, output.y *= shrink, output.z *= shrink, output.w *= shrink;
#pragma unroll
      for (int i = 0; i < kSplitsAtOnce; ++i) {
        const float weight = exp2_fast(stats[i].x - larger);
        sum = fmaf(weight, stats[i].y, sum);
        output.x = fmaf(weight, parts[i].x, output.x), output.y = fmaf(weight, parts[i].y, output.y);
        output.z = fmaf(weight, parts[i].z, output.z), output.w = fmaf(weight, parts[i].w, output.w);
      }
      top = larger;
    }
    if (lane == 0) shared.stats[warp] = make_float2(top, sum);
    if (element < size) *reinterpret_cast<float4*>(shared.outputs[warp] + element) = output;
  }
  __syncthreads();
  float2 total = shared.stats[0];
#pragma unroll
  for (int other = 1; other < kWarps; ++other) {
    add_stats(shared.stats[other].x, shared.stats[other].y, total.x, total.y);
  }
  const float2 normal = normal_of(capture, problem.arguments, head, total.x, total.y);
  auto* to = static_cast<unsigned short*>(value.output) + problem.batch * value.output_strides[0] +
             head * value.output_strides[1];
#pragma unroll 1
  for (int element = 2 * static_cast<int>(threadIdx.x); element < size; element += 2 * kThreads) {
    float even = 0.0f, odd = 0.0f;
#pragma unroll
    for (int other = 0; other < kWarps; ++other) {
      const float weight = exp2_fast(shared.stats[other].x - normal.x) * normal.y;
      even = fmaf(weight, shared.outputs[other][element], even);
      odd = fmaf(weight, shared.outputs[other][element + 1], odd);
    }
    const bool is_half = capture.params.type == Float::kFloat16;
    store(reinterpret_cast<unsigned*>(to + element),
          is_half ? pack(even, odd, __half()) : pack(even, odd, __nv_bfloat16()));
  }
}

// A block: a head's output, or some tokens of the map. Grid: [heads + token blocks, 1, batch].
template <bool kEach>
__global__ void __launch_bounds__(kThreads, 5) attend_finish(const __grid_constant__ AttentionLaunch launch) {
  const Problem problem(launch.capture);
  const int block = static_cast<int>(blockIdx.x) - launch.capture.heads;
  if (block < 0) {
    write_output(launch, problem, static_cast<int>(blockIdx.x));
  } else {
    write_maps<kEach>(launch.capture, problem, 0, block);
  }
}

}  // namespace
}  // namespace carve
