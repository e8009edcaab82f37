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
    for (int64_t cell = first; cell < last; ++cell) {
      const double distance = std::abs((static_cast<double>(cell) + 0.5 - center) / support);
      // A cell at the very edge has no weight, and must not hand on a NaN either.
      if (distance >= 1.0) continue;
      if (tap.weights.empty()) tap.first = cell;
      tap.weights.push_back(1.0 - distance);
    }
    const double total = std::accumulate(tap.weights.begin(), tap.weights.end(), 0.0);
    for (double& weight : tap.weights) weight /= total;
  }
  return taps;
}

std::vector<double> fuse(const ContrastParams& p) {
  std::vector<double> fused(static_cast<size_t>(p.tokens), 0.0);
  for (int64_t layer = 0; layer < p.layers; ++layer) {
    for (int64_t step = 0; step < p.steps; ++step) {
      const float* task = p.task + (layer * p.steps + step) * p.tokens;
      const float* general = p.general + (layer * p.general_steps + (p.general_steps == 1 ? 0 : step)) * p.tokens;
      const double lam =
          p.lam_is_mean ? std::accumulate(general, general + p.tokens, 0.0) / static_cast<double>(p.tokens) : p.lam;
      const double weight = p.layer_weights[layer] * p.step_weights[step];
      for (int64_t token = 0; token < p.tokens; ++token) {
        const double floor = static_cast<double>(general[token]) + lam;
        fused[token] += weight * (floor > 0.0 ? static_cast<double>(task[token]) / floor : 0.0);
      }
    }
  }
  return fused;
}

void normalize(std::vector<double>& fused, Normalize kind) {
  if (kind == Normalize::kNone || fused.empty()) return;
  double low = fused[0];
  double high = fused[0];
  double sum = 0.0;
  // The comparisons keep a NaN once they have met one, so that the range below is NaN as well.
  for (double value : fused) {
    if (value < low || std::isnan(value)) low = value;
    if (value > high || std::isnan(value)) high = value;
    sum += value;
  }
  const double offset = kind == Normalize::kMinmax ? low : 0.0;
  const double range = kind == Normalize::kSum ? sum : high - offset;
  for (double& value : fused) value = range > 0.0 ? (value - offset) / range : 0.0;
}

void resize(const double* grid, const ViewShape& view, float* out) {
  const std::vector<Tap> columns = make_taps(view.grid_w, view.width);
  const std::vector<Tap> rows = make_taps(view.grid_h, view.height);
  std::vector<double> wide(static_cast<size_t>(view.grid_h * view.width), 0.0);
  for (int64_t row = 0; row < view.grid_h; ++row) {
    const double* from = grid + row * view.grid_w;
    double* to = wide.data() + row * view.width;
    for (int64_t x = 0; x < view.width; ++x) {
      const Tap& tap = columns[x];
      to[x] = std::inner_product(tap.weights.begin(), tap.weights.end(), from + tap.first, 0.0);
    }
  }
  std::vector<double> line(static_cast<size_t>(view.width));
  for (int64_t y = 0; y < view.height; ++y) {
    std::fill(line.begin(), line.end(), 0.0);
    const Tap& tap = rows[y];
    for (size_t index = 0; index < tap.weights.size(); ++index) {
      const double weight = tap.weights[index];
      const double* from = wide.data() + (tap.first + static_cast<int64_t>(index)) * view.width;
      for (int64_t x = 0; x < view.width; ++x) line[x] += weight * from[x];
    }
    std::transform(line.begin(), line.end(), out + y * view.width, [](double v) { return static_cast<float>(v); });
  }
}

}  // namespace

void contrast_cpu(const ContrastParams& params) {
  std::vector<double> fused = fuse(params);
  normalize(fused, params.normalize);
  const double* grid = fused.data();
  float* out = params.out;
  for (int64_t index = 0; index < params.view_count; ++index) {
    const ViewShape& view = params.views[index];
    resize(grid, view, out);
    grid += view.grid_h * view.grid_w;
    out += view.height * view.width;
  }
}

}  // namespace carve
