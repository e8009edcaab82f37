// The first kernel of contrast: the weighted sum of the ratios of a chunk of maps, at each token.

#include "cuda/contrast/contrast.cuh"

namespace carve {
namespace {

constexpr int kTokensAtOnce = 4;  // of each map, in flight in a thread that adds up whole maps

struct GridShared {
  float sums[kContrastWarps][kMapsAtOnce];
  float2 maps[1];  // [maps_of_chunk]: weight, and what is added to the general map
};

// The layer and the step of a map.
struct MapIndex {
  int layer, step;

  __device__ __forceinline__ MapIndex(const GridLaunch& launch, int map)
      : layer(map / launch.steps), step(map - layer * launch.steps) {}
  // To the step of the next map, without a division; whether that is in the next layer.
  __device__ __forceinline__ bool advance(const GridLaunch& launch) {
    const bool is_last = ++step == launch.steps;
    step = is_last ? 0 : step;
    return is_last;
  }
};

// Eight bytes as two words: `load_coherent` of a double may be moved over `wait_for_launch`.
__device__ __forceinline__ double load_double(const double* address) {
  const float2 words = load_coherent(reinterpret_cast<const float2*>(address));
  const auto low = static_cast<unsigned long long>(__float_as_uint(words.x));
  const auto high = static_cast<unsigned long long>(__float_as_uint(words.y));
  return __longlong_as_double(static_cast<long long>(high << 32 | low));
}

// Sums of eight values over the lanes of a warp, lane 4 i having that of value i, and the lanes after it the same: each
// exchange halves the values.
__device__ __forceinline__ float sum_each(float (&values)[kMapsAtOnce]) {
  const unsigned lane = threadIdx.x % 32;
#pragma unroll
  for (int kept = kMapsAtOnce / 2; kept > 0; kept /= 2) {
    const bool is_upper = (lane & (4 * kept)) != 0;
#pragma unroll
    for (int i = 0; i < kept; ++i) {
      const float sent = is_upper ? values[i] : values[i + kept];
      const float own = is_upper ? values[i + kept] : values[i];
      values[i] = own + __shfl_xor_sync(kAllLanes, sent, 4 * kept);
    }
  }
  values[0] += __shfl_xor_sync(kAllLanes, values[0], 2);
  return values[0] + __shfl_xor_sync(kAllLanes, values[0], 1);
}

// The means of up to eight general maps from `first` on, by the whole block; lane 4 i of every warp has that of map i.
__device__ __forceinline__ float mean_each(const GridLaunch& launch, int first, int count, GridShared& shared) {
  const float* rows[kMapsAtOnce];
  MapIndex at(launch, first);
  rows[0] = launch.general + at.layer * launch.general_strides[0] + at.step * launch.general_strides[1];
#pragma unroll
  for (int i = 1; i < kMapsAtOnce; ++i) {
    rows[i] = rows[i - 1] + (at.advance(launch) ? launch.general_jump : launch.general_strides[1]);
  }
  float sums[kMapsAtOnce] = {};
#pragma unroll 1
  for (int start = threadIdx.x; start < launch.tokens; start += kTokensAtOnce * kContrastThreads) {
    float values[kTokensAtOnce][kMapsAtOnce];
#pragma unroll
    for (int j = 0; j < kTokensAtOnce; ++j) {
      const int token = start + j * kContrastThreads;
#pragma unroll
      for (int i = 0; i < kMapsAtOnce; ++i) {
        values[j][i] = 0.0f;
        if (i < count && token < launch.tokens) values[j][i] = load_coherent(rows[i] + token);
      }
    }
#pragma unroll
    for (int j = 0; j < kTokensAtOnce; ++j) {
#pragma unroll
      for (int i = 0; i < kMapsAtOnce; ++i) sums[i] += values[j][i];
    }
  }
  const unsigned lane = threadIdx.x % 32;
  const float sum = sum_each(sums);
  if (lane % 4 == 0) shared.sums[threadIdx.x / 32][lane / 4] = sum;
  __syncthreads();
  float total = 0.0f;
#pragma unroll
  for (int warp = 0; warp < kContrastWarps; ++warp) total += shared.sums[warp][lane / 4];
  return total / static_cast<float>(launch.tokens);
}

// The values of eight maps at a token.
struct Values {
  float task[kMapsAtOnce];
  float general[kMapsAtOnce];
};

__device__ __forceinline__ Values load_values(const GridLaunch& launch, int first, int end, int token) {
  Values values;
  MapIndex at(launch, first);
  const float* task = launch.task + at.layer * launch.task_strides[0] + at.step * launch.task_strides[1] + token;
  const float* general =
      launch.general + at.layer * launch.general_strides[0] + at.step * launch.general_strides[1] + token;
#pragma unroll
  for (int i = 0; i < kMapsAtOnce; ++i) {
    values.task[i] = values.general[i] = 0.0f;
    if (first + i < end && token < launch.tokens) {
      values.task[i] = load_coherent(task), values.general[i] = load_coherent(general);
    }
    const bool is_next_layer = at.advance(launch);
    task += is_next_layer ? launch.task_jump : launch.task_strides[1];
    general += is_next_layer ? launch.general_jump : launch.general_strides[1];
  }
  return values;
}

// A block: some maps at some tokens. A thread has a token at a time. Grid: [blocks of tokens, chunks of maps].
template <bool kMean>
__global__ void __launch_bounds__(kContrastThreads, 2) contrast_grid(const __grid_constant__ GridLaunch launch) {
  start_next_launch();
  GridShared& shared = block_shared<GridShared>();
  const int begin = static_cast<int>(blockIdx.y) * launch.maps_of_chunk;
  const int end = min(begin + launch.maps_of_chunk, launch.maps);
  int token = static_cast<int>(blockIdx.x) * launch.tokens_of_block + static_cast<int>(threadIdx.x);
  const int last_token = min(token + launch.tokens_of_block - kContrastThreads, launch.tokens - 1);
  wait_for_launch();
  // In flight while the maps are added up.
  Values values = load_values(launch, begin, end, token);
#pragma unroll 1
  for (int map = begin + static_cast<int>(threadIdx.x); map < end; map += kContrastThreads) {
    const MapIndex at(launch, map);
    const double weight = load_double(launch.layer_weights + at.layer) * load_double(launch.step_weights + at.step);
    shared.maps[map - begin] = make_float2(static_cast<float>(weight), launch.lam);
  }
#pragma unroll 1
  for (int first = begin; kMean && first < end; first += kMapsAtOnce) {
    // The sums of the maps before are read.
    if (first > begin) __syncthreads();
    const int count = min(end - first, kMapsAtOnce);
    const float mean = mean_each(launch, first, count, shared);
    const int map = static_cast<int>(threadIdx.x) / 4;
    if (threadIdx.x % 4 == 0 && map < count) shared.maps[first + map - begin].y = mean;
  }
  __syncthreads();

  float* to = launch.partials + int64_t{blockIdx.y} * launch.tokens;
  int first = begin;
  float fused = 0.0f;
#pragma unroll 1
  for (bool has_next = true; has_next;) {
#pragma unroll
    for (int i = 0; i < kMapsAtOnce; ++i) {
      const float2 map = shared.maps[min(first + i, end - 1) - begin];
      const float divisor = values.general[i] + map.y;
      // A divisor of 0 gives a ratio of 0, not NaN, and so does a map past the last, whose values are 0.
      const float ratio = divisor > 0.0f ? values.task[i] / divisor : 0.0f;
      fused += map.x * ratio;
    }
    first += kMapsAtOnce;
    if (first >= end) {
      if (token < launch.tokens) store(to + token, fused);
      first = begin, fused = 0.0f, token += kContrastThreads;
      has_next = token <= last_token;
    }
    if (has_next) values = load_values(launch, first, end, token);
  }
}

}  // namespace

void launch_grid(const GridLaunch& launch, bool lam_is_mean, const ContrastGrid& how) {
  const size_t bytes = sizeof(GridShared) + sizeof(float2) * static_cast<size_t>(launch.maps_of_chunk);
  carve::launch({"contrast_grid", how.blocks, kContrastThreads, bytes, how.stream, how.overlaps},
                lam_is_mean ? contrast_grid<true> : contrast_grid<false>, launch);
}

}  // namespace carve
