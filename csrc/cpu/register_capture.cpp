// Capture, registered through torch's stable ABI; the schemas are in carve_kernels/schemas.py.

#include <algorithm>
#include <optional>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include "carve.h"
#include "isa.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Shape = std::vector<int64_t>;

template <typename... T>
void check(bool holds, const T&... words) {
  STD_TORCH_CHECK(holds, "capture_cpu: ", words...);
}

bool has_shape(const Tensor& tensor, const Shape& shape) {
  const auto sizes = tensor.sizes();
  return std::equal(sizes.begin(), sizes.end(), shape.begin(), shape.end());
}

void copy_strides(const Tensor& tensor, int64_t count, int64_t* strides) {
  const auto from = tensor.strides();
  std::copy(from.begin(), from.begin() + count, strides);
}

carve::Float parse_float(const Tensor& tensor) {
  const ScalarType type = tensor.scalar_type();
  check(type == ScalarType::Float || type == ScalarType::Half || type == ScalarType::BFloat16,
        "query: expected float32, float16 or bfloat16");
  if (type == ScalarType::Float) return carve::Float::kFloat32;
  return type == ScalarType::Half ? carve::Float::kFloat16 : carve::Float::kBfloat16;
}

carve::IndexMatrix parse_index(const Tensor& tensor, const char* name, int64_t rows, int64_t columns) {
  const ScalarType type = tensor.scalar_type();
  check(type == ScalarType::Int || type == ScalarType::Long, name, ": expected int32 or int64");
  check(has_shape(tensor, {rows, columns}), name, ": expected shape [", rows, ", ", columns, "]");
  carve::IndexMatrix index{tensor.const_data_ptr(), type == ScalarType::Long, {}};
  copy_strides(tensor, 2, index.strides);
  return index;
}

const float* parse_dense(const Tensor& tensor, const char* name, const Shape& shape) {
  check(tensor.scalar_type() == ScalarType::Float && tensor.is_contiguous() && has_shape(tensor, shape), name,
        ": expected a contiguous float32 tensor of the heads and rows of query");
  return tensor.const_data_ptr<float>();
}

void parse_mask(const Tensor& mask, carve::CaptureParams& p) {
  check(mask.scalar_type() == ScalarType::Bool && mask.dim() == 4, "mask: expected bool with 4 dimensions");
  const int64_t heads = mask.size(1);
  check((heads == 1 || heads == p.heads) && has_shape(mask, {p.batch, heads, p.rows, p.keys}),
        "mask: expected the batch, 1 or all heads, the rows of query and the keys");
  p.mask = static_cast<const uint8_t*>(mask.const_data_ptr());
  copy_strides(mask, 4, p.mask_strides);
  if (heads == 1) p.mask_strides[1] = 0;
}

// The geometry of a call, from its first layer; the outputs' come later.
carve::CaptureParams parse_inputs(const Tensor& query, const Tensor& key, const Tensor& tokens,
                                  const std::optional<Tensor>& mask, const std::optional<Tensor>& positions,
                                  const std::optional<Tensor>& lse) {
  carve::CaptureParams p{};
  check(query.dim() == 4 && key.dim() == 4, "query, key: expected 4 dimensions");
  p.batch = query.size(0);
  p.heads = query.size(1);
  p.rows = query.size(2);
  p.size = query.size(3);
  p.key_heads = key.size(1);
  p.keys = key.size(2);
  p.type = parse_float(query);
  check(p.key_heads > 0 && p.heads % p.key_heads == 0, "key: expected heads that divide those of query");
  check(tokens.dim() == 2, "tokens: expected 2 dimensions");
  p.token_count = tokens.size(1);
  p.tokens = parse_index(tokens, "tokens", p.batch, p.token_count);
  if (positions) p.positions = parse_index(*positions, "positions", p.batch, p.rows);
  if (mask) parse_mask(*mask, p);
  if (lse) p.lse = parse_dense(*lse, "lse", {p.batch, p.heads, p.rows});
  return p;
}

carve::CaptureLayer parse_layer(const carve::CaptureParams& p, const Tensor& query, const Tensor& key) {
  check(query.scalar_type() == key.scalar_type(), "key: expected the dtype of query");
  check(has_shape(query, {p.batch, p.heads, p.rows, p.size}) && has_shape(key, {p.batch, p.key_heads, p.keys, p.size}),
        "query, key: expected the same shapes in all layers");
  check(p.size < 2 || key.stride(3) == 1, "key: expected the elements of a key side by side");
  carve::CaptureLayer layer{};
  layer.query = query.const_data_ptr();
  layer.key = key.const_data_ptr();
  copy_strides(query, 4, layer.query_strides);
  copy_strides(key, 3, layer.key_strides);
  return layer;
}

// Where one output of the first layer starts. With a step it has [steps, layers] in front.
struct Output {
  float* data;
  int64_t layer_stride;
};

