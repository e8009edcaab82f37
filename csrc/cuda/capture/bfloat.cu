#include "cuda/capture/reread.cuh"
#include "cuda/capture/stream.cuh"

namespace carve {

void launch_stream_bfloat(const CaptureLaunch& launch, const CaptureGrid& grid) {
  launch_stream_type<__nv_bfloat16>(launch, grid);
}
void launch_reread_bfloat(const CaptureLaunch& launch, const CaptureGrid& grid) {
  launch_reread_type<__nv_bfloat16>(launch, grid);
}

}  // namespace carve
