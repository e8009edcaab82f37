// The arguments of the kernels that attend and capture in one read of keys and values.
#pragma once

#include "cuda/attention/plan.h"
#include "cuda/capture/capture.cuh"

namespace carve {

struct AttentionLaunch {
  CaptureLaunch capture;
  AttentionValue value;
  float* outputs;  // of the splits, [batch, heads, splits, value size], each for the maximum of its split
};
static_assert(sizeof(AttentionLaunch) <= 4096);

// The first kernel; see attend.cuh.
void launch_attend_bfloat(const AttentionLaunch& launch);
void launch_attend_half(const AttentionLaunch& launch);

}  // namespace carve
