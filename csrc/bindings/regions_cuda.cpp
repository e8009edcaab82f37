// Regions on a GPU, registered through torch's stable ABI; the schema is in carve_kernels/backends/native/schemas.py.

#include <algorithm>
#include <cstdint>

#include <torch/csrc/stable/library.h>

#include "bindings/dispatch_key.h"
#include "bindings/regions.h"
#include "bindings/stream.h"
#include "carve.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// The pixel index advances by 2048 per block: the stride of the whole grid must fit into 32 bits.
constexpr int64_t kMostBlocks = 1 << 16;

void regions_cuda(const Tensor& saliency, double keep, int64_t top, int64_t floor, int64_t connectivity, int64_t score,
                  int64_t most_blocks, Tensor scratch, Tensor mask, Tensor boxes, Tensor scores, Tensor outcome) {
  const char* name = "regions_cuda";
  carve::RegionsParams params = carve::parse_regions(name, saliency, keep, top, floor, connectivity, score, mask, boxes,
                                                     scores, outcome);
  const int64_t most = carve::count_most_regions(params.height, params.width, connectivity);
  const int64_t limit = top > 0 ? top : std::max(floor, static_cast<int64_t>(static_cast<double>(most) * keep));
  STD_TORCH_CHECK(params.capacity >= std::min(most, limit), name, ": boxes: expected at least ",
                  std::min(most, limit), " rows");
  STD_TORCH_CHECK(most_blocks > 0 && most_blocks <= kMostBlocks, name, ": most_blocks: expected 1 to ", kMostBlocks,
                  ", got ", most_blocks);
  const int64_t rows = (outcome.size(0) - carve::kRegionsOutcome) / carve::kRegionsRow;
  STD_TORCH_CHECK(rows >= 0 && rows <= params.capacity &&
                      outcome.size(0) == carve::kRegionsOutcome + carve::kRegionsRow * rows,
                  name, ": outcome: expected ", carve::kRegionsOutcome, " numbers and ", carve::kRegionsRow,
                  " for each of up to ", params.capacity, " boxes, got ", outcome.size(0));
  carve::check_tensor(scratch, name, "scratch", 1, ScalarType::Byte);
  const int64_t bytes = carve::regions_cuda_scratch(params.height, params.width, connectivity);
  STD_TORCH_CHECK(scratch.size(0) >= bytes, name, ": scratch: expected at least ", bytes, " bytes");
  carve::RegionsDevice device{};
  device.device = saliency.get_device();
  device.stream = carve::current_stream(device.device);
  device.scratch = scratch.mutable_data_ptr();
  device.outcome = outcome.mutable_data_ptr<int64_t>();
  device.most_blocks = most_blocks;
  device.outcome_rows = rows;
  STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(device.scratch) % 16 == 0, name, ": scratch: expected 16-byte alignment");
  carve::regions_cuda(params, device);
}

}  // namespace

CARVE_CUDA_LIBRARY(m) { m.impl("regions_cuda", TORCH_BOX(&regions_cuda)); }
