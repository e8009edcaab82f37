#include "cuda/capture/launch_capture.cuh"

namespace carve {

void launch_capture_float(const CaptureLaunch& launch, const CapturePlan& plan) {
  launch_capture_type<float>(launch, plan);
}

}  // namespace carve
