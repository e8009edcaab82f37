#include "cpu/capture/kernels.h"

namespace carve {

const CaptureKernels& active_kernels() {
  [[maybe_unused]] const Isa isa = active_isa();
#ifdef CARVE_X86
  if (isa == Isa::kAmx) return capture_kernels_amx();
  if (isa == Isa::kAvx512Bf16) return capture_kernels_avx512_bf16();
  if (isa == Isa::kAvx512) return capture_kernels_avx512();
  if (isa == Isa::kAvx2) return capture_kernels_avx2();
#endif
  return capture_kernels_plain();
}

}  // namespace carve
