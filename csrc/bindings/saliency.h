// Checks of the arguments of the operator saliency, and their translation into those of capture, contrast and regions.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include "bindings/capture.h"
#include "bindings/contrast.h"
#include "bindings/regions.h"

namespace carve {
namespace {

constexpr uint64_t kSaliencyArguments = kCaptureArguments + 19;
constexpr const char* kSaliency = "saliency";

// The arguments after those of capture, in the order of the schema.
struct SaliencyOperands {
  explicit SaliencyOperands(OperandStack stack)
      : general(stack.tensor()),
        layer_weights(stack.tensor()),
        step_weights(stack.tensor()),
        shapes(stack.scalar<std::vector<int64_t>>()),
        lam(stack.scalar<double>()),
        lam_is_mean(stack.scalar<bool>()),
        normalize(stack.scalar<int64_t>()),
        keep(stack.scalar<double>()),
        top(stack.scalar<int64_t>()),
        floor(stack.scalar<int64_t>()),
        connectivity(stack.scalar<int64_t>()),
        score(stack.scalar<int64_t>()),
        min_size(stack.scalar<int64_t>()),
        most_blocks(stack.scalar<int64_t>()),
        pixels(stack.tensor()),
        selected(stack.scalar<torch::stable::Tensor>()),
        boxes(stack.scalar<torch::stable::Tensor>()),
        scores(stack.scalar<torch::stable::Tensor>()),
        outcome(stack.scalar<torch::stable::Tensor>()) {}

  Operand general;
  Operand layer_weights;
  Operand step_weights;
  std::vector<int64_t> shapes;
  double lam;
  bool lam_is_mean;
  int64_t normalize;
  double keep;
  int64_t top;
  int64_t floor;
  int64_t connectivity;
  int64_t score;
  int64_t min_size;
  int64_t most_blocks;
  Operand pixels;  // the output of contrast; [height, width] where there are regions
  torch::stable::Tensor selected;
  torch::stable::Tensor boxes;
  torch::stable::Tensor scores;
  torch::stable::Tensor outcome;
};

// The arguments of the three stages. Lives as long as the calls that are translated from it.
struct SaliencyCall {
  explicit SaliencyCall(StableIValue* stack)
      : captured(read_capture(OperandStack(stack))), in(OperandStack(stack + kCaptureArguments)), capture(parse_capture(captured)),
        maps(parse_maps()),
        contrast_operands{kSaliency, maps, in.general, in.layer_weights, in.step_weights, in.pixels},
        contrast(parse_contrast(contrast_operands, in.shapes, in.lam, in.lam_is_mean, in.normalize)) {
    if (has_regions()) regions = parse_selection();
  }

  bool has_regions() const { return in.top != 0 || in.floor != 0; }

  const CaptureOperands captured;
  SaliencyOperands in;
  CaptureCall capture;
  const TaskMaps maps;
  const ContrastOperands contrast_operands;
  const ContrastCall contrast;
  RegionsParams regions{};

 private:
  // The maps of the layers in one step, for one row of queries and one of the batch, are those of a task.
  TaskMaps parse_maps() const {
    const CaptureParams& p = capture.params;
    const bool is_one = p.batch == 1 && p.rows == 1 && !p.each && captured.step && capture.steps == 1;
    check_contrast(kSaliency, is_one && captured.maps.sizes[1] == p.layer_count,
                   "maps: expected one step of the layers of query, one row of queries, one row of the batch, and the "
                   "mean over the heads, got ",
                   captured.maps);
    const int64_t token_stride = captured.maps.strides[captured.maps.dims - 1];
    return {captured.maps,
            {p.layer_count, 1, p.token_count},
            {capture.maps.layer_stride, capture.maps.step_stride, token_stride}};
  }

  RegionsParams parse_selection() {
    AtenTensorHandle shared = nullptr;
    check_shim(aoti_torch_new_tensor_handle(in.pixels.handle(), &shared), "aoti_torch_new_tensor_handle");
    const torch::stable::Tensor saliency(shared);
    for (const torch::stable::Tensor* tensor : {&in.selected, &in.boxes, &in.scores, &in.outcome}) {
      check_contrast(kSaliency, tensor->get_device() == in.pixels.device, "regions: expected tensors on the device of query");
    }
    return parse_regions(kSaliency, saliency, in.keep, in.top, in.floor, in.connectivity, in.score, in.min_size,
                         in.selected, in.boxes, in.scores, in.outcome);
  }
};

}  // namespace
}  // namespace carve
