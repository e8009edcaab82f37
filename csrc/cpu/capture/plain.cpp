#include "cpu/capture/kernels.h"

#include <cmath>
#include <cstddef>

namespace carve {
namespace {

#include "cpu/simd/vector_plain-inl.h"

#include "cpu/capture/kernels-inl.h"

}  // namespace

const CaptureKernels& capture_kernels_plain() { return kKernels; }

}  // namespace carve
