// Runs the regions' CUDA kernels in the emulator, in several orders of their threads, against the CPU's; built with
// sanitizers, to which every thread of a kernel is a thread.

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

// Exactly as large as needed: one element past the end is past the allocation.
struct Found {
  std::unique_ptr<bool[]> mask;
  std::vector<int64_t> boxes;
  std::vector<double> scores;
  std::vector<int64_t> outcome;

  explicit Found(const carve::RegionsParams& p)
      : mask(new bool[p.height * p.width]), boxes(4 * p.capacity, -1), scores(p.capacity, -1.0), outcome(6, -1) {}

  carve::RegionsParams fill(carve::RegionsParams p) {
    p.mask = mask.get();
    p.boxes = boxes.data();
    p.scores = scores.data();
    return p;
  }
};

template <class T>
bool run(int kind, carve::RegionsParams params, int64_t most_blocks) {
  const int64_t count = params.height * params.width;
  std::vector<T> saliency(count);
  for (int64_t index = 0; index < count; ++index) {
    saliency[index] = pattern<T>(kind, index / params.width, index % params.width);
  }
  params.saliency = saliency.data();
  params.is_double = sizeof(T) == 8;
  params.capacity = carve::count_most_regions(params.height, params.width, params.connectivity);
  Found wanted(params);
  const carve::RegionsOutcome outcome = carve::regions_cpu(wanted.fill(params));
  wanted.outcome = {outcome.kept, static_cast<int64_t>(outcome.reason), outcome.box[0], outcome.box[1], outcome.box[2],
                    outcome.box[3]};
  Found found(params);
  const int64_t bytes = carve::regions_cuda_scratch(params.height, params.width, params.connectivity);
  const std::unique_ptr<unsigned char[]> scratch(new unsigned char[bytes]);
  std::memset(scratch.get(), 0xab, bytes);
  carve::regions_cuda(found.fill(params), {0, nullptr, scratch.get(), found.outcome.data(), most_blocks});
  return std::memcmp(found.mask.get(), wanted.mask.get(), count) == 0 && found.boxes == wanted.boxes &&
         found.scores == wanted.scores && found.outcome == wanted.outcome;
}

// What stands open is drawn: every combination would take minutes.
bool run_drawn(int64_t height, int64_t width, int kind, int order, int number, std::mt19937& random) {
  const auto one_of = [&](std::vector<double> values) { return values[random() % values.size()]; };
  carve::RegionsParams params{};
  params.height = height;
  params.width = width;
  params.connectivity = random() % 2 ? 8 : 4;
  params.score = static_cast<carve::Score>(number % 3);
  // Few runs are not spent on one region or one pixel.
  params.keep = number < 6 ? one_of({0.2, 0.5}) : one_of({1.0, 1e-12, 0.2, 0.5});
  params.top = static_cast<int64_t>(one_of({0, 2, 99}));
  params.floor = params.top == 0 ? 3 : 0;
  const int64_t blocks = random() % 2 ? 2 : 1024;
  emulator_configure(order, order == 0 ? 1 : 5, random(), 0);
  const bool right = random() % 4 == 0 ? run<double>(kind, params, blocks) : run<float>(kind, params, blocks);
  if (!right) std::printf("wrong: %d x %d, pattern %d, order %d\n", int(height), int(width), kind, order);
  return right;
}

}  // namespace

int main(int argc, char** argv) {
  // Under ThreadSanitizer a thread of a kernel costs a third of a millisecond: "few" is for that.
  const std::string amount = argc > 1 ? argv[1] : "";
  const bool few = amount == "few";
  const int turns = few ? 1 : amount == "all" ? 9 : 3;
  std::vector<std::pair<int64_t, int64_t>> sizes = {{34, 64}, {600, 1}};
  if (!few) sizes.insert(sizes.end(), {{1, 1}, {1, 9}, {9, 65}, {1, 600}, {64, 65}});
  if (amount == "all") {
    sizes.insert(sizes.end(), {{0, 7}, {7, 0}, {2, 1}, {1, 2}, {5, 63}, {61, 83}, {3, 2100}, {2100, 3}});
  }
  std::mt19937 random(1);
  int runs = 0;
  for (const auto& [height, width] : sizes) {
    for (int kind = 0; kind < (few ? 3 : kPatterns); ++kind) {
      for (int turn = 0; turn < turns; ++turn) {
        if (!run_drawn(height, width, kind, few ? 2 : turn % 3, runs, random)) return 1;
        ++runs;
      }
    }
  }
  std::printf("%d runs are right\n", runs);
  return 0;
}
