// The contrast of task and general maps: ratio, weighted sum and normalisation on the token grid, one resize.

#include "carve.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

namespace carve {
namespace {

// The part of a line of `in` cells that one of `out` pixels sees: bilinear, widened by the scale when it shrinks.
struct Tap {
  int64_t first;
  std::vector<double> weights;
};

std::vector<Tap> make_taps(int64_t in, int64_t out) {
  const double scale = static_cast<double>(in) / static_cast<double>(out);
  const double support = std::max(scale, 1.0);
  std::vector<Tap> taps(static_cast<size_t>(out));
  for (int64_t pixel = 0; pixel < out; ++pixel) {
    const double center = scale * (static_cast<double>(pixel) + 0.5);
    const int64_t first = std::max<int64_t>(static_cast<int64_t>(center - support + 0.5), 0);
    const int64_t last = std::min<int64_t>(static_cast<int64_t>(center + support + 0.5), in);
    Tap& tap = taps[static_cast<size_t>(pixel)];
    tap.first = first;
    for (int64_t cell = first; cell < last; ++cell) {
      const double distance = std::abs((static_cast<double>(cell) + 0.5 - center) / support);
      tap.weights.push_back(std::max(1.0 - distance, 0.0));
    }
    const double total = std::accumulate(tap.weights.begin(), tap.weights.end(), 0.0);
    for (double& weight : tap.weights) weight /= total;
  }
  return taps;
}

std::vector<double> fuse(const ContrastParams& p) {
  const int64_t tokens = p.grid_h * p.grid_w;
  std::vector<double> grid(static_cast<size_t>(tokens), 0.0);
  for (int64_t layer = 0; layer < p.layers; ++layer) {
    for (int64_t step = 0; step < p.steps; ++step) {
      const float* task = p.task + (layer * p.steps + step) * tokens;
      const float* general = p.general + (layer * p.general_steps + (p.general_steps == 1 ? 0 : step)) * tokens;
      const double lam =
          p.lam_is_mean ? std::accumulate(general, general + tokens, 0.0) / static_cast<double>(tokens) : p.lam;
      const double weight = p.layer_weights[layer] * p.step_weights[step];
      for (int64_t token = 0; token < tokens; ++token) {
        grid[token] += weight * (static_cast<double>(task[token]) / (static_cast<double>(general[token]) + lam));
      }
    }
  }
  return grid;
}

void normalize(std::vector<double>& grid, Normalize kind) {
  if (kind == Normalize::kNone || grid.empty()) return;
  double offset = 0.0;
  double range = 0.0;
  if (kind == Normalize::kSum) {
    range = std::accumulate(grid.begin(), grid.end(), 0.0);
  } else {
    const auto [low, high] = std::minmax_element(grid.begin(), grid.end());
    offset = kind == Normalize::kMinmax ? *low : 0.0;
    range = *high - offset;
  }
  for (double& cell : grid) cell = range == 0.0 ? 0.0 : (cell - offset) / range;
}

void resize(const std::vector<double>& grid, const ContrastParams& p) {
  const std::vector<Tap> columns = make_taps(p.grid_w, p.width);
  const std::vector<Tap> rows = make_taps(p.grid_h, p.height);
  std::vector<double> wide(static_cast<size_t>(p.grid_h * p.width), 0.0);
  for (int64_t row = 0; row < p.grid_h; ++row) {
    const double* from = grid.data() + row * p.grid_w;
    double* to = wide.data() + row * p.width;
    for (int64_t x = 0; x < p.width; ++x) {
      const Tap& tap = columns[x];
      to[x] = std::inner_product(tap.weights.begin(), tap.weights.end(), from + tap.first, 0.0);
    }
  }
  std::vector<double> line(static_cast<size_t>(p.width));
  for (int64_t y = 0; y < p.height; ++y) {
    std::fill(line.begin(), line.end(), 0.0);
    const Tap& tap = rows[y];
    for (size_t index = 0; index < tap.weights.size(); ++index) {
      const double weight = tap.weights[index];
      const double* from = wide.data() + (tap.first + static_cast<int64_t>(index)) * p.width;
      for (int64_t x = 0; x < p.width; ++x) line[x] += weight * from[x];
    }
    std::transform(line.begin(), line.end(), p.out + y * p.width, [](double v) { return static_cast<float>(v); });
  }
}

}  // namespace

void contrast_cpu(const ContrastParams& params) {
  std::vector<double> grid = fuse(params);
  normalize(grid, params.normalize);
  resize(grid, params);
}

}  // namespace carve
