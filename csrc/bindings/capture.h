// Checks of the capture operators' arguments, and their translation into CaptureParams.
#pragma once

#include <algorithm>
#include <optional>
#include <vector>

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include "carve.h"

namespace carve {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Shape = std::vector<int64_t>;

template <typename... T>
void check(bool holds, const T&... message) {
  STD_TORCH_CHECK(holds, "capture: ", message...);
}

bool has_shape(const Tensor& tensor, const Shape& shape) {
  const auto sizes = tensor.sizes();
  return std::equal(sizes.begin(), sizes.end(), shape.begin(), shape.end());
}

void copy_strides(const Tensor& tensor, int64_t count, int64_t* strides) {
  const auto from = tensor.strides();
  std::copy(from.begin(), from.begin() + count, strides);
}

Float parse_float(const Tensor& tensor) {
  const ScalarType type = tensor.scalar_type();
  check(type == ScalarType::Float || type == ScalarType::Half || type == ScalarType::BFloat16,
        "query: expected float32, float16 or bfloat16");
  if (type == ScalarType::Float) return Float::kFloat32;
  return type == ScalarType::Half ? Float::kFloat16 : Float::kBfloat16;
}

IndexMatrix parse_index(const Tensor& tensor, const char* name, int64_t rows, int64_t columns) {
  const ScalarType type = tensor.scalar_type();
  check(type == ScalarType::Int || type == ScalarType::Long, name, ": expected int32 or int64");
  check(has_shape(tensor, {rows, columns}), name, ": expected shape [", rows, ", ", columns, "]");
  IndexMatrix index{tensor.const_data_ptr(), type == ScalarType::Long, {}};
  copy_strides(tensor, 2, index.strides);
  return index;
}

const float* parse_dense(const Tensor& tensor, const char* name, const Shape& shape) {
  check(tensor.scalar_type() == ScalarType::Float && tensor.is_contiguous() && has_shape(tensor, shape), name,
        ": expected a contiguous float32 tensor of the heads and rows of query");
  return tensor.const_data_ptr<float>();
}

void parse_mask(const Tensor& mask, CaptureParams& p) {
  check(mask.scalar_type() == ScalarType::Bool && mask.dim() == 4, "mask: expected bool with 4 dimensions");
  const int64_t heads = mask.size(1);
  check((heads == 1 || heads == p.heads) && has_shape(mask, {p.batch, heads, p.rows, p.keys}),
        "mask: expected the batch, 1 or all heads, the rows of query and the keys");
  p.mask = static_cast<const uint8_t*>(mask.const_data_ptr());
  copy_strides(mask, 4, p.mask_strides);
  if (heads == 1) p.mask_strides[1] = 0;
}

// The sizes of a call, from its first layer, and its shared inputs.
CaptureParams parse_inputs(const Tensor& query, const Tensor& key, const Tensor& tokens,
                           const std::optional<Tensor>& mask, const std::optional<Tensor>& positions,
                           const std::optional<Tensor>& lse) {
  CaptureParams p{};
  check(query.dim() == 4 && key.dim() == 4, "query, key: expected 4 dimensions");
  p.batch = query.size(0);
  p.heads = query.size(1);
  p.rows = query.size(2);
  p.size = query.size(3);
  p.key_heads = key.size(1);
  p.keys = key.size(2);
  p.type = parse_float(query);
  check(p.key_heads > 0 && p.heads % p.key_heads == 0, "key: expected a number of heads that divides that of query");
  check(tokens.dim() == 2, "tokens: expected 2 dimensions");
  p.token_count = tokens.size(1);
  p.tokens = parse_index(tokens, "tokens", p.batch, p.token_count);
  if (positions) p.positions = parse_index(*positions, "positions", p.batch, p.rows);
  if (mask) parse_mask(*mask, p);
  if (lse) p.lse = parse_dense(*lse, "lse", {p.batch, p.heads, p.rows});
  return p;
}

CaptureLayer parse_layer(const CaptureParams& p, const Tensor& query, const Tensor& key) {
  check(parse_float(query) == p.type, "query: expected the same dtype in all layers");
  check(query.scalar_type() == key.scalar_type(), "key: expected the dtype of query");
  check(has_shape(query, {p.batch, p.heads, p.rows, p.size}) && has_shape(key, {p.batch, p.key_heads, p.keys, p.size}),
        "query, key: expected the same shapes in all layers");
  check(p.size < 2 || key.stride(3) == 1, "key: expected stride 1 along the elements of a key");
  CaptureLayer layer{};
  layer.query = query.const_data_ptr();
  layer.key = key.const_data_ptr();
  copy_strides(query, 4, layer.query_strides);
  copy_strides(key, 3, layer.key_strides);
  return layer;
}

// One output of the first layer in step 0. A stepped output has the leading dimensions [steps, layers].
struct Output {
  float* data;
  int64_t steps;  // 1 if the output is not stepped
  int64_t step_stride;
  int64_t layer_stride;
};

Output parse_output(const Tensor& out, const char* name, const Shape& shape, bool stepped, int64_t first,
                    int64_t layers, int64_t* strides) {
  check(out.scalar_type() == ScalarType::Float, name, ": expected float32");
  const int64_t front = stepped ? 2 : 0;
  check(out.dim() == front + static_cast<int64_t>(shape.size()), name, ": unexpected number of dimensions");
  const auto sizes = out.sizes();
  const auto all = out.strides();
  check(std::equal(shape.begin(), shape.end(), sizes.begin() + front), name, ": unexpected shape");
  std::copy(all.begin() + front, all.end(), strides);
  float* data = out.mutable_data_ptr<float>();
  if (!stepped) return {data, 1, 0, 0};
  check(first >= 0 && layers <= sizes[1] - first, name, ": expected first + ", layers, " layers to fit in ", sizes[1]);
  return {data + first * all[1], sizes[0], all[0], all[1]};
}

// The arguments of both operators; each adds the offset of the current step itself.
struct CaptureArguments {
  CaptureParams params;
  std::vector<CaptureLayer> layers;
  Output maps;
  Output mass;
  Output entropy;
};

CaptureArguments parse_capture(const std::vector<Tensor>& query, const std::vector<Tensor>& key, const Tensor& tokens,
                               const std::optional<Tensor>& mask, const std::optional<Tensor>& positions,
                               const std::vector<Tensor>& sink, const std::optional<Tensor>& lse, double scale,
                               double softcap, int64_t window, bool each, bool stepped, int64_t first,
                               const Tensor& maps, const Tensor& mass, const Tensor& entropy) {
  const size_t count = query.size();
  check(count > 0 && key.size() == count && (sink.empty() || sink.size() == count) && (stepped || count == 1),
        "query, key, sink: expected one entry a layer");
  CaptureArguments all{};
  CaptureParams& p = all.params;
  p = parse_inputs(query[0], key[0], tokens, mask, positions, lse);
  check(window == 0 || positions, "window: expected positions along with a window");
  p.scale = static_cast<float>(scale);
  p.softcap = static_cast<float>(softcap);
  p.window = window;
  p.each = each;

  const int64_t layers = static_cast<int64_t>(count);
  const Shape rows = {p.batch, p.rows};
  int64_t strides[4];
  const Shape shape = each ? Shape{p.batch, p.heads, p.rows, p.token_count} : Shape{p.batch, p.rows, p.token_count};
  all.maps = parse_output(maps, "maps", shape, stepped, first, layers, strides);
  p.maps_strides[0] = strides[0];
  p.maps_strides[1] = each ? strides[1] : 0;
  p.maps_strides[2] = strides[each ? 2 : 1];
  all.mass = parse_output(mass, "mass", rows, stepped, first, layers, p.mass_strides);
  all.entropy = parse_output(entropy, "entropy", rows, stepped, first, layers, p.entropy_strides);
  all.layers.reserve(count);
  for (size_t index = 0; index < count; ++index) {
    CaptureLayer layer = parse_layer(p, query[index], key[index]);
    if (!sink.empty()) layer.sink = parse_dense(sink[index], "sink", {p.heads});
    const int64_t offset = static_cast<int64_t>(index);
    layer.maps = all.maps.data + offset * all.maps.layer_stride;
    layer.mass = all.mass.data + offset * all.mass.layer_stride;
    layer.entropy = all.entropy.data + offset * all.entropy.layer_stride;
    all.layers.push_back(layer);
  }
  p.layer_count = layers;
  return all;
}

}  // namespace
}  // namespace carve
