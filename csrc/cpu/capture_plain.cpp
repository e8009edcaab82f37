#include "capture_kernels.h"

#include <cmath>
#include <cstddef>

namespace carve {
namespace {

#include "vector_plain.inc"

#include "capture_kernels.inc"

}  // namespace

const CaptureKernels& capture_kernels_plain() { return kKernels; }

}  // namespace carve
