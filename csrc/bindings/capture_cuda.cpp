// Capture on a GPU, registered through torch's stable ABI; the schemas are in carve_kernels/backends/native/schemas.py.

#include <torch/csrc/stable/library.h>

#include "bindings/capture_device.h"
#include "bindings/dispatch_key.h"

namespace {

using carve::check;

void capture_layers(StableIValue* stack, uint64_t inputs, uint64_t) {
  check(inputs == carve::kCaptureArguments, "expected ", carve::kCaptureArguments, " arguments, got ", inputs);
  const carve::CaptureOperands in = carve::read_capture(carve::OperandStack(stack));
  carve::CaptureCall call = carve::parse_capture(in);
  carve::capture_cuda(call.params, carve::describe_device(in, call));
}

}  // namespace

CARVE_CUDA_LIBRARY(m) { m.impl("capture_layers", &capture_layers); }
