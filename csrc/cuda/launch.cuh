// Host code around a kernel: every call is checked, and the caller's device is restored.
#pragma once

#include <stdexcept>
#include <string>
#include <utility>

#include "cuda/device.cuh"

namespace carve {

inline void check_cuda(cudaError_t error, const char* call) {
  if (error != cudaSuccess) throw std::runtime_error(std::string(call) + ": " + cudaGetErrorString(error));
}

class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    check_cuda(cudaGetDevice(&before_), "cudaGetDevice");
    if (device != before_) check_cuda(cudaSetDevice(device), "cudaSetDevice");
    changed_ = device != before_;
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;
  ~DeviceGuard() {
    if (changed_) static_cast<void>(cudaSetDevice(before_));
  }

 private:
  int before_ = 0;
  bool changed_ = false;
};

// Whether dependent launches may overlap on the current device, asked once: kernels that were compiled for less than
// compute capability 9.0 do not wait.
bool overlaps_launches(int device);

struct Launch {
  const char* name;  // for error messages
  dim3 grid;
  dim3 block;
  size_t shared_bytes;
  cudaStream_t stream;
  // May start before the launch before it in the stream has ended, if that lets it (`start_next_launch`).
  bool overlaps = false;
};

constexpr size_t kSharedBytes = 48 << 10;  // of a block, without opting in to more

template <typename... Wanted, typename... Given>
void launch(const Launch& how, void (*kernel)(Wanted...), Given&&... given) {
  cudaLaunchConfig_t config{};
  config.gridDim = how.grid;
  config.blockDim = how.block;
  config.dynamicSmemBytes = how.shared_bytes;
  config.stream = how.stream;
  cudaLaunchAttribute attribute{};
  if (how.overlaps) {
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
    config.attrs = &attribute;
    config.numAttrs = 1;
  }
  if (how.shared_bytes > kSharedBytes) {
    check_cuda(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                                    static_cast<int>(how.shared_bytes)),
               how.name);
  }
  check_cuda(cudaLaunchKernelEx(&config, kernel, std::forward<Given>(given)...), how.name);
}

}  // namespace carve
