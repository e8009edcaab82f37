// The pixels at or above the threshold, as runs along the rows.
#pragma once

#include <cstdint>
#include <vector>

#include "carve.h"
#include "cpu/simd/isa.h"

namespace carve {

// Pixels of a row side by side, with what their region's score is made of.
struct PixelRun {
  int32_t row;
  int32_t begin;
  int32_t end;
  int64_t sum;  // in fixed point
  double peak;  // the largest value
};

// One is this much in fixed point: sums of whole numbers are the same in any order.
struct FixedPoint {
  double peak;  // the largest absolute value of the picture, which counts as 1
  double one;
};

// Runs from left to right and from top to bottom. Only what the score needs is measured.
template <class T>
std::vector<PixelRun> find_runs(Isa isa, const T* values, int64_t height, int64_t width, T threshold, Score score,
                           const FixedPoint& fixed);

}  // namespace carve
