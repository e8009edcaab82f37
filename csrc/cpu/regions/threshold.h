// The threshold of the regions: NumPy's linear percentile, by selection.
#pragma once

#include <cstdint>

#include "cpu/simd/isa.h"

namespace carve {

template <class T>
struct Range {
  T low;
  T high;
  bool is_finite;  // every value is finite; otherwise low and high are undefined
};

// count >= 1.
template <class T>
Range<T> find_range(Isa isa, const T* values, int64_t count);

// numpy.percentile(values, 100 * (1 - keep)), bit for bit, of finite values with the given range.
template <class T>
T find_threshold(Isa isa, const T* values, int64_t count, const Range<T>& range, double keep);

}  // namespace carve
