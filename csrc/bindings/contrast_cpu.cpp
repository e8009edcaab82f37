// Contrast, registered through torch's stable ABI; the schema is in carve_kernels/backends/native/schemas.py.

#include <limits>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include "bindings/checks.h"
#include "carve.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

carve::Normalize parse_normalize(int64_t number) {
  STD_TORCH_CHECK(number >= 0 && number <= static_cast<int64_t>(carve::Normalize::kMinmax),
                  "contrast_cpu: normalize: expected a number from 0 to 3, got ", number);
  return static_cast<carve::Normalize>(number);
}

// Four numbers per view: grid_h, grid_w, height, width. The views have to use all tokens and all pixels.
std::vector<carve::ViewShape> parse_shapes(const std::vector<int64_t>& shapes, int64_t tokens, int64_t pixels) {
  STD_TORCH_CHECK(tokens <= std::numeric_limits<int32_t>::max(), "contrast_cpu: task: expected fewer than 2^31 tokens");
  STD_TORCH_CHECK(shapes.size() % 4 == 0, "contrast_cpu: shapes: expected four numbers for each view");
  std::vector<carve::ViewShape> views;
  for (size_t start = 0; start < shapes.size(); start += 4) {
    const carve::ViewShape view{shapes[start], shapes[start + 1], shapes[start + 2], shapes[start + 3]};
    // Division instead of multiplication: the products of very large sizes would overflow.
    STD_TORCH_CHECK(view.grid_h > 0 && view.grid_w > 0 && view.grid_h <= tokens / view.grid_w && view.height > 0 &&
                        view.width > 0 && view.height <= pixels / view.width,
                    "contrast_cpu: shapes: expected views that fit in ", tokens, " tokens and ", pixels, " pixels");
    tokens -= view.grid_h * view.grid_w;
    pixels -= view.height * view.width;
    views.push_back(view);
  }
  STD_TORCH_CHECK(tokens == 0 && pixels == 0, "contrast_cpu: shapes: ", tokens, " tokens and ", pixels,
                  " pixels belong to no view");
  return views;
}

void contrast_cpu(const Tensor& task, const Tensor& general, const Tensor& layer_weights, const Tensor& step_weights,
                  std::vector<int64_t> shapes, double lam, bool lam_is_mean, int64_t normalize, Tensor out) {
  carve::check_tensor(task, "contrast_cpu", "task", 3, ScalarType::Float);
  carve::check_tensor(general, "contrast_cpu", "general", 3, ScalarType::Float);
  carve::check_tensor(layer_weights, "contrast_cpu", "layer_weights", 1, ScalarType::Double);
  carve::check_tensor(step_weights, "contrast_cpu", "step_weights", 1, ScalarType::Double);
  carve::check_tensor(out, "contrast_cpu", "out", 1, ScalarType::Float);
  const int64_t layers = task.size(0);
  const int64_t steps = task.size(1);
  const int64_t general_steps = general.size(1);
  const int64_t tokens = task.size(2);
  const std::vector<carve::ViewShape> views = parse_shapes(shapes, tokens, out.size(0));
  STD_TORCH_CHECK(general.size(0) == layers && general.size(2) == tokens,
                  "contrast_cpu: general: expected the layers and tokens of task");
  STD_TORCH_CHECK(general_steps == steps || general_steps == 1,
                  "contrast_cpu: general: expected 1 or ", steps, " steps, got ", general_steps);
  STD_TORCH_CHECK(layer_weights.size(0) == layers, "contrast_cpu: layer_weights: expected one for each layer");
  STD_TORCH_CHECK(step_weights.size(0) == steps, "contrast_cpu: step_weights: expected one for each step");

  carve::ContrastParams params{};
  params.task = task.const_data_ptr<float>();
  params.general = general.const_data_ptr<float>();
  params.layer_weights = layer_weights.const_data_ptr<double>();
  params.step_weights = step_weights.const_data_ptr<double>();
  params.views = views.data();
  params.out = out.mutable_data_ptr<float>();
  params.layers = layers;
  params.steps = steps;
  params.general_steps = general_steps;
  params.tokens = tokens;
  params.view_count = static_cast<int64_t>(views.size());
  params.lam = lam;
  params.lam_is_mean = lam_is_mean;
  params.normalize = parse_normalize(normalize);
  carve::contrast_cpu(params);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(carve_kernels, CPU, m) { m.impl("contrast_cpu", TORCH_BOX(&contrast_cpu)); }
