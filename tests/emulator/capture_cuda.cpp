// Compares the CUDA kernels of capture in the emulator with the CPU kernels, on odd sizes, with guard pages around
// every array and in several orders of threads; built with sanitizers, which abort on accesses out of bounds and on
// races.

#include <cstdio>
#include <cstring>
#include <stdexcept>

#include "cpu/capture/kernels.h"
#include "cpu/simd/isa.h"
#include "cuda/capture/capture.cuh"
#include "native/capture_problem.h"

#ifdef BFLOAT_ALONE
// For a quick build: all types compile the same source, and the CPU kernels without vector instructions are enough.
namespace carve {
#ifdef CARVE_X86
const CaptureKernels& capture_kernels_avx2() { std::abort(); }
const CaptureKernels& capture_kernels_avx512() { std::abort(); }
const CaptureKernels& capture_kernels_amx() { std::abort(); }
#endif
void launch_stream_half(const CaptureLaunch&, const CaptureGrid&) { std::abort(); }
void launch_reread_half(const CaptureLaunch&, const CaptureGrid&) { std::abort(); }
}  // namespace carve
#endif

namespace {

void on_device(const carve::CaptureParams& params) {
  // Of a multiple of 16 bytes in every shape here, or of an odd number.
  const bool aligned = params.type != carve::Float::kFloat32 && params.size % 8 == 0;
  const carve::CapturePlan needs = carve::plan_capture(params, aligned);
  Guarded<unsigned char> scratch(needs.bytes);
  std::memset(scratch.get(), 0xff, needs.bytes);
  Guarded<unsigned> tickets(needs.tickets);
  std::memset(tickets.get(), 0, needs.tickets * sizeof(unsigned));
  carve::CaptureDevice device{};
  device.steps = 1;
  device.token_stride = 1;
  device.scratch = scratch.get();
  device.scratch_bytes = needs.bytes;
  device.tickets = tickets.get();
  device.ticket_count = needs.tickets;
  carve::capture_cuda(params, device);
  for (int64_t index = 0; index < needs.tickets; ++index) {
    if (tickets[index] != 0) throw std::runtime_error("a ticket is left");
  }
}

template <typename T>
int check(const Shape& shape, carve::Float type, unsigned seeds) {
  int failures = 0;
  for (View view : {View::kAll, View::kMask, View::kPositions}) {
    for (bool each : {false, true}) {
      const Result expected = run<T>(shape, type, view, each, [](const auto& params) { carve::capture_cpu(params); });
      for (unsigned seed = 0; seed < seeds; ++seed) {
        emulator_configure(seed == 0 ? emulated::kReverse : emulated::kShuffled, seed == 0 ? 1 : 3, seed, 0);
        if (!close(run<T>(shape, type, view, each, on_device), expected)) ++failures;
      }
    }
  }
  return failures;
}

}  // namespace

int main(int count, char** arguments) {
  carve::force_isa(0);
  std::vector<Shape> shapes = {
      {2, 2, 1, 3, 67, 40, 35}, {1, 2, 1, 3, 0, 32, 4},    {2, 6, 2, 5, 77, 40, 19},
      {1, 9, 3, 1, 133, 128, 21}, {1, 1, 1, 8, 65, 256, 3},  {1, 4, 2, 2, 40, 256, 40},
      // More queries of a key head than 8 and than 64, with stored scores; more than 32 whose keys are read again, in one
      // block of rows and in three; rows in turns; keys that are not whole vectors.
      {1, 12, 1, 1, 290, 64, 70}, {1, 12, 1, 7, 100, 128, 20}, {1, 8, 1, 5, 419, 40, 60}, {1, 14, 2, 33, 150, 128, 40},
      {2, 4, 2, 9, 2000, 72, 10}, {1, 3, 1, 3, 70, 33, 9},
  };
  // The last shape has several blocks of tokens, the last of which to finish computes the totals.
  // The argument "first" runs only the first shape, as in every run of the tests; "seeds" runs all in many orders.
  const bool many = count > 1 && std::strcmp(arguments[1], "seeds") == 0;
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
