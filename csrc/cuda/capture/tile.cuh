// Scores of a tile: each thread holds a part of four keys; the queries of the block are in shared memory.
#pragma once

#include "cuda/capture/capture.cuh"

namespace carve {

constexpr int kUnroll = 4;  // keys of a lane, and 128-bit loads in flight
constexpr int kTile = 32;   // queries in shared memory
constexpr int kAtOnce = 4;  // queries that a lane multiplies by its keys before the lanes are summed
constexpr int kSums = kUnroll * kAtOnce;
constexpr float kLog2E = 1.44269504088896340736f;

// kLanes threads share a key; each has kParts of its 16-byte vectors. 256 threads hold 256 x 4 x 16 = 16 KB in
// flight: bandwidth times latency is 3.35 TB/s x 600 ns / 132 SMs = 15 KB on an H100, and two blocks or more run on an
// SM. A key of 256 bytes takes 18 cycles of an SM's share of the bandwidth; a query takes one for 128 products and half
// a cycle for the shuffles, so up to about ten queries of a key head, one row of most models, are bound by memory.
template <typename T, int kLanes_, int kParts_>
struct Shape {
  using Element = T;
  static constexpr int kLanes = kLanes_;
  static constexpr int kParts = kParts_;
  static constexpr int kVector = 16 / sizeof(T);
  static constexpr int kElements = kParts * kVector;
  static constexpr int kQuads = kElements / 4;
  static constexpr int kWidth = kLanes * kElements;
  static constexpr int kSlots = kThreads / kLanes * kUnroll;  // keys of a block at a time
};

template <typename S>
struct Tile {
  float4 queries[kTile][S::kQuads][S::kLanes];
  float values[kTile][S::kSlots];
};

__device__ __forceinline__ float to_float(float value) { return value; }
__device__ __forceinline__ float to_float(__half value) { return __half2float(value); }
__device__ __forceinline__ float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }

__device__ __forceinline__ void unpack(unsigned word, float* to, float) { *to = __uint_as_float(word); }
__device__ __forceinline__ void unpack(unsigned word, float* to, __half) {
  to[0] = __half2float(__ushort_as_half(static_cast<unsigned short>(word)));
  to[1] = __half2float(__ushort_as_half(static_cast<unsigned short>(word >> 16)));
}
__device__ __forceinline__ void unpack(unsigned word, float* to, __nv_bfloat16) {
  to[0] = __uint_as_float(word << 16);
  to[1] = __uint_as_float(word & 0xffff0000u);
}

__device__ __forceinline__ int64_t index_at(const IndexMatrix& index, int64_t row, int64_t column) {
  const int64_t offset = row * index.strides[0] + column * index.strides[1];
  return index.is_int64 ? load(static_cast<const int64_t*>(index.data) + offset)
                    : load(static_cast<const int32_t*>(index.data) + offset);
}

// The keys that are visible to a row: those in [first, last) that the mask does not hide.
struct Visible {
  int64_t first;
  int64_t last;
  const uint8_t* mask;
  int64_t stride;

  __device__ __forceinline__ bool at(int64_t key) const {
    return key >= first && key < last && (mask == nullptr || load(mask + key * stride) != 0);
  }
};

__device__ __forceinline__ Visible visible_to(const CaptureParams& p, int64_t batch, int64_t head, int64_t row) {
  Visible visible{0, p.keys, nullptr, p.mask_strides[3]};
  if (p.positions.data != nullptr) {
    const int64_t last = index_at(p.positions, batch, row);
    visible.last = last < p.keys ? last + 1 : p.keys;
    if (p.window != 0) visible.first = last - p.window + 1;
  }
  if (p.mask != nullptr) {
    visible.mask = p.mask + batch * p.mask_strides[0] + head * p.mask_strides[1] + row * p.mask_strides[2];
  }
  return visible;
}

// Rounded before anything is subtracted. Both launches compute it from the same score; fused with a difference, the
// product would keep digits that the maximum has lost, half a percent at logits of 1e5.
__device__ __forceinline__ float logit(const CaptureParams& p, float score) {
  const float scaled = __fmul_rn(score, p.scale);
  return p.softcap == 0.0f ? scaled : __fmul_rn(p.softcap, tanhf(scaled / p.softcap));
}

// e^(logit - top) by the hardware's exp2. The difference of close logits is exact; scaled by log2(e) first, each would
// be rounded.
__device__ __forceinline__ float exponential(float logit, float top) { return exp2f((logit - top) * kLog2E); }

__device__ __forceinline__ float warp_max(float value) {
  for (int lane = 16; lane > 0; lane /= 2) value = fmaxf(value, __shfl_xor_sync(kAllLanes, value, lane));
  return value;
}

__device__ __forceinline__ float warp_sum(float value) {
  for (int lane = 16; lane > 0; lane /= 2) value += __shfl_xor_sync(kAllLanes, value, lane);
  return value;
}

// One vector of an unaligned key, element by element and not past its end.
template <typename S>
__device__ __forceinline__ uint4 load_narrow(const typename S::Element* from, int64_t count) {
  unsigned words[4] = {};
  if constexpr (sizeof(typename S::Element) == 4) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (i < count) words[i] = load(reinterpret_cast<const unsigned*>(from) + i);
    }
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      if (i < count) words[i / 2] |= unsigned{load(reinterpret_cast<const unsigned short*>(from) + i)} << (i % 2 * 16);
    }
  }
  return make_uint4(words[0], words[1], words[2], words[3]);
}

