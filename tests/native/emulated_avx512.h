// The AVX-512 instructions of the kernels in plain C++, as the manuals define them: their source is compiled a second
// time with these, so that any machine can run it under sanitizers.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "cpu/simd/inline.h"

// The compiler's own definitions must not follow.
#define _IMMINTRIN_H_INCLUDED
#define __IMMINTRIN_H
#undef CARVE_BEGIN_TARGET
#undef CARVE_END_TARGET
#undef CARVE_KEEP
#define CARVE_BEGIN_TARGET(features)
#define CARVE_END_TARGET
#define CARVE_KEEP(kind, value) static_cast<void>(value)
// Out of line: kernels of thousands of these compile in seconds.
#define EMULATED [[maybe_unused]] __attribute__((noinline)) static
#define _MM_FROUND_TO_NEAREST_INT 0
#define _MM_FROUND_NO_EXC 8

namespace {

typedef long long __m128i __attribute__((vector_size(16)));
typedef long long __m256i __attribute__((vector_size(32)));
typedef long long __m512i __attribute__((vector_size(64)));
typedef float __m512 __attribute__((vector_size(64)));
typedef uint16_t __m512bh __attribute__((vector_size(64)));
typedef uint32_t Words __attribute__((vector_size(64)));
typedef uint16_t __mmask16;
typedef uint32_t __mmask32;

template <class To>
To load_as(const void* from) {
  To result;
  std::memcpy(&result, from, sizeof(result));
  return result;
}

// Elements that the mask hides are not touched.
template <class To, class Element>
To load_masked(uint32_t mask, const void* from) {
  Element line[sizeof(To) / sizeof(Element)] = {};
  for (size_t lane = 0; lane < sizeof(line) / sizeof(Element); ++lane) {
    const char* address = static_cast<const char*>(from) + lane * sizeof(Element);
    if ((mask >> lane & 1) != 0) std::memcpy(&line[lane], address, sizeof(Element));
  }
  return load_as<To>(line);
}

// GCC 12 with sanitizers reads wrong lanes where the index of a vector is a variable.
template <class Element = float, class Vector>
Element at(const Vector& value, int lane) {
  Element line[sizeof(Vector) / sizeof(Element)];
  std::memcpy(line, &value, sizeof(line));
  return line[lane];
}

template <class Element = float, class Function>
auto each_lane(const Function& function) {
  typedef Element Result __attribute__((vector_size(64)));
  Element line[64 / sizeof(Element)];
  for (int lane = 0; lane < static_cast<int>(64 / sizeof(Element)); ++lane) line[lane] = function(lane);
  return load_as<Result>(line);
}

EMULATED float from_half(uint16_t bits) {
  const int exponent = (bits >> 10) & 31;
  const int mantissa = (bits & 1023) + (exponent == 0 ? 0 : 1024);
  const float size = std::ldexp(static_cast<float>(mantissa), exponent == 0 ? -24 : exponent - 25);
  const bool special = (bits & 0x7c00) == 0x7c00;
  const float value = !special ? size : (bits & 1023) == 0 ? INFINITY : NAN;
  return (bits & 0x8000) != 0 ? -value : value;
}

EMULATED __m128i _mm_loadu_si128(const __m128i* from) { return load_as<__m128i>(from); }
EMULATED __m256i _mm256_loadu_si256(const __m256i* from) { return load_as<__m256i>(from); }
EMULATED __m256i _mm256_maskz_loadu_epi16(__mmask16 mask, const void* from) {
  return load_masked<__m256i, uint16_t>(mask, from);
}
EMULATED __m512i _mm512_loadu_si512(const void* from) { return load_as<__m512i>(from); }
EMULATED __m512i _mm512_maskz_loadu_epi16(__mmask32 mask, const void* from) {
  return load_masked<__m512i, uint16_t>(mask, from);
}
EMULATED __m512 _mm512_loadu_ps(const void* from) { return load_as<__m512>(from); }
EMULATED __m512 _mm512_maskz_loadu_ps(__mmask16 mask, const void* from) {
  return load_masked<__m512, float>(mask, from);
}
EMULATED __m512 _mm512_set1_ps(float value) { return __m512{} + value; }
EMULATED __m512i _mm512_set1_epi32(int32_t value) { return (__m512i)(Words{} + static_cast<uint32_t>(value)); }
EMULATED __m512i _mm512_slli_epi32(__m512i value, int count) { return (__m512i)((Words)value << count); }
EMULATED __m512i _mm512_and_si512(__m512i a, __m512i b) { return a & b; }
EMULATED __m512 _mm512_add_ps(__m512 a, __m512 b) { return a + b; }

EMULATED __m512i _mm512_cvtepu16_epi32(__m256i value) {
  return (__m512i)each_lane<uint32_t>([&](int lane) { return at<uint16_t>(value, lane); });
}

EMULATED __m512i _mm512_cvtepu8_epi32(__m128i value) {
  return (__m512i)each_lane<uint32_t>([&](int lane) { return at<uint8_t>(value, lane); });
}

EMULATED __m512 _mm512_cvtph_ps(__m256i value) {
  return each_lane([&](int lane) { return from_half(at<uint16_t>(value, lane)); });
}

EMULATED __m512 _mm512_fmadd_ps(__m512 a, __m512 b, __m512 c) {
  return each_lane([&](int lane) { return std::fma(at(a, lane), at(b, lane), at(c, lane)); });
}

EMULATED __m512 _mm512_roundscale_ps(__m512 value, int) {
  return each_lane([&](int lane) { return std::nearbyint(at(value, lane)); });
}

EMULATED __m512 _mm512_scalef_ps(__m512 value, __m512 power) {
  return each_lane([&](int lane) {
    const float whole = std::floor(at(power, lane));
    return std::isnan(whole) ? whole : std::ldexp(at(value, lane), static_cast<int>(whole));
  });
}

// The order of the intrinsics of GCC and Clang: halves, quarters, pairs.
template <class Function>
float reduce_lanes(const __m512& value, const Function& function) {
  float line[16];
  std::memcpy(line, &value, sizeof(line));
  for (int count = 8; count > 0; count /= 2) {
    for (int lane = 0; lane < count; ++lane) line[lane] = function(line[lane], line[lane + count]);
  }
  return line[0];
}

EMULATED float _mm512_reduce_add_ps(__m512 value) {
  return reduce_lanes(value, [](float a, float b) { return a + b; });
}

EMULATED float _mm512_reduce_max_ps(__m512 value) {
  return reduce_lanes(value, [](float a, float b) { return a > b ? a : b; });
}

EMULATED __m512 _mm512_mask_blend_ps(__mmask16 mask, __m512 a, __m512 b) {
  return each_lane([&](int lane) { return at((mask >> lane & 1) != 0 ? b : a, lane); });
}

EMULATED __m512 _mm512_unpacklo_ps(__m512 a, __m512 b) {
  return each_lane([&](int lane) { return at(lane % 2 == 0 ? a : b, lane / 4 * 4 + lane % 4 / 2); });
}

EMULATED __m512 _mm512_unpackhi_ps(__m512 a, __m512 b) {
  return each_lane([&](int lane) { return at(lane % 2 == 0 ? a : b, lane / 4 * 4 + 2 + lane % 4 / 2); });
}

// Two lanes of each four from a, two from b.
EMULATED __m512 _mm512_shuffle_ps(__m512 a, __m512 b, int order) {
  return each_lane([&](int lane) { return at(lane % 4 < 2 ? a : b, lane / 4 * 4 + (order >> 2 * (lane % 4) & 3)); });
}

// Two groups of four lanes from a, two from b.
EMULATED __m512 _mm512_shuffle_f32x4(__m512 a, __m512 b, int order) {
  return each_lane([&](int lane) { return at(lane < 8 ? a : b, (order >> 2 * (lane / 4) & 3) * 4 + lane % 4); });
}

// Each accumulation is rounded to nearest even; subnormal operands and results are zero.
EMULATED float flushed(float value) {
  return std::fpclassify(value) == FP_SUBNORMAL ? std::copysign(0.0f, value) : value;
}

EMULATED float from_bfloat(uint16_t bits) {
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  return flushed(load_as<float>(&wide));
}

EMULATED __m512 _mm512_dpbf16_ps(__m512 sum, __m512bh a, __m512bh b) {
  return each_lane([&](int lane) {
    float result = flushed(at(sum, lane));
    for (int half = 1; half >= 0; --half) {
      const int element = 2 * lane + half;
      result = flushed(std::fma(from_bfloat(at<uint16_t>(a, element)), from_bfloat(at<uint16_t>(b, element)), result));
    }
    return result;
  });
}

}  // namespace
