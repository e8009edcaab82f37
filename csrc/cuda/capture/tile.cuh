// Products of queries and keys on tensor cores, straight from the registers that the keys were loaded into.
//
// Queries are A and keys are B of mma.m16n8k16: a fragment of B is then two consecutive words of what one 16-byte load
// brought, and no register is moved. Lane (g, t) = (lane / 4, lane % 4) loads the 16 bytes at elements 32j + 8t of key
// g of a tile of eight; words 0 1 and 2 3 of them are B of steps 2j and 2j + 1, and A has the elements in the same
// order. Column n of tile i of a warp is key 16 (i / 2) + 4 (n / 2) + 2 (i % 2) + n % 2, so that a lane ends with the
// keys 16p + 4t .. + 3 of queries g and g + 8, which it stores with one instruction.
#pragma once

#include "cuda/capture/capture.cuh"

namespace carve {
namespace {

// kPieces x 32 elements a key; kKeyTiles x 8 keys a warp: 8 KB in the 64 registers of each lane, where heads are of 128
// or 256. Two to three blocks of four warps have 64 to 96 KB in flight on a multiprocessor; bandwidth times latency is
// 15 to 25 KB.
template <typename T, int kPieces_, int kKeyTiles_>
struct Shape {
  using Element = T;
  static constexpr int kPieces = kPieces_;
  static constexpr int kKeyTiles = kKeyTiles_;
  static constexpr int kSteps = 2 * kPieces;
  static constexpr int kTileKeys = 8 * kKeyTiles;
  static constexpr int kBlockKeys = kWarps * kTileKeys;
  static constexpr int kScores = 2 * kKeyTiles;  // of a query in a lane
  static constexpr int kTileWords = kSteps * 32;  // of 16 bytes, for a tile of 16 queries in shared memory
};

struct Lane {
  int warp;
  int g;
  int t;

  __device__ __forceinline__ Lane() : warp(threadIdx.x / 32), g(threadIdx.x % 32 / 4), t(threadIdx.x % 4) {}
};

__device__ __forceinline__ int key_of_column(int tile, int g) {
  return 16 * (tile / 2) + 4 * (g / 2) + 2 * (tile % 2) + g % 2;
}

// The key of score n of a lane.
__device__ __forceinline__ int key_of_score(int n, int t) { return 16 * (n / 4) + 4 * t + n % 4; }

// Rows of keys, a multiple of 16 bytes that 32 bits hold after each other.
struct KeyRows {
  const char* first;
  unsigned stride;  // in bytes

