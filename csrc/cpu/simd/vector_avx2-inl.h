// Eight floats in AVX2, FMA and F16C.

constexpr int64_t kLanes = 8;
constexpr int64_t kPanelVectors = 2;
// 6 x 2 sums, 2 vectors of keys and one of a query: 15 of the 16 registers.
constexpr int64_t kTileRows = 6;
typedef float Vector __attribute__((vector_size(32)));
typedef int32_t Bits __attribute__((vector_size(32)));

CARVE_INLINE Vector load(const float* from) { return _mm256_loadu_ps(from); }

CARVE_INLINE Vector load(const Bfloat16* from) {
  const __m128i raw = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  return (Vector)_mm256_slli_epi32(_mm256_cvtepu16_epi32(raw), 16);
}

CARVE_INLINE Vector load(const Float16* from) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
}

#include "cpu/simd/vector_common-inl.h"

CARVE_INLINE Bits load_bytes(const uint8_t* from) {
  return (Bits)_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from)));
}

CARVE_INLINE Vector splat(float value) { return _mm256_set1_ps(value); }

CARVE_INLINE Vector fma(Vector a, Vector b, Vector c) { return _mm256_fmadd_ps(a, b, c); }

CARVE_INLINE Vector nearest(Vector value) {
  return _mm256_round_ps(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

CARVE_INLINE float sum_lanes(Vector value) {
  const __m128 fours = _mm_add_ps(_mm256_castps256_ps128(value), _mm256_extractf128_ps(value, 1));
  const __m128 pairs = _mm_add_ps(fours, _mm_movehl_ps(fours, fours));
  return _mm_cvtss_f32(_mm_add_ss(pairs, _mm_movehdup_ps(pairs)));
}

CARVE_INLINE float largest_lane(Vector value) {
  const __m128 fours = _mm_max_ps(_mm256_castps256_ps128(value), _mm256_extractf128_ps(value, 1));
  const __m128 pairs = _mm_max_ps(fours, _mm_movehl_ps(fours, fours));
  return _mm_cvtss_f32(_mm_max_ss(pairs, _mm_movehdup_ps(pairs)));
}

// 16 elements of bfloat16, each in one half of a 32-bit lane.
CARVE_INLINE __m256i load_pairs(const Bfloat16* from) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
}

CARVE_INLINE __m256i load_some_pairs(const Bfloat16* from, int64_t count) {
  if (count == kLanes) return _mm256_zextsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
  Bfloat16 line[2 * kLanes] = {};
  for (int64_t element = 0; element < count; ++element) line[element] = from[element];
  return load_pairs(line);
}

CARVE_INLINE Vector even_elements(__m256i pairs) { return (Vector)_mm256_slli_epi32(pairs, 16); }

CARVE_INLINE Vector odd_elements(__m256i pairs) {
  return (Vector)_mm256_and_si256(pairs, _mm256_set1_epi32(static_cast<int32_t>(0xffff0000)));
}

template <typename T>
CARVE_INLINE void keep(T& value) {
  CARVE_KEEP("x", value);
}

// Lane i is the sum of the lanes of sums[i].
CARVE_INLINE Vector sum_each(const Vector* sums) {
  __m256 halves[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    halves[i] = _mm256_add_ps(_mm256_blend_ps(sums[i], sums[i + 4], 0xf0),
                              _mm256_permute2f128_ps(sums[i], sums[i + 4], 0x21));
  }
  __m256 pairs[2];
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    pairs[i] = _mm256_add_ps(_mm256_blend_ps(halves[2 * i], halves[2 * i + 1], 0xcc),
                             _mm256_shuffle_ps(halves[2 * i], halves[2 * i + 1], 0x4e));
  }
  return _mm256_add_ps(_mm256_shuffle_ps(pairs[0], pairs[1], 0x88), _mm256_shuffle_ps(pairs[0], pairs[1], 0xdd));
}

CARVE_INLINE void transpose(Vector (&tile)[kLanes]) {
  __m256 pairs[kLanes];
  for (int i = 0; i < 8; i += 2) {
    pairs[i] = _mm256_unpacklo_ps(tile[i], tile[i + 1]);
    pairs[i + 1] = _mm256_unpackhi_ps(tile[i], tile[i + 1]);
  }
  __m256 quads[kLanes];
  for (int i = 0; i < 8; i += 4) {
    quads[i] = _mm256_shuffle_ps(pairs[i], pairs[i + 2], 0x44);
    quads[i + 1] = _mm256_shuffle_ps(pairs[i], pairs[i + 2], 0xee);
    quads[i + 2] = _mm256_shuffle_ps(pairs[i + 1], pairs[i + 3], 0x44);
    quads[i + 3] = _mm256_shuffle_ps(pairs[i + 1], pairs[i + 3], 0xee);
  }
  for (int i = 0; i < 4; ++i) {
    tile[i] = _mm256_permute2f128_ps(quads[i], quads[i + 4], 0x20);
    tile[i + 4] = _mm256_permute2f128_ps(quads[i], quads[i + 4], 0x31);
  }
}
