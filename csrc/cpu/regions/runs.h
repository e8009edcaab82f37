// The pixels at or above the threshold, as runs along the rows.
#pragma once

#include <cstdint>
#include <vector>

#include "carve.h"
#include "cpu/simd/isa.h"

namespace carve {

// Adjacent pixels of a row, with their contribution to the score of the region.
struct PixelRun {
  int32_t row;
  int32_t begin;
  int32_t end;
  int64_t sum;  // in fixed point
  double peak;  // the largest value
};

// The fixed-point format: integer sums do not depend on their order.
struct FixedPoint {
  double peak;  // the largest absolute value of the image, which counts as 1
  double one;   // 1 in fixed point
};

// Runs from left to right and from top to bottom. Only the quantity that the score needs is computed.
template <class T>
std::vector<PixelRun> find_runs(Isa isa, const T* values, int64_t height, int64_t width, T threshold, Score score,
                                const FixedPoint& fixed);

}  // namespace carve
