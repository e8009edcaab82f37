// Saliency on a CPU, registered through torch's stable ABI; the schema is in carve_kernels/backends/native/schemas.py.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "bindings/saliency.h"

namespace {

using carve::check_contrast;
using carve::kSaliency;

// Ignores span, scratch, tickets and most_blocks.
void saliency(StableIValue* stack, uint64_t inputs, uint64_t) {
  check_contrast(kSaliency, inputs == carve::kSaliencyArguments, "expected ", carve::kSaliencyArguments,
                 " arguments, got ", inputs);
  carve::SaliencyCall call(stack);
  check_contrast(kSaliency, call.captured.maps.is_contiguous(), "maps: expected a contiguous tensor, got ",
                 call.captured.maps);
  check_contrast(kSaliency, call.in.general.is_contiguous(), "general: expected a contiguous tensor, got ",
                 call.in.general);
  check_contrast(kSaliency, *static_cast<const int64_t*>(call.captured.step->data()) == 0, "step: expected 0");
  if (call.has_regions()) carve::check_outcome(kSaliency, call.regions, call.in.outcome);
  call.capture.params.threads = torch::stable::get_num_threads();
  carve::capture_cpu(call.capture.params);
  carve::contrast_cpu(call.contrast.params);
  if (call.has_regions()) {
    carve::store_outcome(call.regions, carve::regions_cpu(call.regions), call.in.outcome);
  }
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(carve_kernels, CPU, m) { m.impl("saliency", &saliency); }
