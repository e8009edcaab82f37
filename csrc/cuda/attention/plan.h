// How a decode step that attends and captures is divided into launches, known without a GPU.
#pragma once

#include "cuda/capture/plan.h"

namespace carve {

struct AttentionPlan : CapturePlan {
  int64_t outputs;  // the offset of the splits' outputs in the scratch, in bytes
};

// From the sizes of one layer and one row. `bytes` and `tickets` are never less for fewer keys or tokens.
AttentionPlan plan_attention(const CaptureParams& sizes, int64_t value_size);

}  // namespace carve
