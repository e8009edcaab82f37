// Checks of the arguments of the operator capture_layers, and their translation into CaptureParams.
#pragma once

#include <algorithm>
#include <optional>
#include <vector>

#include "bindings/capture_inputs.h"
#include "bindings/operands.h"
#include "carve.h"

namespace carve {
namespace {

constexpr uint64_t kCaptureArguments = 19;

// The arguments, in the order of the schema.
struct CaptureOperands {
  std::vector<Operand> query;
  std::vector<Operand> key;
  Operand tokens;
  std::optional<Operand> span;
  std::optional<Operand> mask;
  std::optional<Operand> positions;
  std::vector<Operand> sink;
  std::optional<Operand> lse;
  double scale;
  double softcap;
  int64_t window;
  bool each;
  std::optional<Operand> step;
  int64_t first;
  Operand scratch;
  Operand tickets;
  Operand maps;
  Operand mass;
  Operand entropy;
};

CaptureOperands read_capture(OperandStack stack) {
  // Braces: from left to right.
  return CaptureOperands{stack.tensors(),         stack.tensors(),         stack.tensor(),          stack.maybe_tensor(),
                         stack.maybe_tensor(),    stack.maybe_tensor(),    stack.tensors(),         stack.maybe_tensor(),
                         stack.scalar<double>(),  stack.scalar<double>(),  stack.scalar<int64_t>(), stack.scalar<bool>(),
                         stack.maybe_tensor(),    stack.scalar<int64_t>(), stack.tensor(),          stack.tensor(),
                         stack.tensor(),          stack.tensor(),          stack.tensor()};
}

void check_devices(const CaptureOperands& in) {
  const Operand& query = in.query[0];
  for (const Operand& one : in.query) check_device(query, one, "query");
  for (const Operand& one : in.key) check_device(query, one, "key");
  for (const Operand& one : in.sink) check_device(query, one, "sink");
  check_device(query, in.tokens, "tokens");
  check_device(query, in.span, "span");
  check_device(query, in.mask, "mask");
  check_device(query, in.positions, "positions");
  check_device(query, in.lse, "lse");
  check_device(query, in.step, "step");
  check_device(query, in.scratch, "scratch");
  check_device(query, in.tickets, "tickets");
  check_device(query, in.maps, "maps");
  check_device(query, in.mass, "mass");
  check_device(query, in.entropy, "entropy");
}

// The sizes of a call, from its first layer, and its shared inputs.
template <class Operands>
void parse_inputs(const Operands& in, CaptureParams& p) {
  parse_sizes(in.query[0], in.key[0], p);
  check(in.tokens.dims == 2, "tokens: expected 2 dimensions, got ", in.tokens);
  p.token_count = in.tokens.sizes[1];
  p.tokens = parse_index(in.tokens, "tokens", p.batch, p.token_count);
  parse_rows({in.mask, in.positions, in.lse, in.scale, in.softcap, in.window}, p);
  p.each = in.each;
}

void parse_layer(const Operand& query, const Operand& key, int32_t dtype, const CaptureParams& p, CaptureLayer& layer) {
  check(query.dtype == dtype, "query: expected the same dtype in all layers, got ", query);
  check(key.dtype == dtype, "key: expected the dtype of query, ", name_dtype(dtype), ", got ", key);
  check(query.has_shape({4, {p.batch, p.heads, p.rows, p.size}}),
        "query: expected the same shapes in all layers, got ", query);
  check(key.has_shape({4, {p.batch, p.key_heads, p.keys, p.size}}),
        "key: expected the batch and head size of query, and the same shapes in all layers, got ", key);
  check(p.size < 2 || key.strides[3] == 1, "key: expected stride 1 along the elements of a key, got ", key.strides[3]);
  layer.query = query.data();
  layer.key = key.data();
  std::copy_n(query.strides, 4, layer.query_strides);
  key.copy_strides(3, layer.key_strides);
}

// One output of the first layer in step 0. A stepped output has the leading dimensions [steps, layers].
struct Output {
  float* data;
  int64_t steps;  // 1 if the output is not stepped
  int64_t step_stride;
  int64_t layer_stride;
  const int64_t* strides;  // of the dimensions of one layer and step
};

Output parse_output(const Operand& out, const char* name, const Sizes& shape, bool stepped, int64_t first,
                    int64_t layers) {
  check(out.dtype == kDtypes.float32, name, ": expected float32, got ", out);
  const int64_t front = stepped ? 2 : 0;
  check(out.dims == front + shape.count, name, ": unexpected number of dimensions, got ", out);
  check(out.ends_with(shape), name, ": unexpected shape: expected its last dimensions to be ", shape, ", got ", out);
  auto* data = static_cast<float*>(out.mutable_data());
  if (!stepped) return {data, 1, 0, 0, out.strides};
  check(first >= 0 && layers <= out.sizes[1] - first, name, ": expected first + ", layers, " layers to fit in ",
        out.sizes[1], ", got first = ", first);
  return {data + first * out.strides[1], out.sizes[0], out.strides[0], out.strides[1], out.strides + 2};
}

// Whether a stepped output has the steps and layers of another.
bool has_slots(const Operand& out, const Operand& other) {
  return out.sizes[0] == other.sizes[0] && out.sizes[1] == other.sizes[1];
}

// The parameters of the kernels, without the current step, whose offset the CPU and the GPU add by themselves.
struct CaptureCall {
  CaptureParams params;
  std::vector<CaptureLayer> layers;
  Output maps;
  Output mass;
  Output entropy;
  int64_t steps;
};

// `in` has to live as long as the call. Throws before anything is read or written.
CaptureCall parse_capture(const CaptureOperands& in) {
  const size_t count = in.query.size();
  check(count > 0 && in.key.size() == count && (in.sink.empty() || in.sink.size() == count) && (in.step || count == 1),
        "query, key, sink: expected one entry a layer, and one layer without a step, got ", count, ", ",
        in.key.size(), " and ", in.sink.size());
  check_devices(in);
  CaptureCall call{};
  CaptureParams& p = call.params;
  parse_inputs(in, p);
  if (in.step) {
    check(in.step->dtype == kDtypes.int64 && in.step->numel() == 1, "step: expected one int64, got ", *in.step);
  }
  if (in.span) {
    check(in.span->dtype == kDtypes.int32 && in.span->has_shape({1, {2}}) && in.span->is_contiguous(),
          "span: expected two contiguous int32, got ", *in.span);
  }

  const bool stepped = in.step.has_value();
  const auto layers = static_cast<int64_t>(count);
  const Sizes rows{2, {p.batch, p.rows}};
  const Sizes shape = in.each ? Sizes{4, {p.batch, p.heads, p.rows, p.token_count}}
                              : Sizes{3, {p.batch, p.rows, p.token_count}};
  call.maps = parse_output(in.maps, "maps", shape, stepped, in.first, layers);
  call.mass = parse_output(in.mass, "mass", rows, stepped, in.first, layers);
  call.entropy = parse_output(in.entropy, "entropy", rows, stepped, in.first, layers);
  check(!stepped || has_slots(in.mass, in.maps), "mass: expected the steps and layers of maps, got ", in.mass);
  check(!stepped || has_slots(in.entropy, in.maps), "entropy: expected the steps and layers of maps, got ",
        in.entropy);
  call.steps = call.maps.steps;
  p.maps_strides[0] = call.maps.strides[0];
  p.maps_strides[1] = in.each ? call.maps.strides[1] : 0;
  p.maps_strides[2] = call.maps.strides[in.each ? 2 : 1];
  std::copy_n(call.mass.strides, 2, p.mass_strides);
  std::copy_n(call.entropy.strides, 2, p.entropy_strides);

  call.layers.resize(count);
  const int32_t dtype = in.query[0].dtype;
  for (size_t index = 0; index < count; ++index) {
    CaptureLayer& layer = call.layers[index];
    parse_layer(in.query[index], in.key[index], dtype, p, layer);
    if (!in.sink.empty()) layer.sink = parse_dense(in.sink[index], "sink", {1, {p.heads}});
    const auto offset = static_cast<int64_t>(index);
    layer.maps = call.maps.data + offset * call.maps.layer_stride;
    layer.mass = call.mass.data + offset * call.mass.layer_stride;
    layer.entropy = call.entropy.data + offset * call.entropy.layer_stride;
  }
  p.layers = call.layers.data();
  p.layer_count = layers;
  return call;
}

}  // namespace
}  // namespace carve