  template <typename T>
  __device__ __forceinline__ KeyRows(const T* first, int64_t stride)
      : first(reinterpret_cast<const char*>(first)), stride(static_cast<unsigned>(stride) * sizeof(T)) {}
  __device__ __forceinline__ const char* row(int key) const {
    return first + static_cast<uint64_t>(static_cast<unsigned>(key)) * stride;
  }
};

// The keys of a warp: `key_at(column)` is the number of one. kWhole: a head has exactly kPieces x 32 elements.
template <typename S, bool kWhole, typename KeyAt>
__device__ __forceinline__ void load_keys(const KeyRows& rows, KeyAt key_at, int size,
                                          uint4 (&keys)[S::kKeyTiles][S::kPieces]) {
  const Lane lane;
#pragma unroll
  for (int i = 0; i < S::kKeyTiles; ++i) {
    const char* from = computed(rows.row(key_at(key_of_column(i, lane.g))) + 16 * lane.t);
#pragma unroll
    for (int j = 0; j < S::kPieces; ++j) {
      if constexpr (!kWhole) keys[i][j] = make_uint4(0, 0, 0, 0);
      if (kWhole || 32 * j + 8 * lane.t < size) keys[i][j] = load_stream(from + 64 * j);
    }
  }
}

// Eight elements of a query from `element` on; zeros where there is no query or no element. kAligned: 16 bytes at once.
template <typename T, bool kAligned>
__device__ __forceinline__ uint4 load_query(const CaptureLaunch& launch, const Problem& problem, int head, int row,
                                            int element, bool exists) {
  if (!exists || element >= launch.size) return make_uint4(0, 0, 0, 0);
  const int64_t* strides = problem.arguments.query_strides;
  const T* from = static_cast<const T*>(problem.arguments.query) + problem.batch * strides[0];
  if constexpr (kAligned) {
    const char* bytes = reinterpret_cast<const char*>(from) +
                        static_cast<uint64_t>(static_cast<unsigned>(head)) * static_cast<unsigned>(strides[1] * 2) +
                        static_cast<uint64_t>(static_cast<unsigned>(row)) * static_cast<unsigned>(strides[2] * 2);
    return load(reinterpret_cast<const uint4*>(bytes + 2 * element));
  }
  from += head * strides[1] + row * strides[2] + element * strides[3];
  unsigned long long low = 0, high = 0;
#pragma unroll 1
  for (int i = 0; i < 4; ++i) {
    const auto* word = reinterpret_cast<const unsigned short*>(from + i * strides[3]);
    low |= static_cast<unsigned long long>(load(word)) << 16 * i;
    high |= static_cast<unsigned long long>(load(word + 4 * strides[3])) << 16 * i;
  }
  return make_uint4(static_cast<unsigned>(low), static_cast<unsigned>(low >> 32), static_cast<unsigned>(high),
                    static_cast<unsigned>(high >> 32));
}

template <typename S, int kAtOnce, int kHalves, bool kAligned, typename Place>
__device__ __forceinline__ void stage_pieces(const CaptureLaunch& launch, const Problem& problem, int tiles,
                                             Place place, uint4* staged) {
  using T = typename S::Element;
  const Lane lane;
  const int pieces = tiles * S::kPieces;
#pragma unroll 1
  for (int start = lane.warp; start < pieces; start += kWarps * kAtOnce) {
    uint4 upper[kAtOnce], lower[kAtOnce];
#pragma unroll
    for (int n = 0; n < kAtOnce; ++n) {
      const int piece = start + n * kWarps, tile = piece / S::kPieces, element = 32 * (piece % S::kPieces) + 8 * lane.t;
      int head = 0, row = 0;
      bool exists = piece < pieces && place(tile * 16 + lane.g, head, row);
      upper[n] = load_query<T, kAligned>(launch, problem, head, row, element, exists);
      lower[n] = make_uint4(0, 0, 0, 0);
      if constexpr (kHalves == 2) {
        exists = piece < pieces && place(tile * 16 + 8 + lane.g, head, row);
        lower[n] = load_query<T, kAligned>(launch, problem, head, row, element, exists);
      }
    }
#pragma unroll
    for (int n = 0; n < kAtOnce; ++n) {
      const int piece = start + n * kWarps;
      if (piece >= pieces) break;
      uint4* to = staged + 2 * piece * 32 + threadIdx.x % 32;
      to[0] = make_uint4(upper[n].x, lower[n].x, upper[n].y, lower[n].y);
      to[32] = make_uint4(upper[n].z, lower[n].z, upper[n].w, lower[n].w);
    }
  }
}

// Tiles of 16 queries to shared memory, in the order of A. `place(number, head, row)` says which query has a number,
// and whether there is one. The loads of kAtOnce pieces are in flight together: one after the other they would cost as
// many times the latency of memory. kHalves is 1 where there are no more than eight queries.
template <typename S, int kAtOnce, int kHalves, typename Place>
__device__ __forceinline__ void stage_queries(const CaptureLaunch& launch, const Problem& problem, int tiles,
                                              Place place, uint4* staged) {
  if (launch.query_is_aligned) {
    stage_pieces<S, kAtOnce, kHalves, true>(launch, problem, tiles, place, staged);
  } else {
    stage_pieces<S, 1, kHalves, false>(launch, problem, tiles, place, staged);
  }
}

// The products of kTiles tiles of queries and the keys of a warp: scores[tile][h][n] is query g + 8h and score n. Even
// and odd steps have sums of their own: tensor cores truncate each sum, and chains half as long lose half as much.
template <typename S, int kTiles>
__device__ __forceinline__ void multiply(const uint4 (&keys)[S::kKeyTiles][S::kPieces], const uint4* staged,
                                         float (&scores)[kTiles][2][S::kScores]) {
  float even[kTiles][S::kKeyTiles][4] = {}, odd[kTiles][S::kKeyTiles][4] = {};
  const uint4* from = staged + threadIdx.x % 32;
#pragma unroll
  for (int j = 0; j < S::kPieces; ++j) {
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      const uint4 first = load_shared(from + tile * S::kTileWords + 2 * j * 32);
      const uint4 second = load_shared(from + tile * S::kTileWords + (2 * j + 1) * 32);
#pragma unroll
      for (int i = 0; i < S::kKeyTiles; ++i) {
        multiply_add(even[tile][i], first, keys[i][j].x, keys[i][j].y, typename S::Element());
      }
#pragma unroll
      for (int i = 0; i < S::kKeyTiles; ++i) {
        multiply_add(odd[tile][i], second, keys[i][j].z, keys[i][j].w, typename S::Element());
      }
    }
  }
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
#pragma unroll
      for (int n = 0; n < S::kScores; ++n) {
        scores[tile][h][n] = even[tile][n / 2][2 * h + n % 2] + odd[tile][n / 2][2 * h + n % 2];
      }
    }
  }
}

}  // namespace
}  // namespace carve
