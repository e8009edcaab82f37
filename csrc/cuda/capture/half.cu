#include "cuda/capture/reread.cuh"
#include "cuda/capture/stream.cuh"

namespace carve {

void launch_stream_half(const CaptureLaunch& launch, const CaptureGrid& grid) {
  launch_stream_type<__half>(launch, grid);
}
void launch_reread_half(const CaptureLaunch& launch, const CaptureGrid& grid) {
  launch_reread_type<__half>(launch, grid);
}

}  // namespace carve
