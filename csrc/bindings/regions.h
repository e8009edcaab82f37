// Checks of the regions operators' arguments, and their translation into RegionsParams.
#pragma once

#include <algorithm>
#include <limits>

#include "bindings/checks.h"
#include "carve.h"

namespace carve {

// The numbers of an outcome, and of each box and score that follow them.
inline int64_t count_outcome(const RegionsParams& params) { return 2 + params.edges(); }
inline int64_t count_outcome_row(const RegionsParams& params) { return params.edges() + 1; }

// `name` is the name of the operator, for messages.
inline RegionsParams parse_regions(const char* name, const torch::stable::Tensor& saliency, double keep, int64_t top,
                                   int64_t floor, int64_t connectivity, int64_t score, int64_t min_size,
                                   torch::stable::Tensor& mask, torch::stable::Tensor& boxes,
                                   torch::stable::Tensor& scores,
                                   const torch::stable::Tensor& outcome) {
  using torch::headeronly::ScalarType;
  STD_TORCH_CHECK(keep > 0.0 && keep <= 1.0, name, ": keep: expected a share in (0, 1], got ", keep);
  STD_TORCH_CHECK(top >= 0 && floor >= 0 && (top == 0) != (floor == 0), name,
                  ": top, floor: expected one of them and 0 for the other, got ", top, " and ", floor);
  STD_TORCH_CHECK(score >= 0 && score <= static_cast<int64_t>(Score::kMax), name,
                  ": score: expected a number from 0 to 2, got ", score);
  STD_TORCH_CHECK(min_size >= 1, name, ": min_size: expected at least 1, got ", min_size);
  RegionsParams params{};
  params.keep = keep;
  params.top = top;
  params.floor = floor;
  params.connectivity = connectivity;
  params.score = static_cast<Score>(score);
  params.min_size = min_size;
  params.is_double = saliency.scalar_type() == ScalarType::Double;
  params.has_frames = saliency.dim() == 3;
  const int64_t dims = params.has_frames ? 3 : 2;
  const auto is_one_of = [&](int64_t sides, int64_t corners) { return connectivity == sides || connectivity == corners; };
  STD_TORCH_CHECK(params.has_frames || is_one_of(4, 8), name, ": connectivity: expected 4 or 8, got ", connectivity);
  STD_TORCH_CHECK(!params.has_frames || is_one_of(6, 26), name, ": connectivity: expected 6 or 26 over frames, got ",
                  connectivity);
  check_tensor(saliency, name, "saliency", dims, params.is_double ? ScalarType::Double : ScalarType::Float);
  check_tensor(mask, name, "mask", dims, ScalarType::Bool);
  check_tensor(boxes, name, "boxes", 2, ScalarType::Long);
  check_tensor(scores, name, "scores", 1, ScalarType::Double);
  check_tensor(outcome, name, "outcome", 1, ScalarType::Long);
  params.frames = params.has_frames ? saliency.size(0) : 1;
  params.height = saliency.size(dims - 2);
  params.width = saliency.size(dims - 1);
  params.capacity = boxes.size(0);
  STD_TORCH_CHECK(saliency.numel() <= std::numeric_limits<int32_t>::max(), name,
                  ": saliency: expected fewer than 2^31 pixels");
  for (int64_t dim = 0; dim < dims; ++dim) {
    STD_TORCH_CHECK(mask.size(dim) == saliency.size(dim), name, ": mask: expected the shape of saliency");
  }
  STD_TORCH_CHECK(boxes.size(1) == params.edges(), name, ": boxes: expected ", params.edges(),
                  " numbers for each region");
  STD_TORCH_CHECK(scores.size(0) == params.capacity, name, ": scores: expected as many as boxes");
  params.saliency = saliency.const_data_ptr();
  params.mask = mask.mutable_data_ptr<bool>();
  params.boxes = boxes.mutable_data_ptr<int64_t>();
  params.scores = scores.mutable_data_ptr<double>();
  return params;
}

// An outcome on a CPU, which is no copy of boxes and scores.
inline void check_outcome(const char* name, const RegionsParams& params, const torch::stable::Tensor& outcome) {
  STD_TORCH_CHECK(outcome.size(0) == count_outcome(params), name, ": outcome: expected ", count_outcome(params),
                  " numbers, got ", outcome.size(0));
}

inline void store_outcome(const RegionsParams& params, const RegionsOutcome& found, torch::stable::Tensor& outcome) {
  int64_t* written = outcome.mutable_data_ptr<int64_t>();
  *written++ = found.kept;
  *written++ = static_cast<int64_t>(found.reason);
  std::copy_n(found.box, params.edges(), written);
}

}  // namespace carve
