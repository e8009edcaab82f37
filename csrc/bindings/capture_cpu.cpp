// Capture on a CPU, registered through torch's stable ABI; the schemas are in carve_kernels/backends/native/schemas.py.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "bindings/capture.h"
#include "cpu/simd/isa.h"

namespace {

using carve::check;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

int64_t read_step(const std::optional<carve::Operand>& step, int64_t steps) {
  if (!step) return 0;
  const int64_t value = *static_cast<const int64_t*>(step->data());
  check(value >= 0, "step: expected a step of at least 0, got ", value);
  check(value < steps, "step: expected a step below ", steps, ", got ", value);
  return value;
}

// Ignores span, scratch and tickets.
void capture_layers(StableIValue* stack, uint64_t inputs, uint64_t) {
  check(inputs == carve::kCaptureArguments, "expected ", carve::kCaptureArguments, " arguments, got ", inputs);
  const carve::CaptureOperands in = carve::read_capture(carve::OperandStack(stack));
  carve::CaptureCall call = carve::parse_capture(in);
  check(call.params.token_count < 2 || in.maps.strides[in.maps.dims - 1] == 1,
        "maps: expected stride 1 along the tokens");
  const int64_t step = read_step(in.step, call.steps);
  for (carve::CaptureLayer& layer : call.layers) {
    layer.maps += step * call.maps.step_stride;
    layer.mass += step * call.mass.step_stride;
    layer.entropy += step * call.entropy.step_stride;
  }
  call.params.threads = torch::stable::get_num_threads();
  carve::capture_cpu(call.params);
}

// Selects the instruction set `wanted` (-1: by the environment, -2: unchanged) and writes the active and the best one.
void isa_cpu(int64_t wanted, Tensor out) {
  STD_TORCH_CHECK(out.scalar_type() == ScalarType::Long && out.is_contiguous() && out.numel() == 2,
                  "isa_cpu: out: expected two int64");
  constexpr int64_t kUnchanged = -2;
  if (wanted != kUnchanged) carve::force_isa(wanted);
  int64_t* data = out.mutable_data_ptr<int64_t>();
  data[0] = static_cast<int64_t>(carve::active_isa());
  data[1] = static_cast<int64_t>(carve::best_isa());
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(carve_kernels, CPU, m) {
  m.impl("capture_layers", &capture_layers);
  m.impl("isa_cpu", TORCH_BOX(&isa_cpu));
}
