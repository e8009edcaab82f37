#include "cuda/capture/launch_capture.cuh"

namespace carve {

void launch_capture_half(const CaptureLaunch& launch, const CapturePlan& plan) {
  launch_capture_type<__half>(launch, plan);
}

}  // namespace carve
