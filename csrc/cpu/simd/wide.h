// How a piece of plain code is compiled for each instruction set of isa.h.
#pragma once

#include "cpu/simd/isa.h"

// Neither has fma: the compiler must not contract a product and a sum on one machine and not on the other.
#define CARVE_TARGET_AVX2 __attribute__((target("avx2")))
#define CARVE_TARGET_AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512")))
#define CARVE_INLINE __attribute__((always_inline))

namespace carve {

#ifdef CARVE_X86
template <class Body>
CARVE_TARGET_AVX2 void run_avx2(const Body& body) {
  body();
}

template <class Body>
CARVE_TARGET_AVX512 void run_avx512(const Body& body) {
  body();
}
#endif

// Calls `body`, which has to be CARVE_INLINE, as has all that should be wide inside: inlining is what compiles it anew.
template <class Body>
void run_wide([[maybe_unused]] Isa isa, const Body& body) {
#ifdef CARVE_X86
  if (isa >= Isa::kAvx512) return run_avx512(body);
  if (isa == Isa::kAvx2) return run_avx2(body);
#endif
  body();
}

}  // namespace carve
