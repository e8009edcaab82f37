// Union-find: sets as trees of parents. A parent never has the greater number, and only decreases.
#pragma once

#include <cstdint>

#include "cuda/device.cuh"

namespace carve {

// Parents in shared and in device memory.
struct SharedParents {
  int32_t* parents;
  __device__ __forceinline__ int32_t read(int32_t node) const { return load_shared(parents + node); }
};
struct DeviceParents {
  int32_t* parents;
  __device__ __forceinline__ int32_t read(int32_t node) const { return load_coherent(parents + node); }
};

// The root of a node. The grandparent becomes the parent of each visited node, which halves the path for later calls.
// Parents only decrease, so concurrent updates are safe.
template <class Parents>
__device__ __forceinline__ int32_t find_root(const Parents& of, int32_t node) {
  int32_t parent = of.read(node);
  while (parent != node) {
    const int32_t grandparent = of.read(parent);
    if (grandparent != parent) atomicMin(of.parents + node, grandparent);
    node = parent;
    parent = grandparent;
  }
  return node;
}

// Only a root gets a new parent, one that precedes it. If another thread has joined it meanwhile, its root is found
// again.
template <class Parents>
__device__ __forceinline__ void join(const Parents& of, int32_t high, int32_t low) {
  while (true) {
    high = find_root(of, high);
    low = find_root(of, low);
    if (high == low) return;
    if (high < low) {
      const int32_t swapped = high;
      high = low;
      low = swapped;
    }
    if (atomicCAS(of.parents + high, high, low) == high) return;
  }
}

}  // namespace carve
