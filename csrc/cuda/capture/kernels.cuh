// The launches of capture for one type of element; included by one source file a type.
#pragma once

#include "cuda/capture/maps.cuh"
#include "cuda/launch.cuh"

namespace carve {
namespace {

template <typename S>
void launch_capture(const CaptureLaunch& launch, const CapturePlan& plan) {
  static_assert(sizeof(MapsShared<S>) <= 48 << 10, "more has to be asked for by cudaFuncSetAttribute");
  const CaptureParams& p = launch.params;
  const auto stream = static_cast<cudaStream_t>(launch.device.stream);
  const auto layers = static_cast<unsigned>(plan.layers);
  CaptureLaunch own = launch;
  own.heads_at_once = 1;
  while (own.heads_at_once < 8 && own.heads_at_once * 2 <= p.key_heads) own.heads_at_once *= 2;
  const int64_t tokens = S::kSlots / own.heads_at_once;
  own.token_blocks = static_cast<int>(p.token_count > tokens ? (p.token_count + tokens - 1) / tokens : 1);
  if (plan.stats) {
    const dim3 grid(static_cast<unsigned>(p.batch * p.key_heads * own.splits), 1, layers);
    carve::launch({"capture_stats", grid, kThreads, sizeof(Tile<S>), stream}, capture_stats<S>, own);
  }
  const dim3 grid(static_cast<unsigned>(p.batch * own.token_blocks), 1, layers);
  carve::launch({"capture_maps", grid, kThreads, sizeof(MapsShared<S>), stream}, capture_maps<S>, own);
}

// As many lanes as a key has vectors, rounded up to 8, 16 or 32.
template <typename T>
void launch_capture_of(const CaptureLaunch& launch, const CapturePlan& plan) {
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
