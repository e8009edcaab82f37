// Checks and translation of the inputs that the operators of capture and of column sums share.
#pragma once

#include <algorithm>
#include <optional>

#include "bindings/operands.h"
#include "carve.h"

namespace carve {
namespace {

template <typename... T>
inline void check(bool holds, const T&... message) {
  if (!holds) fail("capture: ", message...);
}

// A kernel that reads memory of another device leaves CUDA unusable in the whole process.
inline void check_device(const Operand& query, const Operand& tensor, const char* name) {
  check(tensor.is_on_device_of(query), name, ": expected a tensor on the device of query");
}

inline void check_device(const Operand& query, const std::optional<Operand>& tensor, const char* name) {
  if (tensor) check_device(query, *tensor, name);
}

inline void check_shape(const Operand& tensor, const char* name, const Sizes& shape) {
  check(tensor.has_shape(shape), name, ": expected shape ", shape, ", got ", tensor);
}

inline Float parse_float(const Operand& tensor) {
  if (tensor.dtype == kDtypes.float32) return Float::kFloat32;
  if (tensor.dtype == kDtypes.float16) return Float::kFloat16;
  check(tensor.dtype == kDtypes.bfloat16, "query: expected float32, float16 or bfloat16, got ", tensor);
  return Float::kBfloat16;
}

inline IndexMatrix parse_index(const Operand& tensor, const char* name, int64_t rows, int64_t columns) {
  const bool is_int64 = tensor.dtype == kDtypes.int64;
  check(is_int64 || tensor.dtype == kDtypes.int32, name, ": expected int32 or int64, got ", tensor);
  check_shape(tensor, name, {2, {rows, columns}});
  return IndexMatrix{tensor.data(), is_int64, {tensor.strides[0], tensor.strides[1]}};
}

inline const float* parse_dense(const Operand& tensor, const char* name, const Sizes& shape) {
  check(tensor.dtype == kDtypes.float32 && tensor.has_shape(shape) && tensor.is_contiguous(), name,
        ": expected a contiguous float32 tensor of shape ", shape, ", got ", tensor);
  return static_cast<const float*>(tensor.data());
}

inline void parse_mask(const Operand& mask, CaptureParams& p) {
  check(mask.dtype == kDtypes.boolean && mask.dims == 4, "mask: expected bool with 4 dimensions, got ", mask);
  const int64_t heads = mask.sizes[1];
  check((heads == 1 || heads == p.heads) && mask.has_shape({4, {p.batch, heads, p.rows, p.keys}}),
        "mask: expected the batch, 1 or all heads, the rows of query and the keys, got ", mask);
  p.mask = static_cast<const uint8_t*>(mask.data());
  std::copy_n(mask.strides, 4, p.mask_strides);
  if (heads == 1) p.mask_strides[1] = 0;
}

inline void parse_sizes(const Operand& query, const Operand& key, CaptureParams& p) {
  check(query.dims == 4, "query: expected 4 dimensions, got ", query);
  check(key.dims == 4, "key: expected 4 dimensions, got ", key);
  p.batch = query.sizes[0];
  p.heads = query.sizes[1];
  p.rows = query.sizes[2];
  p.size = query.sizes[3];
  p.key_heads = key.sizes[1];
  p.keys = key.sizes[2];
  p.type = parse_float(query);
  check(p.heads > 0, "query: expected at least one head, got ", query);
  check(p.key_heads > 0 && p.heads % p.key_heads == 0, "key: expected a number of heads that divides the ", p.heads,
        " of query, got ", key);
}

// What every row of a call sees, and how its scores become probabilities.
struct RowOperands {
  const std::optional<Operand>& mask;
  const std::optional<Operand>& positions;
  const std::optional<Operand>& lse;
  double scale;
  double softcap;
  int64_t window;
};

inline void parse_rows(const RowOperands& in, CaptureParams& p) {
  if (in.positions) p.positions = parse_index(*in.positions, "positions", p.batch, p.rows);
  if (in.mask) parse_mask(*in.mask, p);
  if (in.lse) p.lse = parse_dense(*in.lse, "lse", {3, {p.batch, p.heads, p.rows}});
  check(in.window >= 0, "window: expected at least 0, got ", in.window);
  check(in.window == 0 || in.positions, "window: expected positions along with a window");
  p.scale = static_cast<float>(in.scale);
  p.softcap = static_cast<float>(in.softcap);
  p.window = in.window;
}

}  // namespace
}  // namespace carve
