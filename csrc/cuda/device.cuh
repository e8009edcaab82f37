// Access to device memory. The tests replace this header by one that runs kernels on a CPU, checks addresses and counts
// bytes, so kernels access device memory only through `load` and `store`.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

namespace carve {

constexpr unsigned kAllLanes = 0xffffffffu;

// A value that no thread of this launch writes.
template <typename T>
__device__ __forceinline__ T load(const T* address) {
  return __ldg(address);
}

// The same address in all the lanes of a warp: one transaction.
template <typename T>
__device__ __forceinline__ T load_uniform(const T* address) {
  return __ldg(address);
}

// A value that other threads of this launch write: not read from the L1 cache, which is not coherent.
template <typename T>
__device__ __forceinline__ T load_coherent(const T* address) {
  return __ldcg(address);
}

template <typename T>
__device__ __forceinline__ void store(T* address, T value) {
  *address = value;
}

// The shared memory of a block as one struct; the launch requests sizeof(T) bytes.
template <typename T>
__device__ __forceinline__ T& block_shared() {
  extern __shared__ __align__(16) unsigned char bytes[];
  return *reinterpret_cast<T*>(bytes);
}

}  // namespace carve
