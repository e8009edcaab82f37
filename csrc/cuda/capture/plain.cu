// The first kernel for float32, and for keys whose rows are not whole vectors of 16 bytes: scores and statistics by
// fused multiply-adds from shared memory.

#include <algorithm>

#include "cuda/capture/merge.cuh"
#include "cuda/launch.cuh"

namespace carve {
namespace {

constexpr int kTileKeys = 32;  // one a lane
constexpr int kTileQueries = 8;
constexpr int kOfWarp = kTileQueries / kWarps;

__device__ __forceinline__ float to_float(float value) { return value; }
__device__ __forceinline__ float to_float(__half value) { return __half2float(value); }
__device__ __forceinline__ float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }

__device__ __forceinline__ float lanes_max(float value) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) {
    value = fmaxf(value, __shfl_xor_sync(kAllLanes, value, distance));
  }
  return value;
}

// Shared memory of a block: keys and queries as float32, with rows that start four banks after each other, and the
// statistics of the queries.
struct PlainShared {
  int pitch;

  __device__ __forceinline__ explicit PlainShared(int size) : pitch((size + 3) / 4 * 4 + 4) {}
  __device__ __forceinline__ float* keys() const { return &block_shared<float>(); }
  __device__ __forceinline__ float* staged() const { return keys() + kTileKeys * pitch; }
  __device__ __forceinline__ float2* stats() const {
    return reinterpret_cast<float2*>(staged() + kTileQueries * pitch);
  }
};

size_t plain_bytes(int64_t size, int64_t queries) {
  const size_t pitch = static_cast<size_t>((size + 3) / 4 * 4 + 4);
  return (kTileKeys + kTileQueries) * pitch * sizeof(float) + static_cast<size_t>(queries) * sizeof(float2);
}

// A block: one split of the keys of one key head, and some of its queries. Grid: [splits, key heads x query blocks,
// layers x batch].
template <typename T>
__global__ void __launch_bounds__(kThreads, 5) capture_plain(const __grid_constant__ CaptureLaunch launch) {
  start_next_launch();
  const CaptureParams& p = launch.params;
  const Problem problem(launch);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, size = launch.size;
  const int key_head = static_cast<int>(blockIdx.y) % launch.key_heads;
  const int first_query = static_cast<int>(blockIdx.y) / launch.key_heads * launch.queries_at_once;
  const int rows = launch.rows, group = launch.group;
  const int count = min(launch.queries_at_once, group * rows - first_query);
  const PlainShared shared(size);
  const int width = shared.pitch - 4;
  const CaptureLayer& layer = problem.arguments;
  const int low = load(launch.span), high = load(launch.span + 1);

  const int begin = static_cast<int>(blockIdx.x) * launch.split_keys;
  const int end = min(begin + launch.split_keys, launch.keys);
  for (int query = threadIdx.x; query < count; query += kThreads) shared.stats()[query] = make_float2(kLowest, 0.0f);
  const T* from = static_cast<const T*>(layer.key) + problem.batch * layer.key_strides[0] +
                  key_head * layer.key_strides[1];
  bool is_staged = false;
#pragma unroll 1
  for (int base = begin; base < end; base += kTileKeys) {
    const bool is_kept = base <= high && base + kTileKeys - 1 >= low;
    // With a known sum only the scores count.
    if (p.lse != nullptr && !is_kept) continue;
    // Seen by no row of the block: neither read nor stored.
    bool is_seen = p.positions.data == nullptr;
    for (int row = 0; row < rows && !is_seen; ++row) {
      const Visible visible = visible_to(p, problem.batch, row);
      is_seen = visible.first < base + kTileKeys && visible.last >= base;
    }
    if (!is_seen) continue;
    __syncthreads();
#pragma unroll 4
    for (int item = threadIdx.x; item < kTileKeys * width; item += kThreads) {
      const int key = item / width, element = item % width;
      const bool exists = base + key < end && element < size;
      shared.keys()[key * shared.pitch + element] =
          exists ? to_float(load(from + (base + key) * layer.key_strides[2] + element)) : 0.0f;
    }
#pragma unroll 1
    for (int start = 0; start < count; start += kTileQueries) {
      if (!is_staged || count > kTileQueries) {
        __syncthreads();
        for (int item = threadIdx.x; item < kTileQueries * width; item += kThreads) {
          const int number = start + item / width, query = first_query + number, element = item % width;
          float value = 0.0f;
          if (number < count && element < size) {
            value = to_float(load(static_cast<const T*>(layer.query) + problem.batch * layer.query_strides[0] +
                                  (key_head * group + query / rows) * layer.query_strides[1] +
                                  query % rows * layer.query_strides[2] + element * layer.query_strides[3]));
          }
          shared.staged()[item / width * shared.pitch + element] = value;
        }
        is_staged = true;
      }
      __syncthreads();
      float scores[kOfWarp] = {};
      const float4* own_key = reinterpret_cast<const float4*>(shared.keys() + lane * shared.pitch);
#pragma unroll 4
      for (int i = 0; i < width / 4; ++i) {
        const float4 k = own_key[i];
#pragma unroll
        for (int n = 0; n < kOfWarp; ++n) {
          const float4 q = reinterpret_cast<const float4*>(shared.staged() + (warp * kOfWarp + n) * shared.pitch)[i];
          scores[n] = fmaf(k.x, q.x, fmaf(k.y, q.y, fmaf(k.z, q.z, fmaf(k.w, q.w, scores[n]))));
        }
      }
#pragma unroll
      for (int n = 0; n < kOfWarp; ++n) {
        const int number = start + warp * kOfWarp + n, query = first_query + number;
        if (number >= count) continue;
        const int head = key_head * group + query / rows, row = query % rows, key = base + lane;
        float score = launch.logit.changes() ? launch.logit.score(scores[n]) : scores[n];
        if (key >= end || !visible_to(p, problem.batch, row).has(key) ||
            (p.mask != nullptr && !mask_has(p, problem.batch, head, row, key))) {
          score = -INFINITY;
        }
        if (is_kept && key < end) {
          store(launch.scores + static_cast<int64_t>(problem.line(launch, head, row)) * launch.padded + key, score);
        }
        if (p.lse != nullptr) continue;
        float2 state = shared.stats()[number];
        const float top = fmaxf(state.x, lanes_max(score) * launch.logit.factor);
        const float sum = lanes_sum<32>(exp2_fast(fmaf(score, launch.logit.factor, -top)));
        __syncwarp();
        if (lane == 0) shared.stats()[number] = make_float2(top, state.y * exp2_fast(state.x - top) + sum);
        __syncwarp();
      }
    }
  }
  __syncthreads();
  for (int number = threadIdx.x; number < count && p.lse == nullptr; number += kThreads) {
    const int query = first_query + number;
    const int line = problem.line(launch, key_head * group + query / rows, query % rows);
    store(launch.stats + static_cast<int64_t>(line) * launch.splits + blockIdx.x, shared.stats()[number]);
  }
}

