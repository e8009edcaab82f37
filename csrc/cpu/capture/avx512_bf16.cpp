#include "cpu/capture/kernels.h"

#ifdef CARVE_X86
#include <cmath>
#include <cstddef>

#include <immintrin.h>

CARVE_BEGIN_TARGET("avx512bf16,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")

namespace carve {
namespace {

#include "cpu/simd/vector_avx512-inl.h"

#include "cpu/capture/kernels-inl.h"

#include "cpu/capture/dots-inl.h"

// One instruction multiplies the 32 elements of a vector, adds neighbours up and accumulates in float32.
struct PairProduct {
  using Element = Bfloat16;
  using Operand = __m512i;
  static constexpr int64_t kParts = 1;
  static constexpr int64_t kStep = 2 * kLanes;

  // Not timed yet. At one instruction in three cycles, the slowest rate that a compiler assumes, 16 rows take as long
  // as with a panel. A key of one step has fewer products than its trees have shuffles.
  static bool serves(int64_t rows, int64_t size) { return rows <= (size > kStep ? 16 : 2); }

  template <int64_t kPart>
  static CARVE_INLINE __m512i load_key(const Bfloat16* from) {
    return load_pairs(from);
  }

  template <int64_t kPart>
  static CARVE_INLINE __m512i load_some_key(const Bfloat16* from, int64_t count) {
    return load_some_pairs(from, count);
  }

  static int64_t element(int64_t /*part*/, int64_t lane) { return lane; }

  static CARVE_INLINE __m512i load_query(const float* from) { return _mm512_loadu_si512(from); }

  // The query was bfloat16: the low half of its floats is zero.
  static void store_query(float value, int64_t lane, float* to) {
    uint32_t bits;
    __builtin_memcpy(&bits, &value, sizeof(bits));
    const uint16_t high = static_cast<uint16_t>(bits >> 16);
    __builtin_memcpy(reinterpret_cast<char*>(to) + lane * static_cast<int64_t>(sizeof(high)), &high, sizeof(high));
  }

  static CARVE_INLINE Vector add(__m512i query, __m512i key, Vector sum) {
    return _mm512_dpbf16_ps(sum, (__m512bh)query, (__m512bh)key);
  }
};

constexpr CaptureKernels kWithPairs = {
    {score_kernels<float>(), score_kernels<Float16>(), dot_kernels<PairProduct>()},
    softmax_row,
    relate_tops,
    gather_row,
    mean_row,
    kGradients,
    add_columns,
};

}  // namespace

const CaptureKernels& capture_kernels_avx512_bf16() { return kWithPairs; }

}  // namespace carve

CARVE_END_TARGET
#endif
