// The first kernel of a decode step that attends and captures: it reads each key and each value once, and leaves for
// each split of the keys the maximum, the sum and the output of every query, and the scores of the keys around the
// tokens. Each element type has a source file that includes this.
//
// The scores of a warp's tile become probabilities in the registers in which tensor cores left them. There lane (g, t)
// has the keys 16s + 4t .. + 3 of query g, which is a column of B of mma.m16n8k16 if rows 2t 2t+1 and 2t+8 2t+9 of step
// s are these keys. Values are A then, transposed: the lane loads the 16 bytes at elements 64v + 8g of those four
// keys, whose words m have rows g and g + 8 of tile m, elements 8g + 2m and 8g + 2m + 1. Two halves of two words make
// one word of A. A lane ends with the elements 64v + 8g .. + 7 of queries 2t and 2t + 1.
#pragma once

#include <algorithm>

#include "cuda/attention/attention.cuh"
#include "cuda/capture/hide.cuh"
#include "cuda/capture/merge.cuh"
#include "cuda/launch.cuh"

namespace carve {
namespace {

constexpr int kQueries = 8;  // of a block

// The values of a warp's tile of keys, as many registers as its keys take.
template <typename S>
struct ValueShape {
  static constexpr int kPieces = S::kPieces / 2;  // of 64 elements
  static constexpr int kSteps = S::kKeyTiles / 2;  // of 16 keys
  static constexpr int kSize = 64 * kPieces;
  static constexpr int kPadded = kSize + 4;  // of a row in shared memory, so that rows start in different banks
};

template <typename S>
struct AttendShared {
  uint4 staged[S::kTileWords];
  float2 stats[kWarps][kQueries];
  float outputs[kWarps][kQueries][ValueShape<S>::kPadded];
};

// kWhole: a value has exactly kPieces x 64 elements.
template <typename S, bool kWhole, typename KeyAt>
__device__ __forceinline__ void load_values(
    const KeyRows& rows, KeyAt key_at, int size,
    uint4 (&values)[ValueShape<S>::kSteps][4][ValueShape<S>::kPieces]) {
  using V = ValueShape<S>;
  const Lane lane;
#pragma unroll
  for (int step = 0; step < V::kSteps; ++step) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const char* from = computed(rows.row(key_at(16 * step + 4 * lane.t + i)) + 16 * lane.g);
#pragma unroll
      for (int piece = 0; piece < V::kPieces; ++piece) {
        if constexpr (!kWhole) values[step][i][piece] = make_uint4(0, 0, 0, 0);
        if (kWhole || 64 * piece + 8 * lane.g < size) values[step][i][piece] = load_stream(from + 128 * piece);
      }
    }
  }
}

__device__ __forceinline__ unsigned word_of(const uint4& words, int which) {
  return which == 0 ? words.x : which == 1 ? words.y : which == 2 ? words.z : words.w;
}

// Adds the products of a tile's probabilities and values.
template <typename S>
__device__ __forceinline__ void add_values(const float (&shares)[S::kScores],
                                           const uint4 (&values)[ValueShape<S>::kSteps][4][ValueShape<S>::kPieces],
                                           float (&outputs)[ValueShape<S>::kPieces][4][4]) {
  using V = ValueShape<S>;
  using T = typename S::Element;
#pragma unroll
  for (int step = 0; step < V::kSteps; ++step) {
    const unsigned low = pack(shares[4 * step], shares[4 * step + 1], T());
    const unsigned high = pack(shares[4 * step + 2], shares[4 * step + 3], T());
#pragma unroll
    for (int piece = 0; piece < V::kPieces; ++piece) {
#pragma unroll
      for (int m = 0; m < 4; ++m) {
        const unsigned first = word_of(values[step][0][piece], m), second = word_of(values[step][1][piece], m);
        const unsigned third = word_of(values[step][2][piece], m), fourth = word_of(values[step][3][piece], m);
        const uint4 a = make_uint4(low_halves(first, second), high_halves(first, second), low_halves(third, fourth),
                                   high_halves(third, fourth));
        multiply_add(outputs[piece][m], a, low, high, T());
      }
    }
  }
}

