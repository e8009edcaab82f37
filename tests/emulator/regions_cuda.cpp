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
      : mask(new bool[p.frames * p.height * p.width]),
        boxes(p.edges() * p.capacity, -1),
        scores(p.capacity, -1.0),
        outcome(2 + p.edges() + (p.edges() + 1) * rows, -1) {}

  carve::RegionsParams fill(carve::RegionsParams p) {
    p.mask = mask.get();
    p.boxes = boxes.data();
    p.scores = scores.data();
    return p;
  }
};

template <class T>
bool run(int kind, carve::RegionsParams params, int64_t most_blocks, int64_t rows) {
  const int64_t count = params.frames * params.height * params.width;
  std::vector<T> saliency(count);
  for (int64_t index = 0; index < count; ++index) {
    saliency[index] = pattern<T>(kind, index / params.width, index % params.width);
  }
  params.saliency = saliency.data();
  params.is_double = sizeof(T) == 8;
  params.capacity = carve::count_most_regions(params);
  rows = std::min(rows, params.capacity);
  Buffers expected(params, rows);
  const carve::RegionsOutcome outcome = carve::regions_cpu(expected.fill(params));
  int64_t* numbers = expected.outcome.data();
  numbers[0] = outcome.kept, numbers[1] = static_cast<int64_t>(outcome.reason);
  const int64_t edges = params.edges();
  std::copy_n(outcome.box, edges, numbers + 2);
  // The first boxes and scores once more.
  std::copy_n(expected.boxes.begin(), edges * std::min(rows, outcome.kept), numbers + 2 + edges);
  std::memcpy(numbers + 2 + edges + edges * rows, expected.scores.data(), 8 * std::min(rows, outcome.kept));
  Buffers result(params, rows);
  const int64_t bytes = carve::regions_cuda_scratch(params);
  const std::unique_ptr<unsigned char[]> scratch(new unsigned char[bytes]);
  std::memset(scratch.get(), 0xab, bytes);
  carve::regions_cuda(result.fill(params), {0, nullptr, scratch.get(), result.outcome.data(), most_blocks, rows});
  return std::memcmp(result.mask.get(), expected.mask.get(), count) == 0 && result.boxes == expected.boxes &&
         result.scores == expected.scores && result.outcome == expected.outcome;
}

// 0 frames: an image.
struct Size {
  int64_t frames, height, width;
};

// The other parameters are random: every combination would take minutes.
bool run_random(const Size& size, int kind, int order, int number, std::mt19937& random) {
  const auto one_of = [&](std::vector<double> values) { return values[random() % values.size()]; };
  carve::RegionsParams params{};
  params.has_frames = size.frames > 0;
  params.frames = size.frames > 0 ? size.frames : 1;
  params.height = size.height;
  params.width = size.width;
  params.connectivity = random() % 2 ? params.has_frames ? 26 : 8 : params.has_frames ? 6 : 4;
  params.score = static_cast<carve::Score>(number % 3);
  // The first runs, which may be the only ones, have several regions.
  params.keep = number < 6 ? one_of({0.2, 0.5}) : one_of({1.0, 1e-12, 1e-17, 0.2, 0.5});
  params.top = static_cast<int64_t>(one_of({0, 2, 99}));
  params.floor = params.top == 0 ? 3 : 0;
  params.min_size = static_cast<int64_t>(one_of({1, 1, 1, 1, 2, 2, 3, 1e6}));
  const int64_t blocks = random() % 2 ? 2 : 1024;
  emulator_configure(order, order == 0 ? 1 : 5, random(), 0);
  const int64_t rows = static_cast<int64_t>(one_of({0, 1, 3, 1e6}));
  const bool is_double = random() % 4 == 0;
  const bool passes = is_double ? run<double>(kind, params, blocks, rows) : run<float>(kind, params, blocks, rows);
  if (!passes) {
    std::printf("wrong: %d x %d x %d, pattern %d, order %d\n", int(size.frames), int(size.height), int(size.width), kind,
                order);
  }
  return passes;
}

}  // namespace

int main(int argc, char** argv) {
  // "few" is for ThreadSanitizer, where a thread of a kernel costs a third of a millisecond.
  const std::string amount = argc > 1 ? argv[1] : "";
  const bool few = amount == "few";
  const int turns = few ? 1 : amount == "all" ? 9 : 3;
  std::vector<Size> sizes = {{0, 34, 64}, {0, 600, 1}, {3, 6, 33}};
  if (!few) sizes.insert(sizes.end(), {{0, 1, 1}, {0, 1, 9}, {0, 9, 65}, {0, 1, 600}, {0, 64, 65}, {5, 3, 40}});
  if (amount == "all") {
    sizes.insert(sizes.end(), {{0, 0, 7}, {0, 7, 0}, {0, 2, 1}, {0, 1, 2}, {0, 5, 63}, {0, 61, 83}, {0, 3, 2100}});
    sizes.insert(sizes.end(), {{0, 2100, 3}, {0, 131, 130}, {1, 5, 7}, {9, 1, 1}, {4, 7, 5}, {3, 66, 35}, {2, 1, 300}});
  } else if (!few) {
    sizes.push_back({0, 131, 130});
  }
  std::mt19937 random(1);
  int runs = 0;
  for (const Size& size : sizes) {
    // More regions than one block sorts, of the first two patterns.
    const bool is_many = size.height == 131;
    for (int kind = 0; kind < (few ? 3 : is_many ? 2 : kPatterns); ++kind) {
      for (int turn = 0; turn < turns; ++turn) {
        if (!run_random(size, kind, few ? 2 : turn % 3, runs, random)) return 1;
        ++runs;
      }
    }
  }
  std::printf("%d runs are right\n", runs);
  return 0;
}
