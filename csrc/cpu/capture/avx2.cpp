#include "cpu/capture/kernels.h"

#ifdef CARVE_X86
#include <cmath>
#include <cstddef>

#include <immintrin.h>

// From here to the end of the file. No function of the standard library may be compiled with it: the linker keeps one
// copy of an inline function for the whole library, and older processors would meet instructions that they lack.
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif

namespace carve {
namespace {

#include "cpu/simd/vector_avx2-inl.h"

#include "cpu/capture/kernels-inl.h"

}  // namespace

const CaptureKernels& capture_kernels_avx2() { return kKernels; }

}  // namespace carve

#ifdef __clang__
#pragma clang attribute pop
#endif
#endif
