#include "cuda/capture/maps.cuh"

#include "cuda/launch.cuh"

namespace carve {

void launch_maps(const CaptureLaunch& launch, const CaptureGrid& grid) {
  const CaptureParams& p = launch.params;
  const dim3 blocks(static_cast<unsigned>(launch.token_blocks), static_cast<unsigned>(p.rows),
                    static_cast<unsigned>(grid.layers * p.batch));
  // Four threads a head: all that they write.
  constexpr int64_t kPadded = kThreads / 4;
  static_assert(kPadded % kHeadsAtOnce == 0);
  const int64_t heads = (p.heads + kPadded - 1) / kPadded * kPadded;
  const size_t bytes = sizeof(MapsShared) + sizeof(float2) * static_cast<size_t>(heads);
  const auto stream = static_cast<cudaStream_t>(launch.device.stream);
  carve::launch({"capture_maps", blocks, kThreads, bytes, stream, grid.overlaps},
                p.each ? capture_maps<true> : capture_maps<false>, launch);
}

bool maps_wait_for_launch() {
  cudaFuncAttributes attributes{};
  check_cuda(cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(capture_maps<false>)),
             "cudaFuncGetAttributes");
  return attributes.ptxVersion >= 90;
}

}  // namespace carve
