// The launches of capture for one element type; each type has a source file that includes this.
#pragma once

#include "cuda/capture/maps.cuh"
#include "cuda/launch.cuh"

namespace carve {
namespace {

template <typename S>
void launch_capture(const CaptureLaunch& launch, const CapturePlan& plan) {
  static_assert(sizeof(MapsShared<S>) <= 48 << 10, "more than 48 KB need cudaFuncSetAttribute");
  const CaptureParams& p = launch.params;
  const auto stream = static_cast<cudaStream_t>(launch.device.stream);
  const auto layers = static_cast<unsigned>(plan.layers);
  CaptureLaunch arguments = launch;
  arguments.heads_at_once = 1;
  while (arguments.heads_at_once < 8 && arguments.heads_at_once * 2 <= p.key_heads) arguments.heads_at_once *= 2;
  const int64_t tokens = S::kSlots / arguments.heads_at_once;
  arguments.token_blocks = static_cast<int>(p.token_count > tokens ? (p.token_count + tokens - 1) / tokens : 1);
  if (plan.stats) {
    const dim3 grid(static_cast<unsigned>(p.batch * p.key_heads * arguments.splits), 1, layers);
    carve::launch({"capture_stats", grid, kThreads, sizeof(Tile<S>), stream}, capture_stats<S>, arguments);
  }
  const dim3 grid(static_cast<unsigned>(p.batch * arguments.token_blocks), 1, layers);
  carve::launch({"capture_maps", grid, kThreads, sizeof(MapsShared<S>), stream}, capture_maps<S>, arguments);
}

// One lane per vector of a key, rounded up to 8, 16 or 32 lanes.
template <typename T>
void launch_capture_type(const CaptureLaunch& launch, const CapturePlan& plan) {
  constexpr int64_t kVector = 16 / sizeof(T);
  const int64_t size = launch.params.size;
  if (size <= 8 * kVector) return launch_capture<Shape<T, 8, 1>>(launch, plan);
  if (size <= 16 * kVector) return launch_capture<Shape<T, 16, 1>>(launch, plan);
  if constexpr (sizeof(T) == 4) {
    if (size > 32 * kVector) return launch_capture<Shape<T, 32, 2>>(launch, plan);
  }
  return launch_capture<Shape<T, 32, 1>>(launch, plan);
}

}  // namespace
}  // namespace carve
