// Contrast on a CPU, registered through torch's stable ABI; the schema is in carve_kernels/backends/native/schemas.py.

#include <torch/csrc/stable/library.h>

#include "bindings/contrast.h"

namespace {

constexpr uint64_t kArguments = 9;

void contrast_cpu(StableIValue* stack, uint64_t inputs, uint64_t) {
  const char* name = "contrast_cpu";
  carve::check_contrast(name, inputs == kArguments, "expected ", kArguments, " arguments, got ", inputs);
  carve::OperandStack given(stack);
  const carve::Operand task = given.tensor(), general = given.tensor();
  const carve::Operand layer_weights = given.tensor(), step_weights = given.tensor();
  const auto shapes = given.scalar<std::vector<int64_t>>();
  const auto lam = given.scalar<double>();
  const auto lam_is_mean = given.scalar<bool>();
  const auto normalize = given.scalar<int64_t>();
  const carve::Operand out = given.tensor();
  const carve::TaskMaps maps = carve::parse_task(name, task);
  carve::check_contrast(name, task.is_contiguous(), "task: expected a contiguous tensor, got ", task);
  carve::check_contrast(name, general.is_contiguous(), "general: expected a contiguous tensor, got ", general);
  const carve::ContrastCall call = carve::parse_contrast({name, maps, general, layer_weights, step_weights, out},
                                                         shapes, lam, lam_is_mean, normalize);
  carve::contrast_cpu(call.params);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(carve_kernels, CPU, m) { m.impl("contrast_cpu", &contrast_cpu); }
