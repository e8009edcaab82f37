// Runs the CUDA kernels of capture in the emulator, on odd sizes, with garbage around everything and in several orders, and
// holds them against the CPU's; built with sanitizers, where a read or write out of bounds or a race stops it.

#include <cstdio>

#include "capture_problem.h"
#include "cpu/isa.h"
#include "cuda/device.h"

namespace {

void on_device(const carve::CaptureParams& params) {
  const int64_t lines = params.batch * params.heads * params.rows;
  Guarded<unsigned char> scratch(lines * 32 * 8 + params.batch * (params.rows * params.token_count + 1) * 4);
  carve::CaptureDevice device{};
  device.steps = 1;
  device.token_stride = 1;
  // At the end of a page less than 8 bytes are lost to the alignment.
  const int64_t offset = reinterpret_cast<uintptr_t>(scratch.get()) % 8 ? 8 - reinterpret_cast<uintptr_t>(scratch.get()) % 8 : 0;
  device.scratch = scratch.get() + offset;
  device.scratch_bytes = lines * 32 * 8 + params.batch * (params.rows * params.token_count + 1) * 4 - offset;
  carve::capture_cuda(params, device);
}

template <typename T>
int check(const Shape& shape, carve::Float type) {
  int failures = 0;
  for (View view : {View::kAll, View::kMask, View::kPositions}) {
    for (bool each : {false, true}) {
      const Result wanted = run<T>(shape, type, view, each, [](const auto& params) { carve::capture_cpu(params); });
      for (unsigned resident : {1u, 3u}) {
        emulator_configure(resident == 1 ? emulated::kReverse : emulated::kShuffled, resident, 7, 0);
        if (!close(run<T>(shape, type, view, each, on_device), wanted)) ++failures;
      }
    }
  }
  return failures;
}

}  // namespace

int main() {
  carve::force_isa(0);
  const std::vector<Shape> shapes = {
      {1, 2, 1, 3, 0, 32, 4}, {2, 6, 2, 5, 77, 40, 19}, {1, 9, 3, 1, 133, 128, 21}, {1, 1, 1, 8, 65, 256, 3},
  };
  int failures = 0;
  for (const Shape& shape : shapes) {
    failures += check<float>(shape, carve::Float::kFloat32);
    failures += check<uint16_t>(shape, carve::Float::kFloat16);
    failures += check<uint16_t>(shape, carve::Float::kBfloat16);
  }
  std::printf("%d failures\n", failures);
  return failures == 0 ? 0 : 1;
}
