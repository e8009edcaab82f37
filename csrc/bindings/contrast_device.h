// The arguments of a contrast on a GPU that a CPU does not have.
#pragma once

#include "bindings/contrast.h"
#include "bindings/stream.h"

namespace carve {
namespace {

ContrastDevice parse_contrast_device(const ContrastOperands& in, const ContrastCall& call, const Operand& scratch) {
  const char* name = in.name;
  for (const auto& [stride, argument] :
       {std::pair(in.task.strides[2], "task"), std::pair(in.general.strides[2], "general")}) {
    check_contrast(name, stride == 1 || call.params.tokens < 2, argument,
                   ": expected stride 1 along the tokens, got ", stride);
  }
  check_contrast(name, scratch.dtype == kDtypes.uint8 && scratch.is_contiguous(),
                 "scratch: expected contiguous uint8, got ", scratch);
  check_contrast(name, scratch.is_on_device_of(in.task.tensor), "scratch: expected a tensor on the device of task");
  ContrastDevice device{};
  std::copy_n(in.task.strides, 2, device.task_strides);
  std::copy_n(in.general.strides, 2, device.general_strides);
  device.scratch = scratch.mutable_data();
  device.scratch_bytes = scratch.numel();
  device.device = in.task.tensor.device;
  device.stream = current_stream(device.device);
  return device;
}

}  // namespace
}  // namespace carve
