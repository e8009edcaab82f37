// A decode step that attends and captures on a GPU, registered through torch's stable ABI; the schema is in
// carve_kernels/backends/native/schemas.py.

#include <utility>

#include <torch/csrc/stable/library.h>

#include "bindings/capture_device.h"
#include "bindings/dispatch_key.h"

namespace {

using carve::check;
using carve::Operand;

constexpr uint64_t kArguments = 20;

struct AttentionOperands {
  Operand value;
  Operand output;
  carve::CaptureOperands capture;  // of one layer
};

std::vector<Operand> alone(Operand tensor) {
  std::vector<Operand> list;
  list.push_back(std::move(tensor));
  return list;
}

AttentionOperands read_attention(carve::OperandStack stack) {
  std::vector<Operand> query = alone(stack.tensor()), key = alone(stack.tensor());
  Operand value = stack.tensor(), tokens = stack.tensor();
  auto span = stack.maybe_tensor(), mask = stack.maybe_tensor(), positions = stack.maybe_tensor();
  std::vector<Operand> sinks;
  if (auto sink = stack.maybe_tensor()) sinks.push_back(std::move(*sink));
  const auto scale = stack.scalar<double>(), softcap = stack.scalar<double>();
  const auto window = stack.scalar<int64_t>();
  const bool each = stack.scalar<bool>();
  auto step = stack.maybe_tensor();
  const auto first = stack.scalar<int64_t>();
  Operand scratch = stack.tensor(), tickets = stack.tensor(), output = stack.tensor();
  Operand maps = stack.tensor(), mass = stack.tensor(), entropy = stack.tensor();
  return {std::move(value), std::move(output),
          {std::move(query), std::move(key), std::move(tokens), std::move(span), std::move(mask), std::move(positions),
           std::move(sinks), std::nullopt, scale, softcap, window, each, std::move(step), first, std::move(scratch),
           std::move(tickets), std::move(maps), std::move(mass), std::move(entropy)}};
}

void attend_layer(StableIValue* stack, uint64_t inputs, uint64_t) {
  check(inputs == kArguments, "expected ", kArguments, " arguments, got ", inputs);
  const AttentionOperands in = read_attention(carve::OperandStack(stack));
  carve::CaptureCall call = carve::parse_capture(in.capture);
  const carve::CaptureParams& p = call.params;
  const Operand& query = in.capture.query[0];
  check(p.rows == 1, "query: expected one row, got ", query);
  check(p.type != carve::Float::kFloat32, "query: expected float16 or bfloat16, got ", query);
  carve::check_device(query, in.value, "value");
  carve::check_device(query, in.output, "output");
  check(in.value.dtype == query.dtype, "value: expected the dtype of query, got ", in.value);
  check(in.value.dims == 4, "value: expected 4 dimensions, got ", in.value);
  const int64_t size = in.value.sizes[3];
  check(in.value.has_shape({4, {p.batch, p.key_heads, p.keys, size}}),
        "value: expected the batch, heads and keys of key, got ", in.value);
  check(size < 2 || in.value.strides[3] == 1, "value: expected stride 1 along the elements of a value, got ",
        in.value.strides[3]);
  check(in.output.dtype == query.dtype && in.output.has_shape({4, {p.batch, p.heads, 1, size}}),
        "output: expected the dtype and heads of query and the elements of value, got ", in.output);
  check(size < 2 || in.output.strides[3] == 1, "output: expected stride 1 along its elements, got ",
        in.output.strides[3]);

  carve::AttentionValue value{};
  value.value = in.value.data();
  in.value.copy_strides(3, value.value_strides);
  value.size = size;
  value.output = in.output.mutable_data();
  in.output.copy_strides(2, value.output_strides);
  carve::attend_cuda(p, value, carve::describe_device(in.capture, call));
}

}  // namespace

CARVE_CUDA_LIBRARY(m) { m.impl("attend_layer", &attend_layer); }
