// Which instructions the kernels use, and how a piece of plain code is compiled for each of them.
#pragma once

#if defined(__x86_64__)
#define CARVE_X86 1
#endif
// Neither has fma: the compiler must not contract a product and a sum on one machine and not on the other.
#define CARVE_TARGET_AVX2 __attribute__((target("avx2")))
#define CARVE_TARGET_AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512")))
#define CARVE_INLINE __attribute__((always_inline))

namespace carve {

// Each includes those before it.
enum class Isa { kPlain, kAvx2, kAvx512, kAmx };

// The best that this machine has, or what the environment variable CARVE_KERNELS_CPU names (plain, avx2, avx512 or
// amx), read at each call. Throws std::runtime_error for another name and for one that the machine does not have.
Isa chosen_isa();

#if CARVE_X86
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
#if CARVE_X86
  if (isa >= Isa::kAvx512) return run_avx512(body);
  if (isa == Isa::kAvx2) return run_avx2(body);
#endif
  body();
}

}  // namespace carve
