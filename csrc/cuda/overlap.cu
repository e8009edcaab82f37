// Whether a launch may start before the one before it has ended.

#include <atomic>

#include "cuda/launch.cuh"

namespace carve {
namespace {

constexpr int kDevices = 64;

// Compiled for the same architectures as every other kernel; never launched.
__global__ void waiting_kernel() { wait_for_launch(); }

bool waits_on_current_device() {
  cudaFuncAttributes attributes{};
  check_cuda(cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(waiting_kernel)),
             "cudaFuncGetAttributes");
  return attributes.ptxVersion >= 90;
}

}  // namespace

bool overlaps_launches(int device) {
  static std::atomic<signed char> known[kDevices];
  signed char found = device < kDevices ? known[device].load(std::memory_order_relaxed) : static_cast<signed char>(0);
  if (found == 0) {
    found = waits_on_current_device() ? 1 : -1;
    if (device < kDevices) known[device].store(found, std::memory_order_relaxed);
  }
  return found > 0;
}

}  // namespace carve
