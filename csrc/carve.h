// What the torch-free sources offer to the files that register operators.
#pragma once

#include <cstdint>

namespace carve {

enum class Normalize { kNone, kSum, kMax, kMinmax };

// All arrays are contiguous and row-major.
struct ContrastParams {
  const float* task;            // [layers, steps, grid_h * grid_w]
  const float* general;         // [layers, general_steps, grid_h * grid_w]
  const double* layer_weights;  // [layers]
  const double* step_weights;   // [steps]
  float* out;                   // [height, width]
  int64_t layers;
  int64_t steps;
  int64_t general_steps;  // steps, or 1: the same general map for every step
  int64_t grid_h;
  int64_t grid_w;
  int64_t height;
  int64_t width;
  double lam;
  bool lam_is_mean;  // lam is the mean of each general map over its tokens, and `lam` is not read
  Normalize normalize;
};

void contrast_cpu(const ContrastParams& params);

}  // namespace carve
