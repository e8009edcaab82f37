#include "cuda/capture/maps.cuh"

#include "cuda/launch.cuh"

namespace carve {
namespace {

// Grid: [token blocks, rows, layers x batch].
template <bool kEach>
__global__ void __launch_bounds__(kThreads, 5) capture_maps(const __grid_constant__ CaptureLaunch launch) {
  write_maps<kEach>(launch, Problem(launch), static_cast<int>(blockIdx.y), static_cast<int>(blockIdx.x));
}

}  // namespace

void launch_maps(const CaptureLaunch& launch, const CaptureGrid& grid) {
  const CaptureParams& p = launch.params;
  const dim3 blocks(static_cast<unsigned>(launch.token_blocks), static_cast<unsigned>(p.rows),
                    static_cast<unsigned>(grid.layers * p.batch));
  const auto stream = static_cast<cudaStream_t>(launch.device.stream);
  carve::launch({"capture_maps", blocks, kThreads, maps_bytes(p.heads), stream, grid.overlaps},
                p.each ? capture_maps<true> : capture_maps<false>, launch);
}

}  // namespace carve
