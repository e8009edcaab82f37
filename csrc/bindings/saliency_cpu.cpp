// Saliency on a CPU, registered through torch's stable ABI; the schema is in carve_kernels/backends/native/schemas.py.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "bindings/saliency.h"

namespace {

// Ignores span, scratch, tickets and most_blocks.
void saliency(StableIValue* stack, uint64_t inputs, uint64_t) {
  const char* name = carve::kSaliency;
  carve::check_contrast(name, inputs == carve::kSaliencyArguments, "expected ", carve::kSaliencyArguments,
                        " arguments, got ", inputs);
  const carve::CaptureOperands captured{carve::OperandStack(stack)};
  carve::SaliencyOperands in{carve::OperandStack(stack + carve::kCaptureArguments)};
  carve::CaptureCall call = carve::parse_capture(captured);
  const carve::TaskMaps maps = carve::parse_captured(captured, call);
  carve::check_contrast(name, captured.maps.is_contiguous(), "maps: expected a contiguous tensor, got ",
                        captured.maps);
  carve::check_contrast(name, in.general.is_contiguous(), "general: expected a contiguous tensor, got ", in.general);
  const carve::ContrastCall contrast = carve::parse_contrast(
      {name, maps, in.general, in.layer_weights, in.step_weights, in.out}, in.shapes, in.lam, in.lam_is_mean,
      in.normalize);
  carve::check_contrast(name, *static_cast<const int64_t*>(captured.step->data()) == 0, "step: expected 0");
  carve::RegionsParams regions{};
  if (in.has_regions()) regions = carve::parse_regions_of(in);
  call.params.threads = torch::stable::get_num_threads();
  carve::capture_cpu(call.params);
  carve::contrast_cpu(contrast.params);
  if (in.has_regions()) carve::store_outcome(carve::regions_cpu(regions), in.outcome);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(carve_kernels, CPU, m) { m.impl("saliency", &saliency); }
