// Runs contrast on odd sizes; built with sanitizers, which abort on a read or write out of bounds.

#include <cmath>
#include <cstdio>
#include <vector>

#include "carve.h"

namespace {

bool run(int64_t layers, int64_t steps, int64_t general_steps, const std::vector<carve::ViewShape>& views,
         carve::Normalize normalize, bool lam_is_mean) {
  int64_t tokens = 0;
  int64_t pixels = 0;
  for (const carve::ViewShape& view : views) {
    tokens += view.grid_h * view.grid_w;
    pixels += view.height * view.width;
  }
  std::vector<float> task(layers * steps * tokens);
  std::vector<float> general(layers * general_steps * tokens);
  for (size_t index = 0; index < task.size(); ++index) task[index] = 1e-4f * static_cast<float>(1 + index % 17);
  for (size_t index = 0; index < general.size(); ++index) general[index] = 1e-4f * static_cast<float>(1 + index % 13);
  const std::vector<double> layer_weights(layers, 1.0);
  const std::vector<double> step_weights(steps, 1.0);
  std::vector<float> out(pixels, NAN);

  carve::ContrastParams params{};
  params.task = task.data();
  params.general = general.data();
  params.layer_weights = layer_weights.data();
  params.step_weights = step_weights.data();
  params.views = views.data();
  params.out = out.data();
  params.layers = layers;
  params.steps = steps;
  params.general_steps = general_steps;
  params.tokens = tokens;
  params.view_count = static_cast<int64_t>(views.size());
  params.lam = 1e-4;
  params.lam_is_mean = lam_is_mean;
  params.normalize = normalize;
  carve::contrast_cpu(params);
  for (float pixel : out) {
    if (!std::isfinite(pixel)) return false;
  }
  return true;
}

}  // namespace

int main() {
  using carve::Normalize;
  const std::vector<std::vector<carve::ViewShape>> cases = {
      {{1, 1, 1, 1}},    {{1, 1, 5, 7}},      {{3, 5, 1, 1}},     {{7, 11, 101, 53}},
      {{18, 32, 3, 2}},  {{5, 1, 4, 1000}},   {{37, 41, 36, 43}}, {{24, 24, 24, 24}, {1, 1, 3, 3}, {2, 5, 1, 9}},
  };
  int failures = 0;
  for (const auto& views : cases) {
    for (Normalize normalize : {Normalize::kNone, Normalize::kSum, Normalize::kMax, Normalize::kMinmax}) {
      for (bool lam_is_mean : {false, true}) {
        for (int64_t general_steps : {1, 3}) {
          if (!run(2, 3, general_steps, views, normalize, lam_is_mean)) ++failures;
        }
      }
    }
  }
  std::printf("%d failures\n", failures);
  return failures == 0 ? 0 : 1;
}
