// Compares the CUDA kernels of regions in the emulator with the CPU kernels, in several orders of threads; built with
// sanitizers, which see every thread of a kernel as a thread.

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "carve.h"
#include "cuda/device.cuh"
#include "native/regions_patterns.h"

namespace {

// Allocated without slack: the element after the last is out of bounds.
struct Buffers {
  std::unique_ptr<bool[]> mask;
  std::vector<int64_t> boxes;
  std::vector<double> scores;
  std::vector<int64_t> outcome;

  Buffers(const carve::RegionsParams& p, int64_t rows)
      : mask(new bool[p.height * p.width]),
        boxes(4 * p.capacity, -1),
        scores(p.capacity, -1.0),
        outcome(6 + 5 * rows, -1) {}

  carve::RegionsParams fill(carve::RegionsParams p) {
    p.mask = mask.get();
    p.boxes = boxes.data();
    p.scores = scores.data();
    return p;
  }
};

template <class T>
bool run(int kind, carve::RegionsParams params, int64_t most_blocks, int64_t rows) {
  const int64_t count = params.height * params.width;
  std::vector<T> saliency(count);
  for (int64_t index = 0; index < count; ++index) {
    saliency[index] = pattern<T>(kind, index / params.width, index % params.width);
  }
  params.saliency = saliency.data();
  params.is_double = sizeof(T) == 8;
  params.capacity = carve::count_most_regions(params.height, params.width, params.connectivity);
  rows = std::min(rows, params.capacity);
  Buffers expected(params, rows);
  const carve::RegionsOutcome outcome = carve::regions_cpu(expected.fill(params));
  int64_t* numbers = expected.outcome.data();
  numbers[0] = outcome.kept, numbers[1] = static_cast<int64_t>(outcome.reason);
  std::copy(outcome.box, outcome.box + 4, numbers + 2);
  // The first boxes and scores once more.
  std::copy_n(expected.boxes.begin(), 4 * std::min(rows, outcome.kept), numbers + 6);
  std::memcpy(numbers + 6 + 4 * rows, expected.scores.data(), 8 * std::min(rows, outcome.kept));
  Buffers result(params, rows);
  const int64_t bytes = carve::regions_cuda_scratch(params.height, params.width, params.connectivity);
  const std::unique_ptr<unsigned char[]> scratch(new unsigned char[bytes]);
  std::memset(scratch.get(), 0xab, bytes);
  carve::regions_cuda(result.fill(params), {0, nullptr, scratch.get(), result.outcome.data(), most_blocks, rows});
  return std::memcmp(result.mask.get(), expected.mask.get(), count) == 0 && result.boxes == expected.boxes &&
         result.scores == expected.scores && result.outcome == expected.outcome;
}

// The other parameters are random: every combination would take minutes.
bool run_random(int64_t height, int64_t width, int kind, int order, int number, std::mt19937& random) {
  const auto one_of = [&](std::vector<double> values) { return values[random() % values.size()]; };
  carve::RegionsParams params{};
  params.height = height;
  params.width = width;
  params.connectivity = random() % 2 ? 8 : 4;
  params.score = static_cast<carve::Score>(number % 3);
  // The first runs, which may be the only ones, have several regions.
  params.keep = number < 6 ? one_of({0.2, 0.5}) : one_of({1.0, 1e-12, 0.2, 0.5});
  params.top = static_cast<int64_t>(one_of({0, 2, 99}));
  params.floor = params.top == 0 ? 3 : 0;
  const int64_t blocks = random() % 2 ? 2 : 1024;
  emulator_configure(order, order == 0 ? 1 : 5, random(), 0);
  const int64_t rows = static_cast<int64_t>(one_of({0, 1, 3, 1e6}));
  const bool is_double = random() % 4 == 0;
  const bool passes = is_double ? run<double>(kind, params, blocks, rows) : run<float>(kind, params, blocks, rows);
  if (!passes) std::printf("wrong: %d x %d, pattern %d, order %d\n", int(height), int(width), kind, order);
  return passes;
}

}  // namespace

int main(int argc, char** argv) {
  // "few" is for ThreadSanitizer, where a thread of a kernel costs a third of a millisecond.
  const std::string amount = argc > 1 ? argv[1] : "";
  const bool few = amount == "few";
  const int turns = few ? 1 : amount == "all" ? 9 : 3;
  std::vector<std::pair<int64_t, int64_t>> sizes = {{34, 64}, {600, 1}};
  if (!few) sizes.insert(sizes.end(), {{1, 1}, {1, 9}, {9, 65}, {1, 600}, {64, 65}});
  if (amount == "all") {
    sizes.insert(sizes.end(), {{0, 7}, {7, 0}, {2, 1}, {1, 2}, {5, 63}, {61, 83}, {3, 2100}, {2100, 3}});
  }
  // More regions than one block sorts, of the first two patterns.
  const std::pair<int64_t, int64_t> many = {131, 130};
  if (!few) sizes.push_back(many);
  std::mt19937 random(1);
  int runs = 0;
  for (const auto& size : sizes) {
    const auto [height, width] = size;
    for (int kind = 0; kind < (few ? 3 : size == many ? 2 : kPatterns); ++kind) {
      for (int turn = 0; turn < turns; ++turn) {
        if (!run_random(height, width, kind, few ? 2 : turn % 3, runs, random)) return 1;
        ++runs;
      }
    }
  }
  std::printf("%d runs are right\n", runs);
  return 0;
}
