// Contrast of task and general maps: ratio, weighted sum and normalization on the token grid, one resize.

#include "carve.h"

#include <cmath>
#include <vector>

#include "cpu/contrast/resize.h"
#include "cpu/parallel.h"
#include "cpu/simd/isa.h"
#include "cpu/simd/wide.h"

namespace carve {
namespace {

constexpr int64_t kLanes = 16;
constexpr int64_t kRatiosPerPart = 1 << 17;  // fewer do not pay for waking a thread

// A fixed number of partial sums: the same bits with any instruction set.
CARVE_INLINE double sum_of(const float* values, int64_t count) {
  double lanes[kLanes] = {};
  int64_t index = 0;
  for (; index + kLanes <= count; index += kLanes) {
    for (int64_t lane = 0; lane < kLanes; ++lane) lanes[lane] += static_cast<double>(values[index + lane]);
  }
  double total = 0.0;
  for (double lane : lanes) total += lane;
  for (; index < count; ++index) total += static_cast<double>(values[index]);
  return total;
}

// The constant added to each general map, [layers, general_steps].
std::vector<double> find_lams(const ContrastParams& p, Isa isa) {
  std::vector<double> lams(static_cast<size_t>(p.layers * p.general_steps), p.lam);
  if (!p.lam_is_mean) return lams;
  run_wide(isa, [&]() CARVE_INLINE_LAMBDA {
    for (size_t map = 0; map < lams.size(); ++map) {
      const float* general = p.general + static_cast<int64_t>(map) * p.tokens;
      lams[map] = sum_of(general, p.tokens) / static_cast<double>(p.tokens);
    }
  });
  return lams;
}

CARVE_INLINE void add_ratios(const float* __restrict task, const float* __restrict general, double lam,
                                    double weight, int64_t count, double* __restrict fused) {
  for (int64_t token = 0; token < count; ++token) {
    const double denominator = static_cast<double>(general[token]) + lam;
    const double ratio = static_cast<double>(task[token]) / denominator;
    fused[token] += weight * (denominator > 0.0 ? ratio : 0.0);
  }
}

std::vector<double> fuse(const ContrastParams& p, Isa isa) {
  std::vector<double> fused(static_cast<size_t>(p.tokens), 0.0);
  const std::vector<double> lams = find_lams(p, isa);
  // Threads share the tokens: one thread adds all ratios of a token, in a fixed order.
  parallel_for(p.tokens, kRatiosPerPart / (p.layers * p.steps) + 1, [&](int64_t begin, int64_t end) {
    run_wide(isa, [&]() CARVE_INLINE_LAMBDA {
      for (int64_t layer = 0; layer < p.layers; ++layer) {
        for (int64_t step = 0; step < p.steps; ++step) {
          const int64_t map = layer * p.general_steps + (p.general_steps == 1 ? 0 : step);
          add_ratios(p.task + (layer * p.steps + step) * p.tokens + begin, p.general + map * p.tokens + begin,
                     lams[map], p.layer_weights[layer] * p.step_weights[step], end - begin, fused.data() + begin);
        }
      }
    });
  });
  return fused;
}

void normalize(std::vector<double>& fused, Normalize kind) {
  if (kind == Normalize::kNone || fused.empty()) return;
  double low = fused[0];
  double high = fused[0];
  double sum = 0.0;
  // The comparisons propagate NaN, so that the range below is NaN, too.
  for (double value : fused) {
    if (value < low || std::isnan(value)) low = value;
    if (value > high || std::isnan(value)) high = value;
    sum += value;
  }
  const double offset = kind == Normalize::kMinmax ? low : 0.0;
  const double range = kind == Normalize::kSum ? sum : high - offset;
  for (double& value : fused) value = range > 0.0 ? (value - offset) / range : 0.0;
}

}  // namespace

void contrast_cpu(const ContrastParams& params) {
  const Isa isa = active_isa();
  std::vector<double> fused = fuse(params, isa);
  normalize(fused, params.normalize);
  const double* grid = fused.data();
  float* out = params.out;
  for (int64_t index = 0; index < params.view_count; ++index) {
    const ViewShape& view = params.views[index];
    resize(isa, grid, view, out);
    grid += view.grid_h * view.grid_w;
    out += view.height * view.width;
  }
}

}  // namespace carve
