// Capture on a GPU, registered through torch's stable ABI; the schema is in carve_kernels/backends/native/schemas.py.

#include <torch/csrc/stable/library.h>

#include "bindings/capture.h"
#include "bindings/dispatch_key.h"

namespace {

using carve::check;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// A kernel that reads memory of another device leaves CUDA unusable in the whole process.
void check_device(const Tensor& query, const std::optional<Tensor>& tensor, const char* name) {
  check(!tensor || (tensor->is_cuda() == query.is_cuda() && tensor->get_device() == query.get_device()), name,
        ": expected a tensor on the device of query");
}

void capture_cuda(std::vector<Tensor> query, std::vector<Tensor> key, Tensor tokens, std::optional<Tensor> mask,
                  std::optional<Tensor> positions, std::vector<Tensor> sink, std::optional<Tensor> lse, double scale,
                  double softcap, int64_t window, bool each, std::optional<Tensor> step, int64_t first, int64_t stream,
                  Tensor scratch, Tensor maps, Tensor mass, Tensor entropy) {
  carve::CaptureArguments all =
      carve::parse_capture(query, key, tokens, mask, positions, sink, lse, scale, softcap, window, each,
                           step.has_value(), first, maps, mass, entropy);
  for (const Tensor& one : query) check_device(query[0], one, "query");
  for (const Tensor& one : key) check_device(query[0], one, "key");
  for (const Tensor& one : sink) check_device(query[0], one, "sink");
  check_device(query[0], tokens, "tokens");
  check_device(query[0], mask, "mask");
  check_device(query[0], positions, "positions");
  check_device(query[0], lse, "lse");
  check_device(query[0], step, "step");
  check_device(query[0], scratch, "scratch");
  check_device(query[0], maps, "maps");
  check_device(query[0], mass, "mass");
  check_device(query[0], entropy, "entropy");
  check(scratch.scalar_type() == ScalarType::Byte && scratch.is_contiguous(), "scratch: expected contiguous uint8");
  check(!step || (step->scalar_type() == ScalarType::Long && step->numel() == 1), "step: expected one int64");

  carve::CaptureDevice device{};
  device.step = step ? step->const_data_ptr<int64_t>() : nullptr;
  device.steps = std::min({all.maps.steps, all.mass.steps, all.entropy.steps});
  device.step_strides[0] = all.maps.step_stride;
  device.step_strides[1] = all.mass.step_stride;
  device.step_strides[2] = all.entropy.step_stride;
  device.token_stride = maps.stride(-1);
  device.scratch = scratch.mutable_data_ptr();
  device.scratch_bytes = scratch.numel();
  device.device = query[0].get_device();
  device.stream = reinterpret_cast<void*>(stream);
  all.params.layers = all.layers.data();
  carve::capture_cuda(all.params, device);
}

}  // namespace

CARVE_CUDA_LIBRARY(m) { m.impl("capture_cuda", TORCH_BOX(&capture_cuda)); }
