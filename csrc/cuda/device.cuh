// Access to device memory, and the instructions that C++ has no name for. The tests replace this header by one that
// runs kernels on a CPU, checks addresses and counts bytes, so kernels access device memory only through these
// functions.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>

namespace carve {

constexpr unsigned kAllLanes = 0xffffffffu;

// A value that no thread of this launch writes, nor of the one before it if the launches overlap.
template <typename T>
__device__ __forceinline__ T load(const T* address) {
  return __ldg(address);
}

// The same address in all the lanes of a warp: one transaction.
template <typename T>
__device__ __forceinline__ T load_uniform(const T* address) {
  return __ldg(address);
}

// 16 bytes that are read once: not kept in the L1 cache. Volatile, so that the loads stay where they are issued, all of
// a tile before the first use.
__device__ __forceinline__ uint4 load_stream(const void* address) {
  uint4 value;
  asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
               : "l"(address));
  return value;
}

// The same address in registers of its own, for loads at constant distances: the compiler would otherwise add each
// distance to the parts that the address is made of.
__device__ __forceinline__ const char* computed(const char* address) {
  asm volatile("" : "+l"(address));
  return address;
}

// The same value, computed before what is volatile after it, such as `wait_for_launch`, and not where it is used.
__device__ __forceinline__ float computed(float value) {
  asm volatile("" : "+f"(value));
  return value;
}

// A value that other threads of this launch or of the one before write: not from the L1 cache, which is not coherent,
// and never moved over a fence or `wait_for_launch`, as __ldcg may be.
__device__ __forceinline__ float load_coherent(const float* address) {
  float value;
  asm volatile("ld.global.cg.f32 %0, [%1];" : "=f"(value) : "l"(address) : "memory");
  return value;
}
__device__ __forceinline__ float2 load_coherent(const float2* address) {
  float2 value;
  asm volatile("ld.global.cg.v2.f32 {%0, %1}, [%2];" : "=f"(value.x), "=f"(value.y) : "l"(address) : "memory");
  return value;
}
__device__ __forceinline__ float4 load_coherent(const float4* address) {
  float4 value;
  asm volatile("ld.global.cg.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(value.x), "=f"(value.y), "=f"(value.z), "=f"(value.w)
               : "l"(address)
               : "memory");
  return value;
}
template <typename T>
__device__ __forceinline__ T load_coherent(const T* address) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8);
  T value;
  if constexpr (sizeof(T) == 4) {
    unsigned bits;
    asm volatile("ld.global.cg.u32 %0, [%1];" : "=r"(bits) : "l"(address) : "memory");
    memcpy(&value, &bits, sizeof(T));
  } else {
    unsigned long long bits;
    asm volatile("ld.global.cg.u64 %0, [%1];" : "=l"(bits) : "l"(address) : "memory");
    memcpy(&value, &bits, sizeof(T));
  }
  return value;
}
__device__ __forceinline__ uint4 load_coherent(const uint4* address) {
  uint4 value;
  asm volatile("ld.global.cg.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
               : "l"(address)
               : "memory");
  return value;
}

// A value that an earlier launch wrote and none writes now: read after `wait_for_launch`, and never moved over it, but
// from the L1 cache where it is there.
template <typename T>
__device__ __forceinline__ T load_settled(const T* address) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8);
  T value;
  if constexpr (sizeof(T) == 4) {
    unsigned bits;
    asm volatile("ld.global.ca.u32 %0, [%1];" : "=r"(bits) : "l"(address) : "memory");
    memcpy(&value, &bits, sizeof(T));
  } else {
    unsigned long long bits;
    asm volatile("ld.global.ca.u64 %0, [%1];" : "=l"(bits) : "l"(address) : "memory");
    memcpy(&value, &bits, sizeof(T));
  }
  return value;
}

template <typename T>
__device__ __forceinline__ void store(T* address, T value) {
  *address = value;
}

// The shared memory of a block as one struct; the launch requests sizeof(T) bytes or more.
template <typename T>
__device__ __forceinline__ T& block_shared() {
  extern __shared__ __align__(16) unsigned char bytes[];
  return *reinterpret_cast<T*>(bytes);
}

// Volatile, so that what a loop reads in every turn is not moved out of it into registers that are needed for keys.
__device__ __forceinline__ uint4 load_shared(const uint4* address) {
  uint4 value;
  asm volatile("ld.volatile.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
               : "r"(static_cast<unsigned>(__cvta_generic_to_shared(address)))
               : "memory");
  return value;
}

// A value of shared memory that other threads of the block change by atomics.
__device__ __forceinline__ int load_shared(const int* address) {
  int value;
  asm volatile("ld.volatile.shared.s32 %0, [%1];"
               : "=r"(value)
               : "r"(static_cast<unsigned>(__cvta_generic_to_shared(address)))
               : "memory");
  return value;
}

// sums[16 x 8] += a[16 x 16] * b[16 x 8], in the lane layout of mma.m16n8k16. With (g, t) = (lane / 4, lane % 4), `a`
// has columns 2t 2t+1 of rows g and g + 8, then columns 2t+8 2t+9 of them; `b0` `b1` have rows 2t 2t+1 and 2t+8 2t+9 of
// column g; `sums` has columns 2t 2t+1 of row g, then of row g + 8.
__device__ __forceinline__ void multiply_add(float (&sums)[4], const uint4& a, unsigned b0, unsigned b1,
                                             __nv_bfloat16) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b0), "r"(b1));
}
__device__ __forceinline__ void multiply_add(float (&sums)[4], const uint4& a, unsigned b0, unsigned b1, __half) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b0), "r"(b1));
}

// Two floats as the halves of a word, the first as the low one.
__device__ __forceinline__ unsigned pack(float low, float high, __nv_bfloat16) {
  unsigned word;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
}
__device__ __forceinline__ unsigned pack(float low, float high, __half) {
  unsigned word;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
}

// The low, and the high, halves of two words as one word.
__device__ __forceinline__ unsigned low_halves(unsigned first, unsigned second) {
  return __byte_perm(first, second, 0x5410);
}
__device__ __forceinline__ unsigned high_halves(unsigned first, unsigned second) {
  return __byte_perm(first, second, 0x7632);
}

// 2^x, of 2 ulp; 0 for -inf, and for results below the normal numbers.
__device__ __forceinline__ float exp2_fast(float x) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

// Orders this thread's accesses, and those that a barrier of the block ordered before it, for the whole device.
__device__ __forceinline__ void fence() { asm volatile("fence.acq_rel.gpu;" ::: "memory"); }

// Programmatic dependent launch, from sm_90 on: the next launch of the stream may start before this one ends, and waits
// in `wait_for_launch` until it has ended and its stores are visible.
__device__ __forceinline__ void start_next_launch() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
__device__ __forceinline__ void wait_for_launch() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

}  // namespace carve
