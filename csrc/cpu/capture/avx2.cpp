#include "cpu/capture/kernels.h"

#ifdef CARVE_X86
#include <cmath>
#include <cstddef>

#include <immintrin.h>

CARVE_BEGIN_TARGET("avx2,fma,f16c")

namespace carve {
namespace {

#include "cpu/simd/vector_avx2-inl.h"

#include "cpu/capture/kernels-inl.h"

#include "cpu/capture/dots-inl.h"

constexpr CaptureKernels kWithDots = {
    {dot_kernels<FloatProduct<float>>(),
     dot_kernels<FloatProduct<Float16>>(),
     dot_kernels<FloatProduct<Bfloat16>>()},
    softmax_row,
    relate_tops,
    gather_row,
    mean_row,
    kGradients,
    add_columns,
};

}  // namespace

const CaptureKernels& capture_kernels_avx2() { return kWithDots; }

}  // namespace carve

CARVE_END_TARGET
#endif
