// For a quick build: all types compile the same source, and the CPU kernels without vector instructions are enough.
#pragma once

#include <cstdlib>

#include "cpu/capture/kernels.h"
#include "cuda/capture/capture.cuh"

namespace carve {
#ifdef CARVE_X86
const CaptureKernels& capture_kernels_avx2() { std::abort(); }
const CaptureKernels& capture_kernels_avx512() { std::abort(); }
const CaptureKernels& capture_kernels_avx512_bf16() { std::abort(); }
const CaptureKernels& capture_kernels_amx() { std::abort(); }
#endif
void launch_stream_half(const CaptureLaunch&, const CaptureGrid&) { std::abort(); }
void launch_reread_half(const CaptureLaunch&, const CaptureGrid&) { std::abort(); }
}  // namespace carve
