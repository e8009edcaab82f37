// Saliency on a GPU, registered through torch's stable ABI; the schema is in carve_kernels/backends/native/schemas.py.

#include <torch/csrc/stable/library.h>

#include "bindings/capture_device.h"
#include "bindings/contrast_device.h"
#include "bindings/dispatch_key.h"
#include "bindings/regions_device.h"
#include "bindings/saliency.h"

namespace {

// The stages follow each other on one stream, so all have the same scratch.
void saliency(StableIValue* stack, uint64_t inputs, uint64_t) {
  const char* name = carve::kSaliency;
  carve::check_contrast(name, inputs == carve::kSaliencyArguments, "expected ", carve::kSaliencyArguments,
                        " arguments, got ", inputs);
  carve::SaliencyCall call(stack);
  const carve::CaptureDevice capture = carve::describe_device(call.captured, call.capture);
  const carve::ContrastDevice contrast =
      carve::parse_contrast_device(call.contrast_operands, call.contrast, call.captured.scratch);
  carve::RegionsDevice regions{};
  if (call.has_regions()) {
    regions = carve::parse_regions_device(name, call.regions, call.in.most_blocks, contrast.device, contrast.scratch,
                                          contrast.scratch_bytes, call.in.outcome);
  }
  carve::capture_cuda(call.capture.params, capture);
  carve::contrast_cuda(call.contrast.params, contrast);
  if (call.has_regions()) carve::regions_cuda(call.regions, regions);
}

}  // namespace

CARVE_CUDA_LIBRARY(m) { m.impl("saliency", &saliency); }
