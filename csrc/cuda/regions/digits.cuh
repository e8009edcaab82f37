// Values as sortable integers, and their digits: what radix selection counts in each pass.
#pragma once

#include <cstdint>
#include <type_traits>

#include "cuda/device.cuh"

namespace carve {

using Key = unsigned long long;  // the 64-bit type of the atomics

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

// A float takes three passes, a double six. The first digit is sign, exponent and four bits of the mantissa: few values
// share the threshold's, and those are what a pass adds counters for, from every block, to the same memory. Its 2^13
// counters take 32 KB of shared memory.
constexpr int kMostPasses = 6;
constexpr uint32_t kMostCounts = (1u << 13) + (1u << 11) + 4 * (1u << 10);

template <class T>
constexpr int kPasses = sizeof(T) == 4 ? 3 : 6;

template <class T>
__host__ __device__ constexpr int digit_bits(int pass) {
  if (pass == 0) return 13;
  if (sizeof(T) == 4) return pass == 1 ? 10 : 9;
  return pass == 1 ? 11 : 10;
}

template <class T>
__host__ __device__ constexpr uint32_t count_digits(int pass) {
  return 1u << digit_bits<T>(pass);
}

// The digit of a pass is the bits from shift_after to shift_before.
template <class T>
__host__ __device__ constexpr int shift_before(int pass) {
  int bits = 8 * static_cast<int>(sizeof(T));
  for (int earlier = 0; earlier < pass; ++earlier) bits -= digit_bits<T>(earlier);
  return bits;
}
template <class T>
__host__ __device__ constexpr int shift_after(int pass) {
  return shift_before<T>(pass + 1);
}
static_assert(shift_before<float>(kPasses<float>) == 0 && shift_before<double>(kPasses<double>) == 0);

// Where the counters of a pass begin among those of all.
template <class T>
__host__ __device__ constexpr uint32_t counts_before(int pass) {
  uint32_t counts = 0;
  for (int earlier = 0; earlier < pass; ++earlier) counts += count_digits<T>(earlier);
  return counts;
}
static_assert(counts_before<double>(kPasses<double>) == kMostCounts);

// The digit of a pass that contains the rank.
struct PickedDigit {
  uint32_t digit;
  uint32_t rank;         // among the values with this digit
  uint32_t next;         // the least greater digit that occurs, or the number of digits
  uint32_t is_repeated;  // the value of the next rank has the same digit
};

struct PickShared {
  uint32_t warp_sums[32];
  PickedDigit picked;
};

// Called by all threads of a block; each has a contiguous range of the counts.
template <uint32_t kCounts, uint32_t kThreads>
__device__ __forceinline__ PickedDigit pick_digit(const uint32_t* counts, uint32_t rank, PickShared& shared) {
  constexpr uint32_t kRange = kCounts / kThreads;
  static_assert(kCounts % kThreads == 0 && (kRange == 2 || kRange % 4 == 0));
  const uint32_t begin = threadIdx.x * kRange;
  uint32_t range[kRange];
  if constexpr (kRange == 2) {
    const uint2 two = load_coherent(reinterpret_cast<const uint2*>(counts + begin));
    range[0] = two.x, range[1] = two.y;
  } else {
#pragma unroll
    for (uint32_t index = 0; index < kRange; index += 4) {
      const uint4 four = load_coherent(reinterpret_cast<const uint4*>(counts + begin + index));
      range[index] = four.x, range[index + 1] = four.y, range[index + 2] = four.z, range[index + 3] = four.w;
    }
  }
  uint32_t sum = 0;
#pragma unroll
  for (uint32_t index = 0; index < kRange; ++index) sum += range[index];
  uint32_t before = sum;
  for (unsigned by = 1; by < 32; by *= 2) {
    const uint32_t other = __shfl_up_sync(kAllLanes, before, by);
    if (lane_of_thread() >= by) before += other;
  }
  if (lane_of_thread() == 31) shared.warp_sums[threadIdx.x / 32] = before;
  if (threadIdx.x == 0) shared.picked.next = kCounts;
  __syncthreads();
  before -= sum;
  for (unsigned warp = 0; warp < threadIdx.x / 32; ++warp) before += shared.warp_sums[warp];
  // One thread has the digit, and one from there on the next one that occurs: of its warp, the first that has any.
  const bool is_after = before > rank && sum != 0;
  uint32_t next = kCounts;
  if (before <= rank && rank - before < sum) {
#pragma unroll
    for (uint32_t index = 0; index < kRange; ++index) {
      if (before <= rank && rank - before < range[index]) {
        shared.picked.digit = begin + index;
        shared.picked.rank = rank - before;
        shared.picked.is_repeated = rank - before + 1 < range[index];
      } else if (before > rank && range[index] != 0 && next == kCounts) {
        next = begin + index;
      }
      before += range[index];
    }
  }
  const uint32_t lanes_after = __ballot_sync(kAllLanes, is_after);
  if (lane_of_thread() + 1 == static_cast<uint32_t>(__ffs(static_cast<int>(lanes_after)))) {
#pragma unroll
    for (uint32_t index = kRange; index-- > 0;) {
      if (range[index] != 0) next = begin + index;
    }
  }
  if (next < kCounts) atomicMin(&shared.picked.next, next);
  __syncthreads();
  return shared.picked;
}

}  // namespace carve
