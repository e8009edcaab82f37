// Capture on a GPU, registered through torch's stable ABI; the schemas are in carve_kernels/backends/native/schemas.py.

#include <torch/csrc/stable/library.h>

#include "bindings/capture.h"
#include "bindings/dispatch_key.h"
#include "bindings/stream.h"

namespace {

using carve::check;

void capture_layers(StableIValue* stack, uint64_t inputs, uint64_t) {
  check(inputs == carve::kCaptureArguments, "expected ", carve::kCaptureArguments, " arguments, got ", inputs);
  const carve::CaptureOperands in{carve::OperandStack(stack)};
  carve::CaptureCall call = carve::parse_capture(in);
  check(in.scratch.dtype == carve::kDtypes.uint8 && in.scratch.is_contiguous(),
        "scratch: expected contiguous uint8, got ", in.scratch);
  check(in.tickets.dtype == carve::kDtypes.int32 && in.tickets.is_contiguous(),
        "tickets: expected contiguous int32, got ", in.tickets);

  carve::CaptureDevice device{};
  device.step = in.step ? static_cast<const int64_t*>(in.step->data()) : nullptr;
  device.steps = call.steps;
  device.step_strides[0] = call.maps.step_stride;
  device.step_strides[1] = call.mass.step_stride;
  device.step_strides[2] = call.entropy.step_stride;
  device.token_stride = in.maps.strides[in.maps.dims - 1];
  device.span = in.span ? static_cast<const int32_t*>(in.span->data()) : nullptr;
  device.scratch = in.scratch.mutable_data();
  device.scratch_bytes = in.scratch.numel();
  device.tickets = static_cast<unsigned*>(in.tickets.mutable_data());
  device.ticket_count = in.tickets.numel();
  device.device = in.query[0].device;
  device.stream = carve::current_stream(device.device);
  carve::capture_cuda(call.params, device);
}

}  // namespace

CARVE_CUDA_LIBRARY(m) { m.impl("capture_layers", &capture_layers); }
