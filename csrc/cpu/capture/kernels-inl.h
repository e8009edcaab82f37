// One set of kernels: included in an anonymous namespace, after the vectors of its instruction set.

#include "cpu/simd/vector_math-inl.h"

#include "cpu/capture/scores-inl.h"

#include "cpu/capture/rows-inl.h"

#include "cpu/capture/gradient-inl.h"

constexpr CaptureKernels kKernels = {
    {score_kernels<float>(), score_kernels<Float16>(), score_kernels<Bfloat16>()},
    softmax_row,
    relate_tops,
    gather_row,
    mean_row,
    kGradients,
    add_columns,
};
