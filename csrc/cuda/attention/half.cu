#include "cuda/attention/attend.cuh"

namespace carve {

void launch_attend_half(const AttentionLaunch& launch) { launch_attend_type<__half>(launch); }

}  // namespace carve
