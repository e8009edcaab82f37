// Runs the CUDA kernels of capture in the emulator, on odd sizes, with garbage around everything and in several orders,
// and holds them against the CPU's; built with sanitizers, where a read or write out of bounds or a race stops it.

#include <cstdio>
#include <cstring>

#include "native/capture_problem.h"
#include "cpu/simd/isa.h"
#include "cuda/capture/capture.cuh"

#ifdef BFLOAT_ALONE
// For a quick build: what is compiled for bfloat16 is the same source as for the others.
namespace carve {
void launch_capture_float(const CaptureLaunch&, const CapturePlan&) { std::abort(); }
void launch_capture_half(const CaptureLaunch&, const CapturePlan&) { std::abort(); }
}  // namespace carve
#endif

namespace {

void on_device(const carve::CaptureParams& params) {
  const int64_t lines = params.batch * params.heads * params.rows;
  const int64_t bytes = (lines * 32 * 8 + params.batch * (params.rows * params.token_count + 1) * 4 + 7) / 8 * 8;
  Guarded<unsigned char> scratch(bytes);
  std::memset(scratch.get(), 0xab, bytes);
  carve::CaptureDevice device{};
  device.steps = 1;
  device.token_stride = 1;
  device.scratch = scratch.get();
  device.scratch_bytes = bytes;
  carve::capture_cuda(params, device);
}

template <typename T>
int check(const Shape& shape, carve::Float type, unsigned seeds) {
  int failures = 0;
  for (View view : {View::kAll, View::kMask, View::kPositions}) {
    for (bool each : {false, true}) {
      const Result wanted = run<T>(shape, type, view, each, [](const auto& params) { carve::capture_cpu(params); });
      for (unsigned seed = 0; seed < seeds; ++seed) {
        emulator_configure(seed == 0 ? emulated::kReverse : emulated::kShuffled, seed == 0 ? 1 : 3, seed, 0);
        if (!close(run<T>(shape, type, view, each, on_device), wanted)) ++failures;
      }
    }
  }
  return failures;
}

}  // namespace

int main(int count, char** words) {
  carve::force_isa(0);
  std::vector<Shape> shapes = {
      {2, 2, 1, 3, 67, 40, 35}, {1, 2, 1, 3, 0, 32, 4},    {2, 6, 2, 5, 77, 40, 19},
      {1, 9, 3, 1, 133, 128, 21}, {1, 1, 1, 8, 65, 256, 3},  {1, 4, 2, 2, 40, 256, 40},
  };
  // The last has several blocks of tokens, of which the last one to come sums up.
  // With an argument the first alone, as every run of the tests has it; "seeds" has all in many orders.
  const bool many = count > 1 && std::strcmp(words[1], "seeds") == 0;
  if (count > 1 && !many) shapes.resize(1);
  const unsigned seeds = many ? 12 : 2;
  int failures = 0;
  for (const Shape& shape : shapes) {
#ifndef BFLOAT_ALONE
    failures += check<float>(shape, carve::Float::kFloat32, seeds);
    failures += check<uint16_t>(shape, carve::Float::kFloat16, seeds);
#endif
    failures += check<uint16_t>(shape, carve::Float::kBfloat16, seeds);
  }
  std::printf("%d failures\n", failures);
  return failures == 0 ? 0 : 1;
}
