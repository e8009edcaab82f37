// The arguments of capture that only a GPU has, for the operators that capture there.
#pragma once

#include "bindings/capture.h"
#include "bindings/stream.h"

namespace carve {
namespace {

// Throws before anything is launched. `in` has to live as long as the call.
CaptureDevice describe_device(const CaptureOperands& in, const CaptureCall& call) {
  check(in.scratch.dtype == kDtypes.uint8 && in.scratch.is_contiguous(),
        "scratch: expected contiguous uint8, got ", in.scratch);
  check(in.tickets.dtype == kDtypes.int32 && in.tickets.is_contiguous(),
        "tickets: expected contiguous int32, got ", in.tickets);

  CaptureDevice device{};
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
  device.stream = current_stream(device.device);
  return device;
}

}  // namespace
}  // namespace carve
