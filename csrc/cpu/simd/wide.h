// Compiles plain code once for each instruction set of isa.h.
#pragma once

#include "cpu/simd/inline.h"
#include "cpu/simd/isa.h"

// Without fma: contracting a product and a sum on some machines only would change the bits.
#define CARVE_TARGET_AVX2 __attribute__((target("avx2")))
#define CARVE_TARGET_AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512")))

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

// Calls `body`, a CARVE_INLINE_LAMBDA. What it calls has to be CARVE_INLINE: only inlined code is compiled for the
// instruction set of the caller.
template <class Body>
void run_wide([[maybe_unused]] Isa isa, const Body& body) {
#ifdef CARVE_X86
  if (isa >= Isa::kAvx512) return run_avx512(body);
  if (isa == Isa::kAvx2) return run_avx2(body);
#endif
  body();
}

}  // namespace carve
