#include "cpu/capture/kernels.h"

#ifdef CARVE_X86
#include <cmath>
#include <cstddef>

#include <immintrin.h>

CARVE_BEGIN_TARGET("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")

namespace carve {
namespace {

#include "cpu/simd/vector_avx512-inl.h"

#include "cpu/capture/kernels-inl.h"

#include "cpu/capture/dots-inl.h"

constexpr CaptureKernels kWithDots = {
    {score_kernels<float>(), score_kernels<Float16>(), dot_kernels<FloatProduct<Bfloat16>>()},
    softmax_row,
    relate_tops,
    gather_row,
    mean_row,
    kGradients,
    add_columns,
};

}  // namespace

const CaptureKernels& capture_kernels_avx512() { return kWithDots; }

}  // namespace carve

CARVE_END_TARGET
#endif