// A block: one split of the keys of one key head, and up to eight of its queries. Grid: [splits, key heads x query
// blocks, batch].
template <typename S, bool kGeneral>
__global__ void __launch_bounds__(kThreads, 2) attend_stream(const __grid_constant__ AttentionLaunch launch) {
  using T = typename S::Element;
  using V = ValueShape<S>;
  start_next_launch();
  const CaptureLaunch& capture = launch.capture;
  const CaptureParams& p = capture.params;
  const Problem problem(capture);
  const Lane lane;
  AttendShared<S>& shared = block_shared<AttendShared<S>>();
  const int query_block = capture.query_blocks == 1 ? 0 : static_cast<int>(blockIdx.y) / capture.key_heads;
  const int key_head = static_cast<int>(blockIdx.y) - query_block * capture.key_heads;
  const int first_query = query_block * capture.queries_at_once;
  const int count = min(capture.queries_at_once, capture.group - first_query);
  const int first_head = key_head * capture.group + first_query;

  const CaptureLayer& layer = problem.arguments;
  const KeyRows key_rows(static_cast<const T*>(layer.key) + problem.batch * layer.key_strides[0] +
                             key_head * layer.key_strides[1],
                         layer.key_strides[2]);
  const AttentionValue& value = launch.value;
  const KeyRows value_rows(static_cast<const T*>(value.value) + problem.batch * value.value_strides[0] +
                               key_head * value.value_strides[1],
                           value.value_strides[2]);
  const int value_size = static_cast<int>(value.size);
  // One row: all queries of the block see the same keys, up to a mask.
  const Visible visible = visible_to(p, problem.batch, 0);
  int base = static_cast<int>(blockIdx.x) * capture.split_keys;
  const int end = min(min(base + capture.split_keys, capture.keys), visible.last + 1);
  if (visible.first > base) base += (visible.first - base) / S::kBlockKeys * S::kBlockKeys;
  base += lane.warp * S::kTileKeys;
  uint4 keys[S::kKeyTiles][S::kPieces];
  uint4 values[V::kSteps][4][V::kPieces];
  // Hidden keys and values are not read: they may hold anything.
  const auto load_tile_keys = [&](int start) {
    const auto key_at = [&](int column) { return max(min(start + column, visible.last), visible.first); };
    load_keys<S, !kGeneral>(key_rows, key_at, capture.size, keys);
  };
  const auto load_tile_values = [&](int start) {
    const auto key_at = [&](int column) { return max(min(start + column, visible.last), visible.first); };
    load_values<S, !kGeneral>(value_rows, key_at, value_size, values);
  };
  if (base < end) {
    load_tile_keys(base);
    load_tile_values(base);
  }

  const auto place = [&](int number, int& head, int& row) {
    head = first_head + number, row = 0;
    return number < count;
  };
  stage_queries<S, 1, 1>(capture, problem, 1, place, shared.staged);
  const StreamQuery query{lane.g < count ? problem.line(capture, first_head + lane.g, 0) : -1, visible};
  int low = 0, high = -1;
  if (capture.span != nullptr) low = load(capture.span), high = load(capture.span + 1);
  const float factor = capture.logit.factor;
  float top = kLowest, sum = 0.0f;
  float outputs[V::kPieces][4][4] = {};
  __syncthreads();

  while (base < end) {
    const int next = base + S::kBlockKeys;
    float scores[1][2][S::kScores];
    multiply<S, 1>(keys, shared.staged, scores);
    if (next < end) load_tile_keys(next);
    float(&shares)[S::kScores] = scores[0][0];
    hide<S, kGeneral>(capture, problem, query, base, shares);
    if (base <= high && base + S::kTileKeys - 1 >= low && query.line >= 0) {
      float* to = capture.scores + static_cast<int64_t>(query.line) * capture.padded + base + 4 * lane.t;
#pragma unroll
      for (int n = 0; n < S::kScores; n += 4) {
        store(reinterpret_cast<float4*>(to + 4 * n),
              make_float4(shares[n], shares[n + 1], shares[n + 2], shares[n + 3]));
      }
    }
    float larger = top;
#pragma unroll
    for (int n = 0; n < S::kScores; ++n) larger = fmaxf(larger, shares[n] * factor);
    // Of all lanes of the query: its probabilities are multiplied together.
    larger = fmaxf(larger, __shfl_xor_sync(kAllLanes, larger, 1));
    larger = fmaxf(larger, __shfl_xor_sync(kAllLanes, larger, 2));
    const float shrink = exp2_fast(top - larger);
    float sums[4] = {};
#pragma unroll
    for (int n = 0; n < S::kScores; ++n) {
      shares[n] = exp2_fast(fmaf(shares[n], factor, -larger));
      sums[n % 4] += shares[n];
    }
    sum = sum * shrink + ((sums[0] + sums[1]) + (sums[2] + sums[3]));
    top = larger;
    const float first_shrink = __shfl_sync(kAllLanes, shrink, 8 * lane.t);
    const float second_shrink = __shfl_sync(kAllLanes, shrink, 8 * lane.t + 4);
#pragma unroll
    for (int piece = 0; piece < V::kPieces; ++piece) {
#pragma unroll
      for (int m = 0; m < 4; ++m) {
#pragma unroll
        for (int i = 0; i < 4; ++i) outputs[piece][m][i] *= i % 2 == 0 ? first_shrink : second_shrink;
      }
    }
    add_values<S>(shares, values, outputs);
    if (next < end) load_tile_values(next);
    base = next;
  }

  sum += __shfl_xor_sync(kAllLanes, sum, 1);
  sum += __shfl_xor_sync(kAllLanes, sum, 2);
  if (lane.t == 0) shared.stats[lane.warp][lane.g] = make_float2(top, sum);
#pragma unroll
  for (int piece = 0; piece < V::kPieces; ++piece) {
#pragma unroll
    for (int which = 0; which < 2; ++which) {
      float* to = shared.outputs[lane.warp][2 * lane.t + which] + 64 * piece + 8 * lane.g;
      const auto& from = outputs[piece];
#pragma unroll
      for (int m = 0; m < 4; m += 2) {
        reinterpret_cast<float4*>(to)[m / 2] =
            make_float4(from[m][which], from[m][which + 2], from[m + 1][which], from[m + 1][which + 2]);
      }
    }
  }
  __syncthreads();
  // The warps as one, four elements a thread.
  const int quarters = value_size / 4;
#pragma unroll 1
  for (int item = threadIdx.x; item < count * quarters; item += kThreads) {
    const int number = item / quarters, element = 4 * (item - number * quarters);
    float2 total = shared.stats[0][number];
#pragma unroll
    for (int warp = 1; warp < kWarps; ++warp) {
      add_stats(shared.stats[warp][number].x, shared.stats[warp][number].y, total.x, total.y);
    }
    float4 output = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll
    for (int warp = 0; warp < kWarps; ++warp) {
      const float weight = exp2_fast(shared.stats[warp][number].x - total.x);
      const float4 part = *reinterpret_cast<const float4*>(shared.outputs[warp][number] + element);
      output.x = fmaf(weight, part.x, output.x), output.y = fmaf(weight, part.y, output.y);
      output.z = fmaf(weight, part.z, output.z), output.w = fmaf(weight, part.w, output.w);
    }
    const int line = problem.line(capture, first_head + number, 0);
    const int64_t split = static_cast<int64_t>(line) * capture.splits + blockIdx.x;
    store(reinterpret_cast<float4*>(launch.outputs + split * value_size + element), output);
    if (element == 0) store(capture.stats + split, total);
  }
}

template <typename S>
void launch_attend_shape(const AttentionLaunch& launch) {
  const CaptureLaunch& capture = launch.capture;
  const dim3 blocks(static_cast<unsigned>(capture.splits),
                    static_cast<unsigned>(capture.key_heads * capture.query_blocks), static_cast<unsigned>(capture.batch));
  const bool is_whole = capture.size == 32 * S::kPieces && launch.value.size == capture.size;
  const auto kernel = is_general(capture.params) || !is_whole ? attend_stream<S, true> : attend_stream<S, false>;
  const auto stream = static_cast<cudaStream_t>(capture.device.stream);
  carve::launch({"attend_stream", blocks, kThreads, sizeof(AttendShared<S>), stream}, kernel, launch);
}

template <typename T>
void launch_attend_type(const AttentionLaunch& launch) {
  const int64_t size = std::max<int64_t>(launch.capture.size, launch.value.size);
  if (size <= 64) return launch_attend_shape<Shape<T, 2, 4>>(launch);
  if (size <= 128) return launch_attend_shape<Shape<T, 4, 4>>(launch);
  return launch_attend_shape<Shape<T, 8, 2>>(launch);
}

}  // namespace
}  // namespace carve
