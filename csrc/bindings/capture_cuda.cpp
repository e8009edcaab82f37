// Capture on a GPU, registered through torch's stable ABI; the schemas are in carve_kernels/backends/native/schemas.py.

#include <torch/csrc/stable/library.h>

#include "bindings/capture.h"
#include "bindings/checks.h"
#include "bindings/dispatch_key.h"
#include "bindings/stream.h"

namespace {

using carve::check;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

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

carve::Float parse_element(int64_t bytes) {
  STD_TORCH_CHECK(bytes == 2 || bytes == 4, "capture_scratch_cuda: sizes: expected elements of 2 or 4 bytes, got ",
                  bytes);
  return bytes == 4 ? carve::Float::kFloat32 : carve::Float::kBfloat16;
}

// The sizes are those of the schema.
void capture_scratch_cuda(const std::vector<int64_t>& sizes, const Tensor& out) {
  constexpr size_t kSizes = 12;
  STD_TORCH_CHECK(sizes.size() == kSizes, "capture_scratch_cuda: sizes: expected ", kSizes, " numbers, got ",
                  sizes.size());
  for (int64_t size : sizes) {
    STD_TORCH_CHECK(size >= 0, "capture_scratch_cuda: sizes: expected numbers of at least 0, got ", size);
  }
  carve::check_tensor(out, "capture_scratch_cuda", "out", 1, ScalarType::Long);
  STD_TORCH_CHECK(out.size(0) == 2, "capture_scratch_cuda: out: expected 2 numbers, got ", out.size(0));
  const float known = 0.0f;
  carve::CaptureParams params{};
  params.layer_count = sizes[0];
  params.batch = sizes[1];
  params.heads = sizes[2];
  params.key_heads = sizes[3];
  params.rows = sizes[4];
  params.keys = sizes[5];
  params.size = sizes[6];
  params.token_count = sizes[7];
  params.type = parse_element(sizes[8]);
  params.lse = sizes[9] != 0 ? &known : nullptr;
  params.each = sizes[10] != 0;
  const carve::CaptureScratch scratch = carve::capture_cuda_scratch(params, sizes[11] != 0);
  auto* to = out.mutable_data_ptr<int64_t>();
  to[0] = scratch.bytes;
  to[1] = scratch.tickets;
}

}  // namespace

CARVE_CUDA_LIBRARY(m) { m.impl("capture_layers", &capture_layers); }
CARVE_CUDA_HOST_LIBRARY(m) { m.impl("capture_scratch_cuda", TORCH_BOX(&capture_scratch_cuda)); }
