// The arguments of a capture as the kernels read them: rows of the query, and the keys that a row sees.
#pragma once

#include <cstdint>

#include "carve.h"

namespace carve {

// The keys of a chunk that positions and window make visible to a query row, relative to the start of the chunk.
struct Span {
  int64_t first;
  int64_t last;
};

Span find_visible(const CaptureParams& p, int64_t batch, int64_t row, int64_t start, int64_t keys);

// The mask of a row and chunk as contiguous bytes, copied to `dense` if it is strided; null without a mask.
const uint8_t* mask_of(const CaptureParams& p, int64_t batch, int64_t head, int64_t row, int64_t start, int64_t keys,
                       uint8_t* dense);

// Rows of the query heads of a key head in float32, as [rows, heads of the group, size].
void widen_rows(const CaptureParams& p, const CaptureLayer& layer, int64_t batch, int64_t key_head, int64_t first_row,
                int64_t rows, float* to);

}  // namespace carve
