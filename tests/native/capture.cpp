// Runs capture on odd sizes, with guard pages around every array; built with sanitizers, which abort on a read or write
// out of bounds. Every instruction set of the machine has to give the same result.

#include <cstdio>

#include "cpu/simd/isa.h"
#include "native/capture_problem.h"

namespace {

auto with_threads(int64_t threads) {
  return [=](carve::CaptureParams params) {
    params.threads = threads;
    carve::capture_cpu(params);
  };
}

template <typename T>
int check(const Shape& shape, carve::Float type) {
  int failures = 0;
  for (View view : {View::kAll, View::kMask, View::kPositions}) {
    for (bool each : {false, true}) {
      carve::force_isa(0);
      const Result expected = run<T>(shape, type, view, each, with_threads(1));
      for (int isa = 0; isa <= static_cast<int>(carve::best_isa()); ++isa) {
        carve::force_isa(isa);
        const Result result = run<T>(shape, type, view, each, with_threads(2));
        if (!close(result, expected)) ++failures;
      }
    }
  }
  return failures;
}

}  // namespace

int main() {
  const std::vector<Shape> shapes = {
      {1, 1, 1, 1, 1, 32, 1},     {1, 2, 1, 3, 0, 32, 4},    {2, 6, 2, 5, 77, 40, 19},   {1, 28, 4, 1, 1543, 128, 601},
      {1, 3, 3, 17, 513, 72, 0},  {1, 14, 2, 9, 65, 33, 66}, {2, 4, 4, 33, 31, 80, 30},  {1, 7, 1, 2, 1100, 256, 1000},
      {0, 2, 1, 3, 9, 32, 4},     {1, 2, 1, 0, 9, 32, 4},    {3, 8, 2, 1, 640, 96, 512}, {1, 2, 2, 1, 130, 7, 13},
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
