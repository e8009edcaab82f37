// The arguments of regions that only a GPU has, for the operators that find regions there.
#pragma once

#include <algorithm>
#include <cstdint>

#include "bindings/regions.h"
#include "bindings/stream.h"

namespace carve {

// Throws before anything is launched.
inline RegionsDevice parse_regions_device(const char* name, const RegionsParams& params, int64_t most_blocks,
                                          int32_t device_index, void* scratch, int64_t scratch_bytes,
                                          torch::stable::Tensor& outcome) {
  // The pixel index advances by 2048 per block: the stride of the whole grid must fit into 32 bits.
  constexpr int64_t kMostBlocks = 1 << 16;
  const int64_t pixels = params.frames * params.height * params.width;
  const int64_t most = std::min(count_most_regions(params), pixels / params.min_size);
  const int64_t share = static_cast<int64_t>(static_cast<double>(most) * params.keep);
  const int64_t limit = params.top > 0 ? params.top : std::max(params.floor, share);
  STD_TORCH_CHECK(params.capacity >= std::min(most, limit), name, ": boxes: expected at least ",
                  std::min(most, limit), " rows");
  STD_TORCH_CHECK(most_blocks > 0 && most_blocks <= kMostBlocks, name, ": most_blocks: expected 1 to ", kMostBlocks,
                  ", got ", most_blocks);
  const int64_t first = count_outcome(params);
  const int64_t each = count_outcome_row(params);
  const int64_t rows = (outcome.size(0) - first) / each;
  STD_TORCH_CHECK(rows >= 0 && rows <= params.capacity && outcome.size(0) == first + each * rows, name,
                  ": outcome: expected ", first, " numbers and ", each, " for each of up to ", params.capacity,
                  " boxes, got ", outcome.size(0));
  const int64_t bytes = regions_cuda_scratch(params);
  STD_TORCH_CHECK(scratch_bytes >= bytes, name, ": scratch: expected at least ", bytes, " bytes, got ", scratch_bytes);
  STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(scratch) % 16 == 0, name, ": scratch: expected 16-byte alignment");
  RegionsDevice device{};
  device.device = device_index;
  device.stream = current_stream(device_index);
  device.scratch = scratch;
  device.outcome = outcome.mutable_data_ptr<int64_t>();
  device.most_blocks = most_blocks;
  device.outcome_rows = rows;
  return device;
}

}  // namespace carve
