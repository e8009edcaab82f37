#include "cuda/capture/launch_capture.cuh"

namespace carve {

void launch_capture_bfloat(const CaptureLaunch& launch, const CapturePlan& plan) {
  launch_capture_type<__nv_bfloat16>(launch, plan);
}

}  // namespace carve
