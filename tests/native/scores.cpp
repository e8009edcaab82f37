// Scores of every instruction set, AVX-512 and AVX512_BF16 emulated, against sums in float64: odd sizes and numbers of
// rows and keys, NaN between the keys, a guard page behind the last one, and poisoned scores.

#include <algorithm>
#include <cstdio>

#include "cpu/capture/kernels.h"
#include "native/capture_problem.h"

namespace {

struct Level {
  const char* name;
  const carve::CaptureKernels& kernels;
};

std::vector<Level> levels() {
  std::vector<Level> result = {{"plain", carve::capture_kernels_plain()}};
#ifdef CARVE_X86
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) {
    result.push_back({"avx2", carve::capture_kernels_avx2()});
  }
  result.push_back({"avx512", carve::capture_kernels_avx512()});
  result.push_back({"avx512_bf16", carve::capture_kernels_avx512_bf16()});
#endif
  return result;
}

// A value that all types hold exactly.
float value_of(uint32_t& state) {
  state = state * 1664525u + 1013904223u;
  return static_cast<float>(static_cast<int32_t>(state >> 25) - 64) / 32.0f;
}

// The bits of a value of `value_of`, or of NaN, in a type.
template <typename T>
T encode(float value, carve::Float type) {
  if constexpr (sizeof(T) == sizeof(float)) {
    return value;
  } else {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof(bits));
    if (type == carve::Float::kBfloat16) return static_cast<T>(bits >> 16);
    if (std::isnan(value)) return 0x7e00;
    if (value == 0.0f) return 0;
    const uint32_t exponent = (bits >> 23 & 255) - 112;
    return static_cast<T>((bits >> 16 & 0x8000) | exponent << 10 | (bits >> 13 & 1023));
  }
}

template <typename T>
int check(const Level& level, carve::Float type, int64_t rows, int64_t keys, int64_t size) {
  const carve::ScoreKernels& kernels = level.kernels.score[static_cast<int>(type)];
  const int64_t key_stride = size + 3;
  const int64_t stride = (keys + carve::kKeyTile - 1) / carve::kKeyTile * carve::kKeyTile + 16;
  uint32_t state = static_cast<uint32_t>(rows * 31 + keys * 7 + size);
  std::vector<float> query(static_cast<size_t>(rows * size));
  for (float& value : query) value = value_of(state);
  std::vector<float> values(static_cast<size_t>(keys * key_stride), NAN);
  // The last key ends where the guard page begins.
  const int64_t count = (keys - 1) * key_stride + size;
  Guarded<T> key(count);
  for (int64_t index = 0; index < count; ++index) {
    if (index % key_stride < size) values[static_cast<size_t>(index)] = value_of(state);
    key[index] = encode<T>(values[static_cast<size_t>(index)], type);
  }
  std::vector<float> packed(static_cast<size_t>(kernels.packed_floats(rows, size)) + 16, NAN);
  std::vector<float> panel(static_cast<size_t>(kernels.panel_floats(size)) + 16, NAN);
  const auto aligned = [](std::vector<float>& from) {
    return reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(from.data()) + 63) / 64 * 64);
  };
  std::vector<float> scores(static_cast<size_t>(rows * stride), NAN);
  kernels.pack(query.data(), rows, size, aligned(packed));
  kernels.scores({key.get(), key_stride, keys, size, aligned(packed), rows, scores.data(), stride, aligned(panel)});
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t index = 0; index < keys; ++index) {
      double expected = 0.0;
      double sizes = 0.0;
      for (int64_t element = 0; element < size; ++element) {
        const double product = static_cast<double>(query[static_cast<size_t>(row * size + element)]) *
                               values[static_cast<size_t>(index * key_stride + element)];
        expected += product;
        sizes += std::abs(product);
      }
      const double found = scores[static_cast<size_t>(row * stride + index)];
      if (std::abs(found - expected) <= 1e-6 * sizes) continue;
      std::printf("%s, type %d, %lld rows, %lld keys, size %lld: score %lld, %lld: expected %g, got %g\n", level.name,
                  static_cast<int>(type), static_cast<long long>(rows), static_cast<long long>(keys),
                  static_cast<long long>(size), static_cast<long long>(row), static_cast<long long>(index), expected,
                  found);
      return 1;
    }
  }
  return 0;
}

}  // namespace

int main() {
  int failures = 0;
  for (const Level& level : levels()) {
    for (int64_t size : {1, 7, 8, 16, 24, 31, 33, 40, 64, 72, 80, 128}) {
      for (int64_t rows : {1, 2, 3, 4, 5, 7, 8, 9, 13}) {
        for (int64_t keys : {1, 5, 16, 37}) {
          failures += check<float>(level, carve::Float::kFloat32, rows, keys, size);
          failures += check<uint16_t>(level, carve::Float::kFloat16, rows, keys, size);
          failures += check<uint16_t>(level, carve::Float::kBfloat16, rows, keys, size);
        }
      }
    }
  }
  std::printf("%d failures\n", failures);
  return failures == 0 ? 0 : 1;
}
