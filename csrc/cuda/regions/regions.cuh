// Shared by the kernels of regions: the arguments of a call, its scratch memory, and values as sortable integers.
#pragma once

#include <cstdint>
#include <limits>
#include <type_traits>

#include "carve.h"
#include "cuda/launch.cuh"

namespace carve {

using Key = unsigned long long;  // the 64-bit type of the atomics

// Pixel kernels: a step is 32 adjacent pixels of a warp, and each warp has eight steps in flight. With up to 48
// registers five blocks of 256 threads share a multiprocessor (5 x 256 x 48 of 65536), and 5 x 256 threads x 8 loads
// x 4 bytes are 40 KB in flight in each, where 3.35 TB/s x 600 ns / 132 = 15 KB hide the latency of memory.
constexpr int kBlockThreads = 256;
constexpr int kSteps = 8;
constexpr uint32_t kBlockPixels = kBlockThreads * kSteps;

// A tile is labelled by one block: a row of it is the lanes of a warp, and each warp has eight rows.
constexpr uint32_t kTileWidth = 32;
constexpr uint32_t kTileHeight = kSteps * (kBlockThreads / 32);

// 2^11 counters of 4 bytes take 8 KB of shared memory per block, 40 KB for the five blocks of a multiprocessor. A float
// takes three passes (11 + 11 + 10 bits), a double six (5 x 11 + 9).
constexpr int kDigitBits = 11;
constexpr uint32_t kDigits = 1u << kDigitBits;
constexpr int kMostPasses = 6;

constexpr int32_t kOff = -1;  // the label of a pixel below the threshold

// One per call. A part is what a tile has of a region.
struct RegionsState {
  alignas(16) uint32_t counts[kMostPasses][kDigits];
  Key low, high;             // the keys of the least and the greatest value
  Key next;                  // the least key with greater leading digits than the threshold's
  Key prefix[kMostPasses];   // before each pass, the digits that are known
  uint32_t rank[kMostPasses];  // and the rank among the values with these digits
  uint32_t parts, regions;
  int32_t reason;
};

struct RegionsJob {
  const void* saliency;
  uint32_t count, width, height;
  uint32_t rank;     // of the value below the threshold, from 0
  double weight;     // of the farther of the threshold's two neighbours, rounded to the dtype of the saliency
  bool from_above;   // the nearer one is the greater
  bool is_eight;
  Score score;
  double one;  // 1 in fixed point
  double keep;
  int64_t top, floor;
  bool* mask;
  int64_t* boxes;
  double* scores;
  int64_t* outcome;
  int64_t outcome_rows;  // of boxes and scores, which follow the six numbers of the outcome
  RegionsState* state;
  int32_t* labels;  // for each pixel, its part or kOff
  // For each part, in any order: its parent, a part of the same region with no greater number (itself, if a root), then
  // the root; what it adds to its region's score; its first pixel; its box.
  int32_t* parents;
  Key* amounts;  // of a region's root, in the end: its score as an integer that is less for a better one
  int32_t *firsts, *left, *right, *bottom;
  uint32_t* pixels;  // for each part
  int32_t* roots;    // for each region, in any order
  // For each region by rank, in two buffers: its score as in `amounts`, and its first pixel.
  Key* sorted_keys[2];
  int32_t* sorted_firsts[2];
};

__device__ __forceinline__ unsigned lane_of_thread() { return threadIdx.x % 32; }

// An integer for each value that sorts like the value; both zeros have the same.
template <class T>
using BitsOf = std::conditional_t<sizeof(T) == 4, uint32_t, Key>;

__device__ __forceinline__ uint32_t bits_of(float value) { return __float_as_uint(value); }
__device__ __forceinline__ Key bits_of(double value) { return static_cast<Key>(__double_as_longlong(value)); }
__device__ __forceinline__ float from_bits(uint32_t bits) { return __uint_as_float(bits); }
__device__ __forceinline__ double from_bits(Key bits) { return __longlong_as_double(static_cast<long long>(bits)); }

template <class T>
__device__ __forceinline__ BitsOf<T> key_of(T value) {
  constexpr BitsOf<T> kTop = BitsOf<T>(1) << (8 * sizeof(T) - 1);
  const BitsOf<T> bits = bits_of(value == T(0) ? T(0) : value);
  return bits ^ ((bits & kTop) ? ~BitsOf<T>(0) : kTop);
}

template <class T>
__device__ __forceinline__ T value_of(BitsOf<T> key) {
  constexpr BitsOf<T> kTop = BitsOf<T>(1) << (8 * sizeof(T) - 1);
  return from_bits(key ^ ((key & kTop) ? kTop : ~BitsOf<T>(0)));
}

template <class T>
constexpr int kPasses = (8 * static_cast<int>(sizeof(T)) + kDigitBits - 1) / kDigitBits;

// The digit of a pass is the bits from shift_after to shift_before; the last pass may have fewer bits.
template <class T>
__device__ __forceinline__ int shift_after(int pass) {
  const int left = 8 * static_cast<int>(sizeof(T)) - kDigitBits * (pass + 1);
  return left > 0 ? left : 0;
}
template <class T>
__device__ __forceinline__ int shift_before(int pass) {
  return 8 * static_cast<int>(sizeof(T)) - kDigitBits * pass;
}

// The largest absolute value of the saliency, which is 1 in fixed point.
template <class T>
__device__ __forceinline__ double peak_of(const RegionsState* state) {
  const double low = value_of<T>(static_cast<BitsOf<T>>(load_coherent(&state->low)));
  const double high = value_of<T>(static_cast<BitsOf<T>>(load_coherent(&state->high)));
  return -low > high ? -low : high;
}

// The digit of a pass that contains the rank.
struct PickedDigit {
  uint32_t digit;
  uint32_t rank;       // among the values with this digit
  uint32_t next;       // the least greater digit that occurs, or kDigits
  uint32_t is_repeated;  // the value of the next rank has the same digit
};

struct PickShared {
  uint32_t warp_sums[kBlockThreads / 32];
  PickedDigit picked;
};

// Called by all threads of a block; each has a contiguous range of the counts.
__device__ __forceinline__ PickedDigit pick_digit(const uint32_t* counts, uint32_t rank, PickShared& shared) {
  constexpr uint32_t kRange = kDigits / kBlockThreads;
  const uint32_t begin = threadIdx.x * kRange;
  uint32_t range[kRange];
  uint32_t sum = 0;
  static_assert(kRange % 4 == 0);
#pragma unroll
  for (uint32_t index = 0; index < kRange; index += 4) {
    const uint4 four = load_coherent(reinterpret_cast<const uint4*>(counts + begin + index));
    range[index] = four.x, range[index + 1] = four.y, range[index + 2] = four.z, range[index + 3] = four.w;
  }
#pragma unroll
  for (uint32_t index = 0; index < kRange; ++index) sum += range[index];
  uint32_t before = sum;
  for (unsigned by = 1; by < 32; by *= 2) {
    const uint32_t other = __shfl_up_sync(kAllLanes, before, by);
    if (lane_of_thread() >= by) before += other;
  }
  if (lane_of_thread() == 31) shared.warp_sums[threadIdx.x / 32] = before;
  if (threadIdx.x == 0) shared.picked.next = kDigits;
  __syncthreads();
  before -= sum;
  for (unsigned warp = 0; warp < threadIdx.x / 32; ++warp) before += shared.warp_sums[warp];
#pragma unroll
  for (uint32_t index = 0; index < kRange; ++index) {
    if (before <= rank && rank - before < range[index]) {
      shared.picked.digit = begin + index;
      shared.picked.rank = rank - before;
      shared.picked.is_repeated = rank - before + 1 < range[index];
    }
    before += range[index];
  }
  __syncthreads();
  uint32_t next = kDigits;
#pragma unroll
  for (uint32_t index = kRange; index-- > 0;) {
    if (begin + index > shared.picked.digit && range[index] != 0) next = begin + index;
  }
  if (next < kDigits) atomicMin(&shared.picked.next, next);
  __syncthreads();
  return shared.picked;
}

// Whether a previous kernel found a reason for no regions. One lane reads it for its warp.
__device__ __forceinline__ bool has_reason(const RegionsState* state) {
  return __any_sync(kAllLanes, lane_of_thread() == 0 && load_coherent(&state->reason) != 0);
}

// The number of blocks for a kernel that processes `per_block` elements per block at a time.
inline unsigned count_blocks(int64_t elements, int64_t per_block, int64_t most) {
  const int64_t blocks = (elements + per_block - 1) / per_block;
  return static_cast<unsigned>(blocks < 1 ? 1 : blocks < most ? blocks : most);
}

// The launches of each file, called in this order. Each overlaps the one before it where `overlaps`: it reads the
// saliency, which none of them writes, before it waits for that one.
struct RegionsLaunches {
  cudaStream_t stream;
  int64_t most_blocks;
  bool overlaps;

  Launch of(const char* name, unsigned blocks, unsigned threads, size_t shared_bytes = 0) const {
    return {name, blocks, threads, shared_bytes, stream, overlaps};
  }
};
void launch_select(const RegionsJob& job, bool is_double, const RegionsLaunches& how);
void launch_label(const RegionsJob& job, bool is_double, const RegionsLaunches& how);
void launch_join(const RegionsJob& job, int64_t most_regions, const RegionsLaunches& how);
void launch_rank(const RegionsJob& job, bool is_double, int64_t most_regions, const RegionsLaunches& how);

// Whether kernels that were compiled for the current device wait for the launch before them.
bool regions_wait_for_launch();

}  // namespace carve
