#include "cuda/attention/attend.cuh"

namespace carve {

void launch_attend_bfloat(const AttentionLaunch& launch) { launch_attend_type<__nv_bfloat16>(launch); }

}  // namespace carve