// This lane's part of four keys; zeros where `rows` is null.
template <typename S>
__device__ __forceinline__ void load_keys(const typename S::Element* const (&rows)[kUnroll], bool aligned, int size,
                                          float (&keys)[kUnroll][S::kElements]) {
  const int lane = threadIdx.x % S::kLanes;
  uint4 raw[kUnroll][S::kParts];
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) {
#pragma unroll
    for (int part = 0; part < S::kParts; ++part) {
      const int start = (part * S::kLanes + lane) * S::kVector;
      raw[u][part] = make_uint4(0, 0, 0, 0);
      if (rows[u] == nullptr || start >= size) continue;
      raw[u][part] = aligned ? load(reinterpret_cast<const uint4*>(rows[u] + start))
                             : load_narrow<S>(rows[u] + start, size - start);
    }
  }
  constexpr int kPerWord = 4 / sizeof(typename S::Element);
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) {
#pragma unroll
    for (int part = 0; part < S::kParts; ++part) {
      float* to = keys[u] + part * S::kVector;
      unpack(raw[u][part].x, to, typename S::Element());
      unpack(raw[u][part].y, to + kPerWord, typename S::Element());
      unpack(raw[u][part].z, to + 2 * kPerWord, typename S::Element());
      unpack(raw[u][part].w, to + 3 * kPerWord, typename S::Element());
    }
  }
}

// The queries of a tile: [begin, begin + count) of the key heads [head, head + heads), with `stride` tile rows per
// head. Rows up to the next multiple of kAtOnce are zero.
struct TileQueries {
  int head;
  int heads;
  int begin;
  int count;
  int stride;

  __device__ __forceinline__ int padded() const { return (count + kAtOnce - 1) / kAtOnce * kAtOnce; }
};

template <typename S>
__device__ __forceinline__ void stage_queries(const CaptureParams& p, const CaptureLayer& layer, int64_t batch,
                                              const TileQueries& part, Tile<S>& tile) {
  using T = typename S::Element;
  const int rows = static_cast<int>(p.rows), group = static_cast<int>(p.heads / p.key_heads);
  const int padded = part.padded();
  const T* from = static_cast<const T*>(layer.query) + batch * layer.query_strides[0];
  for (int i = threadIdx.x; i < part.heads * padded * S::kWidth; i += kThreads) {
    const int element = i % S::kWidth, line = i / S::kWidth;
    const int head = line / padded, index = line % padded, query = part.begin + index;
    float value = 0.0f;
    if (index < part.count && part.head + head < p.key_heads && element < p.size) {
      const int64_t at = (part.head + head) * group + query / rows;
      value = to_float(load(from + at * layer.query_strides[1] + query % rows * layer.query_strides[2] +
                            element * layer.query_strides[3]));
    }
    // A lane's four floats are contiguous, and so are the lanes: a quarter warp has no bank conflict.
    const int vector = element / S::kVector, quad = element % S::kVector / 4 + vector / S::kLanes * (S::kVector / 4);
    float* line_of = reinterpret_cast<float*>(&tile.queries[head * part.stride + index][quad][vector % S::kLanes]);
    line_of[element % 4] = value;
  }
}

// sums[query * kUnroll + key] over the lanes of a key. Each step halves the number of values per lane and of lanes that
// share a sum: 15 shuffles for 16 sums over 16 lanes instead of 64. Lane l ends with kKept sums from l * 16 / kLanes
// on.
template <typename S>
struct LaneSums {
  static constexpr int kKept = S::kLanes < kSums ? kSums / S::kLanes : 1;
  static constexpr int kCopies = S::kLanes < kSums ? 1 : S::kLanes / kSums;  // lanes that hold the same sum
  float values[kSums];

  __device__ __forceinline__ void multiply(const float4 (*queries)[S::kQuads][S::kLanes],
                                           const float (&keys)[kUnroll][S::kElements]) {
    const int lane = threadIdx.x % S::kLanes;
#pragma unroll
    for (int query = 0; query < kAtOnce; ++query) {
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) values[query * kUnroll + u] = 0.0f;
#pragma unroll
      for (int quad = 0; quad < S::kQuads; ++quad) {
        const float4 part = queries[query][quad][lane];
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) {
          float& sum = values[query * kUnroll + u];
          sum = fmaf(keys[u][quad * 4], part.x, sum);
          sum = fmaf(keys[u][quad * 4 + 1], part.y, sum);
          sum = fmaf(keys[u][quad * 4 + 2], part.z, sum);
          sum = fmaf(keys[u][quad * 4 + 3], part.w, sum);
        }
      }
    }
  }

  // Template recursion, not a loop: with an index unknown at compile time the sums would be in local memory.
  template <int kDistance = S::kLanes / 2, int kCount = kSums>
  __device__ __forceinline__ void add_lanes() {
    if constexpr (kDistance > 0 && kCount > 1) {
      constexpr int kHalf = kCount / 2;
      const bool upper = (threadIdx.x & kDistance) != 0;
#pragma unroll
      for (int i = 0; i < kHalf; ++i) {
        const float sent = upper ? values[i] : values[i + kHalf];
        values[i] = (upper ? values[i + kHalf] : values[i]) + __shfl_xor_sync(kAllLanes, sent, kDistance);
      }
      add_lanes<kDistance / 2, kHalf>();
    } else if constexpr (kDistance > 0) {
      values[0] += __shfl_xor_sync(kAllLanes, values[0], kDistance);
      add_lanes<kDistance / 2, 1>();
    }
  }

  // The index of the first sum that this lane ends with.
  __device__ __forceinline__ int first() const { return threadIdx.x % S::kLanes * kSums / S::kLanes; }
  __device__ __forceinline__ bool writes() const { return threadIdx.x % kCopies == 0; }
};

}  // namespace carve
