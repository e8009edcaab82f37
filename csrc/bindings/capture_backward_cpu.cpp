// Gradients of a capture on a CPU, registered through torch's stable ABI; the schema is in
// carve_kernels/backends/native/schemas.py.

#include <array>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "bindings/capture.h"

namespace {

using carve::check;
using carve::Operand;
using torch::headeronly::ScalarType;

constexpr uint64_t kArguments = 17;

// The arguments, in the order of the schema.
struct Operands {
  std::array<Operand, 1> query;
  std::array<Operand, 1> key;
  Operand tokens;
  std::optional<Operand> mask;
  std::optional<Operand> positions;
  std::optional<Operand> sink;
  std::optional<Operand> lse;
  double scale;
  double softcap;
  int64_t window;
  bool each;
  std::optional<Operand> maps;
  std::optional<Operand> mass;
  std::optional<Operand> entropy;
  Operand to_query;
  std::optional<Operand> to_key;
  std::optional<Operand> to_sink;
};

Operands read(carve::OperandStack stack) {
  // Braces: from left to right.
  return Operands{{stack.tensor()},         {stack.tensor()},         stack.tensor(),         stack.maybe_tensor(),
                  stack.maybe_tensor(),     stack.maybe_tensor(),     stack.maybe_tensor(),   stack.scalar<double>(),
                  stack.scalar<double>(),   stack.scalar<int64_t>(),  stack.scalar<bool>(),   stack.maybe_tensor(),
                  stack.maybe_tensor(),     stack.maybe_tensor(),     stack.tensor(),         stack.maybe_tensor(),
                  stack.maybe_tensor()};
}

const float* parse_given(const std::optional<Operand>& tensor, const char* name, const carve::Sizes& shape) {
  return tensor ? carve::parse_dense(*tensor, name, shape) : nullptr;
}

float* parse_written(const Operand& tensor, const char* name, const carve::Sizes& shape) {
  carve::parse_dense(tensor, name, shape);
  return static_cast<float*>(tensor.mutable_data());
}

void capture_backward(StableIValue* stack, uint64_t inputs, uint64_t) {
  check(inputs == kArguments, "expected ", kArguments, " arguments, got ", inputs);
  const Operands in = read(carve::OperandStack(stack));
  carve::CaptureParams p{};
  carve::CaptureLayer layer{};
  carve::parse_inputs(in, p);
  carve::parse_layer(in.query[0], in.key[0], in.query[0].dtype, p, layer);
  if (in.sink) layer.sink = carve::parse_dense(*in.sink, "sink", {1, {p.heads}});
  check(!in.to_sink || in.sink, "to_sink: expected none without a sink");
  p.layers = &layer;
  p.layer_count = 1;
  p.threads = torch::stable::get_num_threads();

  const carve::Sizes rows{2, {p.batch, p.rows}};
  const carve::Sizes maps = p.each ? carve::Sizes{4, {p.batch, p.heads, p.rows, p.token_count}}
                                   : carve::Sizes{3, {p.batch, p.rows, p.token_count}};
  carve::CaptureGradients gradients{};
  gradients.maps = parse_given(in.maps, "maps", maps);
  gradients.mass = parse_given(in.mass, "mass", rows);
  gradients.entropy = parse_given(in.entropy, "entropy", rows);
  gradients.query = parse_written(in.to_query, "to_query", {4, {p.batch, p.heads, p.rows, p.size}});
  if (in.to_key) gradients.key = parse_written(*in.to_key, "to_key", {4, {p.batch, p.key_heads, p.keys, p.size}});
  if (in.to_sink) gradients.sink = parse_written(*in.to_sink, "to_sink", {1, {p.heads}});
  // A tensor, so that profilers of memory see it.
  const int64_t floats = carve::capture_backward_cpu_scratch(p);
  torch::stable::Tensor scratch = torch::stable::empty({floats}, ScalarType::Float);
  gradients.scratch = static_cast<float*>(scratch.mutable_data_ptr());
  carve::capture_backward_cpu(p, gradients);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(carve_kernels, CPU, m) { m.impl("capture_backward", &capture_backward); }
