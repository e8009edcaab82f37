// The regions operator, registered through torch's stable ABI; its schema is in carve_kernels/schemas.py.

#include <limits>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include "carve.h"
#include "register_checks.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kOutcomeSize = 6;

carve::RegionsParams parse_options(double keep, int64_t top, int64_t floor, int64_t connectivity, int64_t score) {
  STD_TORCH_CHECK(keep > 0.0 && keep <= 1.0, "regions_cpu: keep: expected a share in (0, 1], got ", keep);
  STD_TORCH_CHECK(top >= 0 && floor >= 0 && (top == 0) != (floor == 0),
                  "regions_cpu: top, floor: expected one of them and 0 for the other, got ", top, " and ", floor);
  STD_TORCH_CHECK(connectivity == 4 || connectivity == 8, "regions_cpu: connectivity: expected 4 or 8, got ",
                  connectivity);
  STD_TORCH_CHECK(score >= 0 && score <= static_cast<int64_t>(carve::Score::kMax),
                  "regions_cpu: score: expected a number from 0 to 2, got ", score);
  carve::RegionsParams params{};
  params.keep = keep;
  params.top = top;
  params.floor = floor;
  params.connectivity = connectivity;
  params.score = static_cast<carve::Score>(score);
  return params;
}

void regions_cpu(const Tensor& saliency, double keep, int64_t top, int64_t floor, int64_t connectivity, int64_t score,
                 Tensor mask, Tensor boxes, Tensor scores, Tensor outcome) {
  carve::RegionsParams params = parse_options(keep, top, floor, connectivity, score);
  params.is_double = saliency.scalar_type() == ScalarType::Double;
  carve::check_tensor(saliency, "regions_cpu: saliency", 2, params.is_double ? ScalarType::Double : ScalarType::Float);
  carve::check_tensor(mask, "regions_cpu: mask", 2, ScalarType::Bool);
  carve::check_tensor(boxes, "regions_cpu: boxes", 2, ScalarType::Long);
  carve::check_tensor(scores, "regions_cpu: scores", 1, ScalarType::Double);
  carve::check_tensor(outcome, "regions_cpu: outcome", 1, ScalarType::Long);
  params.height = saliency.size(0);
  params.width = saliency.size(1);
  params.capacity = boxes.size(0);
  STD_TORCH_CHECK(saliency.numel() <= std::numeric_limits<int32_t>::max(),
                  "regions_cpu: saliency: expected fewer than 2^31 pixels");
  STD_TORCH_CHECK(mask.size(0) == params.height && mask.size(1) == params.width,
                  "regions_cpu: mask: expected the shape of saliency");
  STD_TORCH_CHECK(boxes.size(1) == 4, "regions_cpu: boxes: expected four numbers for each region");
  STD_TORCH_CHECK(scores.size(0) == params.capacity, "regions_cpu: scores: expected as many as boxes");
  STD_TORCH_CHECK(outcome.size(0) == kOutcomeSize, "regions_cpu: outcome: expected ", kOutcomeSize, " numbers");
  params.saliency = saliency.const_data_ptr();
  params.mask = mask.mutable_data_ptr<bool>();
  params.boxes = boxes.mutable_data_ptr<int64_t>();
  params.scores = scores.mutable_data_ptr<double>();

  const carve::RegionsOutcome found = carve::regions_cpu(params);
  int64_t* written = outcome.mutable_data_ptr<int64_t>();
  *written++ = found.kept;
  *written++ = static_cast<int64_t>(found.reason);
  for (int64_t edge : found.box) *written++ = edge;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(carve_kernels, CPU, m) { m.impl("regions_cpu", TORCH_BOX(&regions_cpu)); }
