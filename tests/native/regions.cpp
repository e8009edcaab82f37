// Compares regions with a flood fill on odd sizes and values; built with sanitizers like contrast.

#include <algorithm>
#include <cstdio>
#include <memory>
#include <vector>

#include "carve.h"
#include "native/regions_patterns.h"

namespace {

// Removes the region of a pixel from the mask; its number of pixels.
int64_t erase_region(std::vector<char>& mask, const carve::RegionsParams& p, int64_t start) {
  const int64_t height = p.height;
  const int64_t width = p.width;
  const int64_t size_of_frame = height * width;
  std::vector<int64_t> edge{start};
  mask[start] = 0;
  int64_t size = 0;
  while (!edge.empty()) {
    const int64_t pixel = edge.back();
    edge.pop_back();
    ++size;
    const int64_t frame = pixel / size_of_frame;
    const int64_t row = pixel / width % height;
    const int64_t column = pixel % width;
    for (int64_t f = std::max<int64_t>(frame - 1, 0); f <= std::min(frame + 1, p.frames - 1); ++f) {
      for (int64_t y = std::max<int64_t>(row - 1, 0); y <= std::min(row + 1, height - 1); ++y) {
        for (int64_t x = std::max<int64_t>(column - 1, 0); x <= std::min(column + 1, width - 1); ++x) {
          const int64_t other = (f * height + y) * width + x;
          if (!mask[other] || (!p.has_corners() && (f != frame) + (y != row) + (x != column) > 1)) continue;
          mask[other] = 0;
          edge.push_back(other);
        }
      }
    }
  }
  return size;
}

template <class T>
bool run(int kind, double keep, int64_t top, carve::RegionsParams params) {
  const int64_t width = params.width;
  const int64_t count = params.frames * params.height * width;
  // Allocated without slack: the element after the last is out of bounds.
  std::vector<T> saliency(count);
  for (int64_t index = 0; index < count; ++index) saliency[index] = pattern<T>(kind, index / width, index % width);
  params.capacity = (count + 1) / 2;
  const std::unique_ptr<bool[]> mask(new bool[count]);
  std::vector<int64_t> boxes(params.capacity * params.edges());
  std::vector<double> scores(params.capacity);
  params.saliency = saliency.data();
  params.is_double = sizeof(T) == 8;
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
  bool are_large = true;
  for (int64_t pixel = 0; pixel < count; ++pixel) {
    if (!remaining[pixel]) continue;
    ++regions;
    are_large = erase_region(remaining, params, pixel) >= params.min_size && are_large;
  }
  const bool ordered = params.score != carve::Score::kSum ||
                       std::is_sorted(scores.begin(), scores.begin() + result.kept, std::greater<double>());
  return result.reason == carve::Reason::kNone && regions == result.kept && ordered && are_large;
}

}  // namespace

int main() {
  struct Size {
    int64_t frames, height, width;  // 0 frames: an image
  };
  const std::vector<Size> sizes = {{0, 0, 7},  {0, 7, 0},   {0, 1, 1},     {0, 1, 2},     {0, 2, 1},
                                   {0, 1, 7},  {0, 1, 8},   {0, 1, 9},     {0, 5, 63},    {0, 17, 64},
                                   {0, 9, 65}, {0, 300, 1}, {0, 1, 40000}, {0, 40000, 1}, {0, 263, 257},
                                   {1, 5, 63}, {5, 1, 1},   {2, 1, 41},    {3, 40, 1},    {7, 19, 65}};
  int failures = 0;
  for (const auto& [frames, height, width] : sizes) {
    for (int kind = 0; kind < kPatterns; ++kind) {
      for (bool corners : {false, true}) {
        for (carve::Score score : {carve::Score::kSum, carve::Score::kMean, carve::Score::kMax}) {
          for (const auto& [keep, top] : {std::pair<double, int64_t>{0.2, 0}, {1.0, 1}, {1e-12, 99}, {0.5, 2}}) {
            carve::RegionsParams params{};
            params.has_frames = frames > 0;
            params.frames = frames > 0 ? frames : 1;
            params.height = height;
            params.width = width;
            params.connectivity = frames > 0 ? corners ? 26 : 6 : corners ? 8 : 4;
            params.score = score;
            for (int64_t min_size : {1, 3}) {
              params.min_size = min_size;
              if (!run<float>(kind, keep, top, params)) ++failures;
              if (!run<double>(kind, keep, top, params)) ++failures;
            }
          }
        }
      }
    }
  }
  std::printf("%d failures\n", failures);
  return failures == 0 ? 0 : 1;
}
