// Four floats in the compiler's generic vectors: SSE2 on x86-64, NEON on aarch64.

constexpr int64_t kLanes = 4;
constexpr int64_t kPanelVectors = 2;
constexpr int64_t kTileRows = 4;
typedef float Vector __attribute__((vector_size(16)));
typedef int32_t Bits __attribute__((vector_size(16)));

CARVE_INLINE Vector load(const float* from) {
  Vector result;
  __builtin_memcpy(&result, from, sizeof(result));
  return result;
}

CARVE_INLINE Vector load(const Bfloat16* from) {
  uint16_t raw[kLanes];
  __builtin_memcpy(raw, from, sizeof(raw));
  return (Vector)Bits{raw[0] << 16, raw[1] << 16, raw[2] << 16, raw[3] << 16};
}

CARVE_INLINE Vector load(const Float16* from) {
  uint16_t raw[kLanes];
  __builtin_memcpy(raw, from, sizeof(raw));
  const Bits bits = {raw[0], raw[1], raw[2], raw[3]};
  // The exponent moves by 112; a product also converts subnormal halves.
  const Vector value = (Vector)((bits & 0x7fff) << 13) * 0x1p112f;
  const Bits special = ((bits & 0x7c00) == 0x7c00) & 0x7f800000;
  return (Vector)((Bits)value | special | ((bits & 0x8000) << 16));
}

#include "cpu/simd/vector_common-inl.h"

CARVE_INLINE Bits load_bytes(const uint8_t* from) { return Bits{from[0], from[1], from[2], from[3]}; }

CARVE_INLINE Vector splat(float value) { return Vector{value, value, value, value}; }

CARVE_INLINE Vector fma(Vector a, Vector b, Vector c) { return a * b + c; }

CARVE_INLINE Vector nearest(Vector value) {
  // Adding 1.5 * 2^23 leaves no bits for a fraction.
  constexpr float kRound = 12582912.0f;
  return (value + kRound) - kRound;
}

CARVE_INLINE float sum_lanes(Vector value) { return (value[0] + value[2]) + (value[1] + value[3]); }

CARVE_INLINE float largest_lane(Vector value) {
  const float even = value[0] > value[2] ? value[0] : value[2];
  const float odd = value[1] > value[3] ? value[1] : value[3];
  return even > odd ? even : odd;
}

CARVE_INLINE void transpose(Vector (&tile)[kLanes]) {
  const Vector a = tile[0], b = tile[1], c = tile[2], d = tile[3];
  tile[0] = Vector{a[0], b[0], c[0], d[0]};
  tile[1] = Vector{a[1], b[1], c[1], d[1]};
  tile[2] = Vector{a[2], b[2], c[2], d[2]};
  tile[3] = Vector{a[3], b[3], c[3], d[3]};
}
