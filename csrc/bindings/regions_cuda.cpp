// Regions on a GPU, registered through torch's stable ABI; the schema is in carve_kernels/backends/native/schemas.py.

#include <torch/csrc/stable/library.h>

#include "bindings/dispatch_key.h"
#include "bindings/regions_device.h"

namespace {

using torch::stable::Tensor;

void regions_cuda(const Tensor& saliency, double keep, int64_t top, int64_t floor, int64_t connectivity, int64_t score,
                  int64_t min_size, int64_t most_blocks, Tensor scratch, Tensor mask, Tensor boxes, Tensor scores,
                  Tensor outcome) {
  const char* name = "regions_cuda";
  const carve::RegionsParams params = carve::parse_regions(name, saliency, keep, top, floor, connectivity, score,
                                                           min_size, mask, boxes, scores, outcome);
  carve::check_tensor(scratch, name, "scratch", 1, torch::headeronly::ScalarType::Byte);
  carve::regions_cuda(params, carve::parse_regions_device(name, params, most_blocks, saliency.get_device(),
                                                          scratch.mutable_data_ptr(), scratch.size(0), outcome));
}

}  // namespace

CARVE_CUDA_LIBRARY(m) { m.impl("regions_cuda", TORCH_BOX(&regions_cuda)); }
