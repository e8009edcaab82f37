// How a capture on a GPU is divided into launches and what it needs, known without a GPU; the schema is in
// carve_kernels/backends/native/schemas.py.

#include <algorithm>
#include <vector>

#include <torch/csrc/stable/library.h>

#include "bindings/checks.h"
#include "bindings/dispatch_key.h"
#include "cuda/capture/plan.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

carve::Float parse_element(int64_t bytes) {
  STD_TORCH_CHECK(bytes == 2 || bytes == 4, "capture_plan_cuda: sizes: expected elements of 2 or 4 bytes, got ", bytes);
  return bytes == 4 ? carve::Float::kFloat32 : carve::Float::kBfloat16;
}

// The sizes and the numbers of the plan are those of the schema.
void capture_plan_cuda(const std::vector<int64_t>& sizes, const Tensor& out) {
  constexpr size_t kSizes = 11;
  STD_TORCH_CHECK(sizes.size() == kSizes, "capture_plan_cuda: sizes: expected ", kSizes, " numbers, got ",
                  sizes.size());
  for (int64_t size : sizes) {
    STD_TORCH_CHECK(size >= 0, "capture_plan_cuda: sizes: expected numbers of at least 0, got ", size);
  }
  STD_TORCH_CHECK(sizes[3] > 0 && sizes[2] % sizes[3] == 0,
                  "capture_plan_cuda: sizes: expected a number of key heads that divides that of heads, got ", sizes[3],
                  " and ", sizes[2]);
  const float known = 0.0f;
  carve::CaptureParams params{};
  params.layer_count = sizes[0];
  params.batch = sizes[1];
  params.heads = sizes[2];
  params.key_heads = sizes[3];
  params.rows = sizes[4];
  params.keys = sizes[5];
  params.size = sizes[6];
  params.token_count = sizes[7];
  params.type = parse_element(sizes[8]);
  params.lse = sizes[9] != 0 ? &known : nullptr;
  const carve::CapturePlan plan = carve::plan_capture(params, sizes[10] != 0);
  const int64_t numbers[] = {plan.bytes,  plan.tickets,      plan.is_plain,   plan.is_reread,
                             plan.layers, plan.rows,         plan.query_blocks, plan.split_keys,
                             plan.splits, plan.token_chunks, plan.token_blocks};
  constexpr int64_t kNumbers = sizeof(numbers) / sizeof(numbers[0]);
  carve::check_tensor(out, "capture_plan_cuda", "out", 1, ScalarType::Long);
  STD_TORCH_CHECK(out.size(0) == kNumbers, "capture_plan_cuda: out: expected ", kNumbers, " numbers, got ",
                  out.size(0));
  std::copy(numbers, numbers + kNumbers, out.mutable_data_ptr<int64_t>());
}

}  // namespace

CARVE_CUDA_HOST_LIBRARY(m) { m.impl("capture_plan_cuda", TORCH_BOX(&capture_plan_cuda)); }
