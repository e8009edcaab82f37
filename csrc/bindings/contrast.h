// Checks of the arguments of the contrast operators, and their translation into ContrastParams.
#pragma once

#include <algorithm>
#include <limits>
#include <utility>
#include <vector>

#include "bindings/operands.h"
#include "carve.h"

namespace carve {
namespace {

// The maps of a task, [layers, steps, tokens], in a tensor that may have further dimensions of one element.
struct TaskMaps {
  const Operand& tensor;
  int64_t sizes[3];
  int64_t strides[3];
};

// The tensors of a contrast; `name` is that of the operator, for messages.
struct ContrastOperands {
  const char* name;
  TaskMaps task;
  const Operand& general;
  const Operand& layer_weights;
  const Operand& step_weights;
  const Operand& out;
};

// The parameters of the kernels; `params.views` points into `views`.
struct ContrastCall {
  ContrastParams params;
  std::vector<ViewShape> views;
};

template <typename... T>
inline void check_contrast(const char* name, bool holds, const T&... message) {
  if (!holds) fail(name, ": ", message...);
}

inline void check_kind(const char* name, const Operand& tensor, const char* argument, int64_t dims, int32_t dtype) {
  check_contrast(name, tensor.dtype == dtype && tensor.dims == dims, argument, ": expected ", name_dtype(dtype),
                 " with ", dims, " dimensions, got ", tensor);
}

TaskMaps parse_task(const char* name, const Operand& task) {
  check_kind(name, task, "task", 3, kDtypes.float32);
  TaskMaps maps{task, {}, {}};
  std::copy_n(task.sizes, 3, maps.sizes);
  std::copy_n(task.strides, 3, maps.strides);
  return maps;
}

// Four numbers a view: grid_h, grid_w, height, width. The views have to use all tokens and all pixels.
std::vector<ViewShape> parse_shapes(const char* name, const std::vector<int64_t>& shapes, int64_t tokens,
                                    int64_t pixels) {
  check_contrast(name, tokens <= std::numeric_limits<int32_t>::max(), "task: expected fewer than 2^31 tokens, got ",
                 tokens);
  check_contrast(name, shapes.size() % 4 == 0, "shapes: expected four numbers for each view, got ", shapes.size());
  std::vector<ViewShape> views;
  for (size_t start = 0; start < shapes.size(); start += 4) {
    const ViewShape view{shapes[start], shapes[start + 1], shapes[start + 2], shapes[start + 3]};
    // Division instead of multiplication: the products of very large sizes would overflow.
    check_contrast(name,
                   view.grid_h > 0 && view.grid_w > 0 && view.grid_h <= tokens / view.grid_w && view.height > 0 &&
                       view.width > 0 && view.height <= pixels / view.width,
                   "shapes: expected views that fit in ", tokens, " tokens and ", pixels, " pixels");
    tokens -= view.grid_h * view.grid_w;
    pixels -= view.height * view.width;
    views.push_back(view);
  }
  check_contrast(name, tokens == 0 && pixels == 0, "shapes: ", tokens, " tokens and ", pixels,
                 " pixels belong to no view");
  return views;
}

// Throws before anything is read or written.
ContrastCall parse_contrast(const ContrastOperands& in, const std::vector<int64_t>& shapes, double lam,
                            bool lam_is_mean, int64_t normalize) {
  const char* name = in.name;
  check_kind(name, in.general, "general", 3, kDtypes.float32);
  check_kind(name, in.layer_weights, "layer_weights", 1, kDtypes.float64);
  check_kind(name, in.step_weights, "step_weights", 1, kDtypes.float64);
  check_contrast(name, in.out.dtype == kDtypes.float32, "out: expected float32, got ", in.out);
  for (const auto& [tensor, argument] :
       {std::pair(&in.general, "general"), std::pair(&in.layer_weights, "layer_weights"),
        std::pair(&in.step_weights, "step_weights"), std::pair(&in.out, "out")}) {
    check_contrast(name, tensor->is_on_device_of(in.task.tensor), argument, ": expected a tensor on the device of task");
  }
  for (const auto& [tensor, argument] : {std::pair(&in.layer_weights, "layer_weights"),
                                         std::pair(&in.step_weights, "step_weights"), std::pair(&in.out, "out")}) {
    check_contrast(name, tensor->is_contiguous(), argument, ": expected a contiguous tensor, got ", *tensor);
  }
  ContrastCall call{};
  ContrastParams& p = call.params;
  p.layers = in.task.sizes[0];
  p.steps = in.task.sizes[1];
  p.tokens = in.task.sizes[2];
  p.general_steps = in.general.sizes[1];
  check_contrast(name, in.general.sizes[0] == p.layers && in.general.sizes[2] == p.tokens,
                 "general: expected the layers and tokens of task, got ", in.general);
  check_contrast(name, p.general_steps == p.steps || p.general_steps == 1, "general: expected 1 or ", p.steps,
                 " steps, got ", in.general);
  check_contrast(name, in.layer_weights.sizes[0] == p.layers, "layer_weights: expected one for each layer, got ",
                 in.layer_weights);
  check_contrast(name, in.step_weights.sizes[0] == p.steps, "step_weights: expected one for each step, got ",
                 in.step_weights);
  check_contrast(name, normalize >= 0 && normalize <= static_cast<int64_t>(Normalize::kMinmax),
                 "normalize: expected a number from 0 to 3, got ", normalize);
  call.views = parse_shapes(name, shapes, p.tokens, in.out.numel());
  p.task = static_cast<const float*>(in.task.tensor.data());
  p.general = static_cast<const float*>(in.general.data());
  p.layer_weights = static_cast<const double*>(in.layer_weights.data());
  p.step_weights = static_cast<const double*>(in.step_weights.data());
  p.out = static_cast<float*>(in.out.mutable_data());
  p.views = call.views.data();
  p.view_count = static_cast<int64_t>(call.views.size());
  p.lam = lam;
  p.lam_is_mean = lam_is_mean;
  p.normalize = static_cast<Normalize>(normalize);
  return call;
}

}  // namespace
}  // namespace carve
