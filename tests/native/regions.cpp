// Compares regions with a flood fill on odd sizes and values; built with sanitizers like contrast.

#include <algorithm>
#include <cstdio>
#include <memory>
#include <vector>

#include "carve.h"
#include "native/regions_patterns.h"

namespace {

// Removes the region of a pixel from the mask; its number of pixels.
int64_t erase_region(std::vector<char>& mask, int64_t height, int64_t width, int64_t start, bool eight) {
  std::vector<int64_t> edge{start};
  mask[start] = 0;
  int64_t size = 0;
  while (!edge.empty()) {
    const int64_t pixel = edge.back();
    edge.pop_back();
    ++size;
    for (int64_t y = std::max<int64_t>(pixel / width - 1, 0); y <= std::min(pixel / width + 1, height - 1); ++y) {
      for (int64_t x = std::max<int64_t>(pixel % width - 1, 0); x <= std::min(pixel % width + 1, width - 1); ++x) {
        if (!mask[y * width + x] || (!eight && y != pixel / width && x != pixel % width)) continue;
        mask[y * width + x] = 0;
        edge.push_back(y * width + x);
      }
    }
  }
  return size;
}

template <class T>
bool run(int kind, int64_t height, int64_t width, double keep, int64_t top, carve::RegionsParams params) {
  const int64_t count = height * width;
  // Allocated without slack: the element after the last is out of bounds.
  std::vector<T> saliency(count);
  for (int64_t index = 0; index < count; ++index) saliency[index] = pattern<T>(kind, index / width, index % width);
  params.capacity = (count + 1) / 2;
  const std::unique_ptr<bool[]> mask(new bool[count]);
  std::vector<int64_t> boxes(params.capacity * 4);
  std::vector<double> scores(params.capacity);
  params.saliency = saliency.data();
  params.is_double = sizeof(T) == 8;
  params.height = height;
  params.width = width;
  params.keep = keep;
  params.top = top;
  params.floor = top == 0 ? 3 : 0;
  params.mask = mask.get();
  params.boxes = boxes.data();
  params.scores = scores.data();
  const carve::RegionsOutcome result = carve::regions_cpu(params);
  std::vector<char> remaining(mask.get(), mask.get() + count);
  if (result.kept == 0) {
    return result.reason != carve::Reason::kNone && std::count(remaining.begin(), remaining.end(), 1) == count;
  }
  int64_t regions = 0;
  for (int64_t pixel = 0; pixel < count; ++pixel) {
    if (remaining[pixel]) regions += erase_region(remaining, height, width, pixel, params.connectivity == 8) > 0;
  }
  const bool ordered = params.score != carve::Score::kSum ||
                       std::is_sorted(scores.begin(), scores.begin() + result.kept, std::greater<double>());
  return result.reason == carve::Reason::kNone && regions == result.kept && ordered;
}

}  // namespace

int main() {
  const std::vector<std::pair<int64_t, int64_t>> sizes = {{0, 7}, {7, 0},  {1, 1},   {1, 2},    {2, 1},       {1, 7},
                                                          {1, 8}, {1, 9},  {5, 63},  {17, 64},  {9, 65},      {300, 1},
                                                          {1, 40000},      {40000, 1}, {263, 257}};
  int failures = 0;
  for (const auto& [height, width] : sizes) {
    for (int kind = 0; kind < kPatterns; ++kind) {
      for (int64_t connectivity : {4, 8}) {
        for (carve::Score score : {carve::Score::kSum, carve::Score::kMean, carve::Score::kMax}) {
          for (const auto& [keep, top] : {std::pair<double, int64_t>{0.2, 0}, {1.0, 1}, {1e-12, 99}, {0.5, 2}}) {
            carve::RegionsParams params{};
            params.connectivity = connectivity;
            params.score = score;
            if (!run<float>(kind, height, width, keep, top, params)) ++failures;
            if (!run<double>(kind, height, width, keep, top, params)) ++failures;
          }
        }
      }
    }
  }
  std::printf("%d failures\n", failures);
  return failures == 0 ? 0 : 1;
}
