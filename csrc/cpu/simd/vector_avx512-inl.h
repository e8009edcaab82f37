// Sixteen floats in AVX-512 F, BW, DQ and VL.

constexpr int64_t kLanes = 16;
constexpr int64_t kPanelVectors = 2;
// 12 x 2 sums, 2 vectors of keys and one of a query: 27 of the 32 registers.
constexpr int64_t kTileRows = 12;
typedef float Vector __attribute__((vector_size(64)));
typedef int32_t Bits __attribute__((vector_size(64)));

CARVE_INLINE Vector widen_bfloat16(__m256i raw) {
  return (Vector)_mm512_slli_epi32(_mm512_cvtepu16_epi32(raw), 16);
}

CARVE_INLINE Vector load(const float* from) { return _mm512_loadu_ps(from); }

CARVE_INLINE Vector load(const Bfloat16* from) {
  return widen_bfloat16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
}

CARVE_INLINE Vector load(const Float16* from) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
}

CARVE_INLINE __mmask16 first_lanes(int64_t count) { return static_cast<__mmask16>((1u << count) - 1); }

CARVE_INLINE Vector load_some(const float* from, int64_t count) {
  return _mm512_maskz_loadu_ps(first_lanes(count), from);
}

CARVE_INLINE Vector load_some(const Bfloat16* from, int64_t count) {
  return widen_bfloat16(_mm256_maskz_loadu_epi16(first_lanes(count), from));
}

CARVE_INLINE Vector load_some(const Float16* from, int64_t count) {
  return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first_lanes(count), from));
}

CARVE_INLINE Bits load_bytes(const uint8_t* from) {
  return (Bits)_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
}

CARVE_INLINE Vector splat(float value) { return _mm512_set1_ps(value); }

CARVE_INLINE Vector fma(Vector a, Vector b, Vector c) { return _mm512_fmadd_ps(a, b, c); }

CARVE_INLINE Vector nearest(Vector value) {
  return _mm512_roundscale_ps(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

CARVE_INLINE Vector raise(Vector value, Vector power) { return _mm512_scalef_ps(value, power); }

CARVE_INLINE float sum_lanes(Vector value) { return _mm512_reduce_add_ps(value); }

CARVE_INLINE float largest_lane(Vector value) { return _mm512_reduce_max_ps(value); }

// 32 elements of bfloat16, each in one half of a 32-bit lane.
CARVE_INLINE __m512i load_pairs(const Bfloat16* from) { return _mm512_loadu_si512(from); }

CARVE_INLINE __m512i load_some_pairs(const Bfloat16* from, int64_t count) {
  return _mm512_maskz_loadu_epi16(static_cast<__mmask32>((1ull << count) - 1), from);
}

CARVE_INLINE Vector even_elements(__m512i pairs) { return (Vector)_mm512_slli_epi32(pairs, 16); }

CARVE_INLINE Vector odd_elements(__m512i pairs) {
  return (Vector)_mm512_and_si512(pairs, _mm512_set1_epi32(static_cast<int32_t>(0xffff0000)));
}

template <typename T>
CARVE_INLINE void keep(T& value) {
  CARVE_KEEP("v", value);
}

// Lane i is the sum of the lanes of sums[i].
CARVE_INLINE Vector sum_each(const Vector* sums) {
  __m512 halves[8];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    const Vector a = sums[i + (i & 4)], b = sums[i + (i & 4) + 4];
    halves[i] = _mm512_add_ps(_mm512_mask_blend_ps(0xff00, a, b), _mm512_shuffle_f32x4(a, b, 0x4e));
  }
  __m512 quarters[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const __m512 a = halves[i], b = halves[i + 4];
    quarters[i] = _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
  }
  __m512 pairs[2];
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    const __m512 a = quarters[2 * i], b = quarters[2 * i + 1];
    pairs[i] = _mm512_add_ps(_mm512_mask_blend_ps(0xcccc, a, b), _mm512_shuffle_ps(a, b, 0x4e));
  }
  return _mm512_add_ps(_mm512_shuffle_ps(pairs[0], pairs[1], 0x88), _mm512_shuffle_ps(pairs[0], pairs[1], 0xdd));
}

CARVE_INLINE void transpose(Vector (&tile)[kLanes]) {
  __m512 pairs[kLanes];
  for (int i = 0; i < 16; i += 2) {
    pairs[i] = _mm512_unpacklo_ps(tile[i], tile[i + 1]);
    pairs[i + 1] = _mm512_unpackhi_ps(tile[i], tile[i + 1]);
  }
  __m512 quads[kLanes];
  for (int i = 0; i < 16; i += 4) {
    quads[i] = _mm512_shuffle_ps(pairs[i], pairs[i + 2], 0x44);
    quads[i + 1] = _mm512_shuffle_ps(pairs[i], pairs[i + 2], 0xee);
    quads[i + 2] = _mm512_shuffle_ps(pairs[i + 1], pairs[i + 3], 0x44);
    quads[i + 3] = _mm512_shuffle_ps(pairs[i + 1], pairs[i + 3], 0xee);
  }
  __m512 octets[kLanes];
  for (int i = 0; i < 16; i += 8) {
    for (int j = 0; j < 4; ++j) {
      octets[i + j] = _mm512_shuffle_f32x4(quads[i + j], quads[i + j + 4], 0x88);
      octets[i + j + 4] = _mm512_shuffle_f32x4(quads[i + j], quads[i + j + 4], 0xdd);
    }
  }
  for (int i = 0; i < 8; ++i) {
    tile[i] = _mm512_shuffle_f32x4(octets[i], octets[i + 8], 0x88);
    tile[i + 8] = _mm512_shuffle_f32x4(octets[i], octets[i + 8], 0xdd);
  }
}
