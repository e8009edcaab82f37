// Checks of the arguments of the operator saliency, and their translation into those of capture, contrast and regions.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include "bindings/capture.h"
#include "bindings/contrast.h"
#include "bindings/regions.h"

namespace carve {
namespace {

constexpr uint64_t kSaliencyArguments = kCaptureArguments + 18;
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
        most_blocks(stack.scalar<int64_t>()),
        out(stack.tensor()),
        selected(stack.scalar<torch::stable::Tensor>()),
        boxes(stack.scalar<torch::stable::Tensor>()),
        scores(stack.scalar<torch::stable::Tensor>()),
        outcome(stack.scalar<torch::stable::Tensor>()) {}

  bool has_regions() const { return top != 0 || floor != 0; }

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
  int64_t most_blocks;
  Operand out;
  torch::stable::Tensor selected;
  torch::stable::Tensor boxes;
  torch::stable::Tensor scores;
  torch::stable::Tensor outcome;
};

// The layers' maps of one step, one row of the batch and one row of queries, as those of a task.
TaskMaps parse_captured(const CaptureOperands& in, const CaptureCall& call) {
  const CaptureParams& p = call.params;
  const bool is_one = p.batch == 1 && p.rows == 1 && !p.each && in.step && call.steps == 1 && in.first == 0;
  check_contrast(kSaliency, is_one && in.maps.sizes[1] == p.layer_count,
                 "maps: expected one step of the layers, with one row of queries and of the batch and the mean over "
                 "heads, got ", in.maps);
  const int64_t token_stride = in.maps.strides[in.maps.dims - 1];
  return {in.maps, {p.layer_count, 1, p.token_count}, {call.maps.layer_stride, call.maps.step_stride, token_stride}};
}

}  // namespace
}  // namespace carve
