// The instruction set of the kernels: the best of this machine, unless CARVE_KERNELS_CPU or a test selects one.
#pragma once

#include <cstdint>

#if defined(__x86_64__) && defined(__GNUC__)
#define CARVE_X86 1
#endif

namespace carve {

enum class Isa { kPlain, kAvx2, kAvx512, kAvx512Bf16, kAmx };

// The best that processor, system and compiler allow. AMX needs a permission of the system, requested once.
Isa best_isa();

// The active one. Throws std::runtime_error if CARVE_KERNELS_CPU names one that is unknown or not available.
Isa active_isa();

// Selects one; a negative number selects by the environment again. Throws as above.
void force_isa(int64_t number);

}  // namespace carve
