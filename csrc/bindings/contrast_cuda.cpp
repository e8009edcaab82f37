// Contrast on a GPU, registered through torch's stable ABI; the schema is in carve_kernels/backends/native/schemas.py.

#include <torch/csrc/stable/library.h>

#include "bindings/contrast_device.h"
#include "bindings/dispatch_key.h"

namespace {

constexpr uint64_t kArguments = 10;

void contrast_cuda(StableIValue* stack, uint64_t inputs, uint64_t) {
  const char* name = "contrast_cuda";
  carve::check_contrast(name, inputs == kArguments, "expected ", kArguments, " arguments, got ", inputs);
  carve::OperandStack given(stack);
  const carve::Operand task = given.tensor(), general = given.tensor();
  const carve::Operand layer_weights = given.tensor(), step_weights = given.tensor();
  const auto shapes = given.scalar<std::vector<int64_t>>();
  const auto lam = given.scalar<double>();
  const auto lam_is_mean = given.scalar<bool>();
  const auto normalize = given.scalar<int64_t>();
  const carve::Operand scratch = given.tensor(), out = given.tensor();
  const carve::TaskMaps maps = carve::parse_task(name, task);
  const carve::ContrastOperands in{name, maps, general, layer_weights, step_weights, out};
  const carve::ContrastCall call = carve::parse_contrast(in, shapes, lam, lam_is_mean, normalize);
  carve::contrast_cuda(call.params, carve::parse_contrast_device(in, call, scratch));
}

}  // namespace

CARVE_CUDA_LIBRARY(m) { m.impl("contrast_cuda", &contrast_cuda); }
