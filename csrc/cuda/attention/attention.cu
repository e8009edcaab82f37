// Attention and capture on a GPU in one read of keys and values, from the checks to the launches.

#include <algorithm>
#include <string>

#include "cuda/attention/finish.cuh"
#include "cuda/launch.cuh"

namespace carve {
namespace {

void check(bool holds, const char* message) {
  if (!holds) throw std::runtime_error(std::string("attend_layer: ") + message);
}

bool values_are_aligned(const AttentionValue& value) {
  bool aligned = reinterpret_cast<uintptr_t>(value.value) % 16 == 0 && value.value_strides[2] < 1 << 30;
  for (int64_t stride : value.value_strides) aligned = aligned && stride % 8 == 0;
  return aligned;
}

bool output_is_aligned(const AttentionValue& value) {
  return reinterpret_cast<uintptr_t>(value.output) % 4 == 0 && value.output_strides[0] % 2 == 0 &&
         value.output_strides[1] % 2 == 0;
}

}  // namespace

void attend_cuda(const CaptureParams& p, const AttentionValue& value, const CaptureDevice& device) {
  check(p.layer_count == 1 && p.rows == 1, "query: expected one row");
  check(p.type != Float::kFloat32, "query: expected float16 or bfloat16");
  check(p.size > 0 && p.size <= kMaxSize, "query: expected heads of 1 to 256 elements");
  check(value.size > 0 && value.size <= kMaxSize && value.size % 8 == 0,
        "value: expected heads of 8 to 256 elements, a multiple of 8");
  if (p.batch == 0 || p.heads == 0) return;
  check(keys_are_aligned(p), "key: expected rows that start at multiples of 16 bytes and are whole vectors of them");
  check(values_are_aligned(value), "value: expected rows that start at multiples of 16 bytes");
  check(output_is_aligned(value), "output: expected heads that start at multiples of 4 bytes");
  const AttentionPlan plan = plan_attention(p, value.size);
  const int64_t most = 0x7fffffff;
  check(p.batch <= kMostBlocks && p.key_heads * plan.query_blocks <= kMostBlocks && p.keys < most &&
            plan.token_blocks <= kMostTokenParts && p.batch * p.heads <= most,
        "query, key, tokens: expected sizes whose blocks fit into a grid");
  check_memory("attend_layer", plan, device);

  AttentionLaunch launch{part_of(whole_of(p, plan, device), p, 0, 1, 0, 1), value, nullptr};
  launch.outputs = reinterpret_cast<float*>(static_cast<unsigned char*>(device.scratch) + plan.outputs);
  CaptureLaunch& capture = launch.capture;
  const DeviceGuard guard(device.device);
  if (p.keys > 0 && p.token_count > 0) {
    capture.span = device.span;
    if (device.span == nullptr) {
      auto* span = static_cast<int32_t*>(device.scratch);
      launch_span(capture, span);
      capture.span = span;
    }
  }
  p.type == Float::kFloat16 ? launch_attend_half(launch) : launch_attend_bfloat(launch);
  const dim3 blocks(static_cast<unsigned>(p.heads + plan.token_blocks), 1, static_cast<unsigned>(p.batch));
  const size_t bytes = std::max(sizeof(OutputShared), maps_bytes(p.heads));
  carve::launch({"attend_finish", blocks, kThreads, bytes, static_cast<cudaStream_t>(device.stream),
                 overlaps_launches(device.device)},
                p.each ? attend_finish<true> : attend_finish<false>, launch);
}

}  // namespace carve
