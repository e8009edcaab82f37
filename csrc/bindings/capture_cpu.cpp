// Capture on a CPU, registered through torch's stable ABI; the schemas are in carve_kernels/backends/native/schemas.py.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "bindings/capture.h"
#include "cpu/simd/isa.h"

namespace {

using carve::check;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

int64_t parse_step(const std::optional<Tensor>& step, int64_t steps) {
  if (!step) return 0;
  check(step->scalar_type() == ScalarType::Long && step->numel() == 1, "step: expected one int64");
  const int64_t value = *step->const_data_ptr<int64_t>();
  check(value >= 0, "step: expected a step of at least 0, got ", value);
  check(value < steps, "step: expected a step below ", steps, ", got ", value);
  return value;
}

void capture_cpu(std::vector<Tensor> query, std::vector<Tensor> key, Tensor tokens, std::optional<Tensor> mask,
                 std::optional<Tensor> positions, std::vector<Tensor> sink, std::optional<Tensor> lse, double scale,
                 double softcap, int64_t window, bool each, std::optional<Tensor> step, int64_t first, Tensor maps,
                 Tensor mass, Tensor entropy) {
  carve::CaptureArguments all =
      carve::parse_capture(query, key, tokens, mask, positions, sink, lse, scale, softcap, window, each,
                           step.has_value(), first, maps, mass, entropy);
  check(all.params.token_count < 2 || maps.stride(-1) == 1, "maps: expected stride 1 along the tokens");
  const int64_t slot = parse_step(step, std::min({all.maps.steps, all.mass.steps, all.entropy.steps}));
  for (carve::CaptureLayer& layer : all.layers) {
    layer.maps += slot * all.maps.step_stride;
    layer.mass += slot * all.mass.step_stride;
    layer.entropy += slot * all.entropy.step_stride;
  }
  all.params.layers = all.layers.data();
  all.params.threads = torch::stable::get_num_threads();
  carve::capture_cpu(all.params);
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
  m.impl("capture_cpu", TORCH_BOX(&capture_cpu));
  m.impl("isa_cpu", TORCH_BOX(&isa_cpu));
}
