#include "cpu/capture/inputs.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "cpu/capture/kernels.h"

namespace carve {
namespace {

float to_float(float value) { return value; }

float to_float(Bfloat16 value) {
  const uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
  float result;
  std::memcpy(&result, &bits, sizeof(result));
  return result;
}

float to_float(Float16 value) {
  const int exponent = (value.bits >> 10) & 31;
  const int mantissa = value.bits & 1023;
  const float sign = (value.bits & 0x8000) != 0 ? -1.0f : 1.0f;
  if (exponent == 31) return mantissa == 0 ? sign * INFINITY : NAN;
  if (exponent == 0) return sign * std::ldexp(static_cast<float>(mantissa), -24);
  return sign * std::ldexp(static_cast<float>(mantissa + 1024), exponent - 25);
}

template <typename T>
void widen(const void* from, int64_t offset, int64_t stride, int64_t size, float* to) {
  const T* line = static_cast<const T*>(from) + offset;
  for (int64_t element = 0; element < size; ++element) to[element] = to_float(line[element * stride]);
}

}  // namespace

Span find_visible(const CaptureParams& p, int64_t batch, int64_t row, int64_t start, int64_t keys) {
  if (p.positions.data == nullptr) return {0, keys};
  const int64_t position = p.positions.at(batch, row);
  const int64_t last = std::clamp<int64_t>(position - start + 1, 0, keys);
  const int64_t first = p.window > 0 ? std::clamp<int64_t>(position - p.window - start + 1, 0, last) : 0;
  return {first, last};
}

const uint8_t* mask_of(const CaptureParams& p, int64_t batch, int64_t head, int64_t row, int64_t start, int64_t keys,
                       uint8_t* dense) {
  if (p.mask == nullptr) return nullptr;
  const int64_t* strides = p.mask_strides;
  const uint8_t* mask = p.mask + batch * strides[0] + head * strides[1] + row * strides[2] + start * strides[3];
  if (strides[3] == 1) return mask;
  for (int64_t key = 0; key < keys; ++key) dense[key] = mask[key * strides[3]];
  return dense;
}

void widen_rows(const CaptureParams& p, const CaptureLayer& layer, int64_t batch, int64_t key_head, int64_t first_row,
                int64_t rows, float* to) {
  const int64_t* strides = layer.query_strides;
  const int64_t group = p.heads / p.key_heads;
  for (int64_t row = first_row; row < first_row + rows; ++row) {
    for (int64_t head = key_head * group; head < (key_head + 1) * group; ++head) {
      const int64_t offset = batch * strides[0] + head * strides[1] + row * strides[2];
      switch (p.type) {
        case Float::kFloat32:
          widen<float>(layer.query, offset, strides[3], p.size, to);
          break;
        case Float::kFloat16:
          widen<Float16>(layer.query, offset, strides[3], p.size, to);
          break;
        case Float::kBfloat16:
          widen<Bfloat16>(layer.query, offset, strides[3], p.size, to);
          break;
      }
      to += p.size;
    }
  }
}

}  // namespace carve