template <typename T>
void launch_plain_type(const CaptureLaunch& launch, const CaptureGrid& grid) {
  const CaptureParams& p = launch.params;
  const int64_t queries = std::min<int64_t>(launch.queries_at_once, p.heads / p.key_heads * p.rows);
  const dim3 blocks(static_cast<unsigned>(launch.splits), static_cast<unsigned>(p.key_heads * launch.query_blocks),
                    static_cast<unsigned>(grid.layers * p.batch));
  carve::launch({"capture_plain", blocks, kThreads, plain_bytes(p.size, queries),
                 static_cast<cudaStream_t>(launch.device.stream)},
                capture_plain<T>, launch);
}

struct SpanShared {
  int low[32];
  int high[32];
};

// The lowest and the highest token that is a key, by one block.
__global__ void __launch_bounds__(1024) capture_span(const __grid_constant__ CaptureLaunch launch, int32_t* span) {
  SpanShared& shared = block_shared<SpanShared>();
  const CaptureParams& p = launch.params;
  int low = 0x7fffffff, high = -1;
  for (int64_t item = threadIdx.x; item < p.batch * p.token_count; item += blockDim.x) {
    const int key = key_of_token(p, static_cast<int>(item / p.token_count), item % p.token_count);
    if (key >= 0) low = min(low, key), high = max(high, key);
  }
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) {
    low = min(low, __shfl_xor_sync(kAllLanes, low, distance));
    high = max(high, __shfl_xor_sync(kAllLanes, high, distance));
  }
  if (threadIdx.x % 32 == 0) shared.low[threadIdx.x / 32] = low, shared.high[threadIdx.x / 32] = high;
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (unsigned warp = 1; warp < blockDim.x / 32; ++warp) {
    low = min(low, shared.low[warp]), high = max(high, shared.high[warp]);
  }
  store(span, low), store(span + 1, high);
}

}  // namespace

void launch_plain(const CaptureLaunch& launch, const CaptureGrid& grid) {
  switch (launch.params.type) {
    case Float::kFloat32: return launch_plain_type<float>(launch, grid);
    case Float::kFloat16: return launch_plain_type<__half>(launch, grid);
    case Float::kBfloat16: return launch_plain_type<__nv_bfloat16>(launch, grid);
  }
}

void launch_span(const CaptureLaunch& launch, int32_t* span) {
  carve::launch({"capture_span", 1, 1024, sizeof(SpanShared), static_cast<cudaStream_t>(launch.device.stream)},
                capture_span, launch, span);
}

}  // namespace carve
