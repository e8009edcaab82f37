// Column sums on a CPU, registered through torch's stable ABI; the schema is in carve_kernels/backends/native/schemas.py.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "bindings/capture_inputs.h"

namespace {

using carve::check;
using carve::Operand;

constexpr uint64_t kArguments = 10;

void column_sums_cpu(StableIValue* stack, uint64_t inputs, uint64_t) {
  check(inputs == kArguments, "expected ", kArguments, " arguments, got ", inputs);
  carve::OperandStack given(stack);
  const Operand query = given.tensor(), key = given.tensor();
  const auto mask = given.maybe_tensor(), positions = given.maybe_tensor();
  const auto sink = given.maybe_tensor(), lse = given.maybe_tensor();
  const auto scale = given.scalar<double>(), softcap = given.scalar<double>();
  const auto window = given.scalar<int64_t>();
  const Operand out = given.tensor();
  carve::check_device(query, key, "key");
  carve::check_device(query, mask, "mask");
  carve::check_device(query, positions, "positions");
  carve::check_device(query, sink, "sink");
  carve::check_device(query, lse, "lse");
  carve::check_device(query, out, "out");
  carve::ColumnSumsParams params{};
  carve::CaptureParams& p = params.capture;
  carve::parse_sizes(query, key, p);
  check(key.dtype == query.dtype, "key: expected the dtype of query, got ", key);
  check(key.has_shape({4, {p.batch, p.key_heads, p.keys, p.size}}),
        "key: expected the batch and head size of query, got ", key);
  check(p.size < 2 || key.strides[3] == 1, "key: expected stride 1 along the elements of a key, got ", key.strides[3]);
  carve::parse_rows({mask, positions, lse, scale, softcap, window}, p);
  carve::CaptureLayer layer{};
  layer.query = query.data();
  layer.key = key.data();
  std::copy_n(query.strides, 4, layer.query_strides);
  key.copy_strides(3, layer.key_strides);
  if (sink) layer.sink = carve::parse_dense(*sink, "sink", {1, {p.heads}});
  p.layers = &layer;
  p.layer_count = 1;
  p.threads = torch::stable::get_num_threads();
  check(out.dtype == carve::kDtypes.float32 && out.has_shape({3, {p.batch, p.heads, p.keys}}) && out.is_contiguous(),
        "out: expected a contiguous float32 tensor of batch, heads and keys, got ", out);
  params.sums = static_cast<float*>(out.mutable_data());
  carve::column_sums_cpu(params);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(carve_kernels, CPU, m) { m.impl("column_sums_cpu", &column_sums_cpu); }