Output parse_output(const Tensor& out, const char* name, const Shape& shape, int64_t step, int64_t first,
                    int64_t layers, int64_t* strides) {
  check(out.scalar_type() == ScalarType::Float, name, ": expected float32");
  const int64_t front = step < 0 ? 0 : 2;
  check(out.dim() == front + static_cast<int64_t>(shape.size()), name, ": unexpected number of dimensions");
  const auto sizes = out.sizes();
  const auto all = out.strides();
  check(std::equal(shape.begin(), shape.end(), sizes.begin() + front), name, ": unexpected shape");
  // The last dimension of maps is dense and has no stride in the parameters.
  std::copy(all.begin() + front, all.begin() + front + std::min<size_t>(shape.size(), 3), strides);
  if (front == 0) return {out.mutable_data_ptr<float>(), 0};
  check(first >= 0 && layers <= sizes[1] - first, name, ": expected first + ", layers, " layers to fit in ", sizes[1]);
  check(step < sizes[0], "step: expected a step below ", sizes[0], ", got ", step);
  return {out.mutable_data_ptr<float>() + step * all[0] + first * all[1], all[1]};
}

int64_t parse_step(const std::optional<Tensor>& step) {
  if (!step) return -1;
  check(step->scalar_type() == ScalarType::Long && step->numel() == 1, "step: expected one int64");
  const int64_t value = *step->const_data_ptr<int64_t>();
  check(value >= 0, "step: expected a step of at least 0, got ", value);
  return value;
}

void capture_cpu(std::vector<Tensor> query, std::vector<Tensor> key, Tensor tokens, std::optional<Tensor> mask,
                 std::optional<Tensor> positions, std::vector<Tensor> sink, std::optional<Tensor> lse, double scale,
                 double softcap, int64_t window, bool each, std::optional<Tensor> step, int64_t first, Tensor maps,
                 Tensor mass, Tensor entropy) {
  const size_t count = query.size();
  check(count > 0 && key.size() == count && (sink.empty() || sink.size() == count) && (step || count == 1),
        "query, key, sink: expected one entry a layer");
  carve::CaptureParams p = parse_inputs(query[0], key[0], tokens, mask, positions, lse);
  check(window == 0 || positions, "window: expected positions beside a window");
  p.scale = static_cast<float>(scale);
  p.softcap = static_cast<float>(softcap);
  p.window = window;
  p.each = each;

  const int64_t slot = parse_step(step);
  const int64_t layers = static_cast<int64_t>(count);
  const Shape rows = {p.batch, p.rows};
  int64_t strides[3];
  const Shape shape = each ? Shape{p.batch, p.heads, p.rows, p.token_count} : Shape{p.batch, p.rows, p.token_count};
  const Output to_maps = parse_output(maps, "maps", shape, slot, first, layers, strides);
  check(p.token_count < 2 || maps.stride(-1) == 1, "maps: expected the tokens side by side");
  p.maps_strides[0] = strides[0];
  p.maps_strides[1] = each ? strides[1] : 0;
  p.maps_strides[2] = strides[each ? 2 : 1];
  const Output to_mass = parse_output(mass, "mass", rows, slot, first, layers, p.mass_strides);
  const Output to_entropy = parse_output(entropy, "entropy", rows, slot, first, layers, p.entropy_strides);

  std::vector<carve::CaptureLayer> all;
  all.reserve(count);
  for (size_t index = 0; index < count; ++index) {
    carve::CaptureLayer layer = parse_layer(p, query[index], key[index]);
    if (!sink.empty()) layer.sink = parse_dense(sink[index], "sink", {p.heads});
    layer.maps = to_maps.data + static_cast<int64_t>(index) * to_maps.layer_stride;
    layer.mass = to_mass.data + static_cast<int64_t>(index) * to_mass.layer_stride;
    layer.entropy = to_entropy.data + static_cast<int64_t>(index) * to_entropy.layer_stride;
    all.push_back(layer);
  }
  p.layers = all.data();
  p.layer_count = layers;
  p.threads = torch::stable::get_num_threads();
  carve::capture_cpu(p);
}

// Writes the instructions in use and the best of this machine, after a change to `wanted`: -1 is the environment's.
void isa_cpu(int64_t wanted, Tensor out) {
  STD_TORCH_CHECK(out.scalar_type() == ScalarType::Long && out.is_contiguous() && out.numel() == 2,
                  "isa_cpu: out: expected two int64");
  constexpr int64_t kAsItIs = -2;
  if (wanted != kAsItIs) carve::force_isa(wanted);
  int64_t* data = out.mutable_data_ptr<int64_t>();
  data[0] = static_cast<int64_t>(carve::active_isa());
  data[1] = static_cast<int64_t>(carve::best_isa());
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(carve_kernels, CPU, m) {
  m.impl("capture_cpu", TORCH_BOX(&capture_cpu));
  m.impl("isa_cpu", TORCH_BOX(&isa_cpu));
}
