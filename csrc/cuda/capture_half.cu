#include "cuda/capture_kernels.h"

namespace carve {

void launch_capture_half(const CaptureLaunch& launch, const CapturePlan& plan) {
  launch_capture_of<__half>(launch, plan);
}

}  // namespace carve
