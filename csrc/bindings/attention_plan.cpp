// What a decode step that attends and captures on a GPU needs, known without a GPU; the schema is in
// carve_kernels/backends/native/schemas.py.

#include <algorithm>
#include <vector>

#include <torch/csrc/stable/library.h>

#include "bindings/checks.h"
#include "bindings/dispatch_key.h"
#include "cuda/attention/plan.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// The sizes and the numbers of the plan are those of the schema.
void attention_plan_cuda(const std::vector<int64_t>& sizes, const Tensor& out) {
  constexpr size_t kSizes = 7;
  STD_TORCH_CHECK(sizes.size() == kSizes, "attention_plan_cuda: sizes: expected ", kSizes, " numbers, got ",
                  sizes.size());
  for (int64_t size : sizes) {
    STD_TORCH_CHECK(size >= 0, "attention_plan_cuda: sizes: expected numbers of at least 0, got ", size);
  }
  STD_TORCH_CHECK(sizes[2] > 0 && sizes[1] % sizes[2] == 0,
                  "attention_plan_cuda: sizes: expected a number of key heads that divides that of heads, got ",
                  sizes[2], " and ", sizes[1]);
  carve::CaptureParams params{};
  params.layer_count = 1;
  params.batch = sizes[0];
  params.heads = sizes[1];
  params.key_heads = sizes[2];
  params.rows = 1;
  params.keys = sizes[3];
  params.size = sizes[4];
  params.token_count = sizes[6];
  const carve::AttentionPlan plan = carve::plan_attention(params, sizes[5]);
  const int64_t numbers[] = {plan.bytes,  plan.tickets,      plan.split_keys,
                             plan.splits, plan.token_chunks, plan.token_blocks};
  constexpr int64_t kNumbers = sizeof(numbers) / sizeof(numbers[0]);
  carve::check_tensor(out, "attention_plan_cuda", "out", 1, ScalarType::Long);
  STD_TORCH_CHECK(out.size(0) == kNumbers, "attention_plan_cuda: out: expected ", kNumbers, " numbers, got ",
                  out.size(0));
  std::copy(numbers, numbers + kNumbers, out.mutable_data_ptr<int64_t>());
}

}  // namespace

CARVE_CUDA_HOST_LIBRARY(m) { m.impl("attention_plan_cuda", TORCH_BOX(&attention_plan_cuda)); }
