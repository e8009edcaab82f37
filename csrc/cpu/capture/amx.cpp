#include "cpu/capture/kernels.h"

#ifdef CARVE_X86
#include <cmath>
#include <cstddef>

#include <immintrin.h>

CARVE_BEGIN_TARGET("amx-tile,amx-bf16,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")

namespace carve {
namespace {

#include "cpu/simd/vector_avx512-inl.h"

#include "cpu/capture/kernels-inl.h"

#include "cpu/capture/tiles-inl.h"

constexpr CaptureKernels kWithTiles = {
    {score_kernels<float>(),
     score_kernels<Float16>(),
     {tiles_packed_floats, tiles_panel_floats, tiles_pack, tiles_score}},
    softmax_row,
    relate_tops,
    gather_row,
    mean_row,
    kGradients,
    add_columns,
};

}  // namespace

const CaptureKernels& capture_kernels_amx() { return kWithTiles; }

}  // namespace carve

CARVE_END_TARGET
#endif
