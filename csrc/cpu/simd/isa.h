// Which instructions the kernels use: the best of this machine, unless CARVE_KERNELS_CPU or a test names one.
#pragma once

#include <cstdint>

#if defined(__x86_64__) && defined(__GNUC__)
#define CARVE_X86 1
#endif

namespace carve {

enum class Isa { kPlain, kAvx2, kAvx512, kAmx };

// The best that processor, system and compiler allow. Asks the system for AMX once, and does without on refusal.
Isa best_isa();

// The one in use. Throws std::runtime_error where CARVE_KERNELS_CPU names one that is unknown or not there.
Isa active_isa();

// From now on use this one, or again what the environment says for a negative number. Throws as above.
void force_isa(int64_t number);

}  // namespace carve
