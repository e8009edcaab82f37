// Regions on a CPU, registered through torch's stable ABI; its schema is in carve_kernels/backends/native/schemas.py.

#include <torch/csrc/stable/library.h>

#include "bindings/regions.h"
#include "carve.h"

namespace {

using torch::stable::Tensor;

void regions_cpu(const Tensor& saliency, double keep, int64_t top, int64_t floor, int64_t connectivity, int64_t score,
                 int64_t min_size, Tensor mask, Tensor boxes, Tensor scores, Tensor outcome) {
  const carve::RegionsParams params = carve::parse_regions("regions_cpu", saliency, keep, top, floor, connectivity,
                                                           score, min_size, mask, boxes, scores, outcome);
  carve::check_outcome("regions_cpu", params, outcome);
  carve::store_outcome(params, carve::regions_cpu(params), outcome);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(carve_kernels, CPU, m) { m.impl("regions_cpu", TORCH_BOX(&regions_cpu)); }
