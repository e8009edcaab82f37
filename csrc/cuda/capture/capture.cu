// Capture on a GPU, from the checks to the launches.

#include "cuda/capture/capture.cuh"

#include <algorithm>
#include <string>

#include "cuda/launch.cuh"

namespace carve {
namespace {

constexpr int64_t kMostBlocks = 0x7fffffff;

// Offsets of the scratch buffers in bytes: statistics at 0, means; and the total size.
struct Scratch {
  int64_t mean;
  int64_t end;
};

int64_t count_splits(int64_t split_keys, int64_t keys) { return (keys + split_keys - 1) / split_keys; }

Scratch lay_out_scratch(const CaptureParams& p, int64_t layers, int64_t splits) {
  Scratch scratch{};
  const int64_t stats = p.lse == nullptr ? layers * p.batch * p.heads * p.rows * splits : 0;
  scratch.mean = stats * static_cast<int64_t>(sizeof(float2));
  const int64_t means = p.each ? layers * p.batch * p.rows * p.token_count : 0;
  scratch.end = scratch.mean + means * static_cast<int64_t>(sizeof(float));
  return scratch;
}

void check(bool holds, const std::string& message) {
  if (!holds) throw std::runtime_error("capture_cuda: " + message);
}

// Whether every key of every layer starts at a multiple of 16 bytes and has whole vectors of 16 bytes.
bool is_aligned(const CaptureParams& p) {
  const int64_t elements = p.type == Float::kFloat32 ? 4 : 8;
  bool aligned = p.size % elements == 0;
  for (int64_t index = 0; index < p.layer_count; ++index) {
    const CaptureLayer& layer = p.layers[index];
    aligned = aligned && reinterpret_cast<uintptr_t>(layer.key) % 16 == 0;
    for (int64_t stride : layer.key_strides) aligned = aligned && stride % elements == 0;
  }
  return aligned;
}

void launch_layers(const CaptureLaunch& launch, const CapturePlan& plan) {
  switch (launch.params.type) {
    case Float::kFloat32: return launch_capture_float(launch, plan);
    case Float::kFloat16: return launch_capture_half(launch, plan);
    case Float::kBfloat16: return launch_capture_bfloat(launch, plan);
  }
}

int64_t split_size(int64_t keys) {
  return kSplitKeys * std::max<int64_t>(1, count_splits(kSplitKeys * kMaxSplits, keys));
}

}  // namespace

CaptureScratch capture_cuda_scratch(const CaptureParams& p, bool) {
  const int64_t at_once = std::min<int64_t>(p.layer_count, kLayersAtOnce);
  return {lay_out_scratch(p, at_once, count_splits(split_size(p.keys), p.keys)).end, at_once * p.batch};
}

void capture_cuda(const CaptureParams& params, const CaptureDevice& device) {
  const CaptureParams& p = params;
  check(p.rows <= kMaxRows, "query: expected up to 8 rows, got " + std::to_string(p.rows));
  check(p.size <= kMaxSize, "query: expected heads of up to 256 elements, got " + std::to_string(p.size));
  check(p.keys <= kMostBlocks && p.batch * p.heads * kMaxSplits <= kMostBlocks &&
            p.batch * (p.token_count + 1) <= kMostBlocks,
        "query, key, tokens: expected sizes whose blocks number fewer than 2^31");
  if (p.batch == 0 || p.rows == 0 || p.heads == 0) return;

  CaptureLaunch launch{};
  launch.params = p;
  launch.params.layers = nullptr;
  launch.device = device;
  launch.split_keys = split_size(p.keys);
  launch.splits = static_cast<int>(count_splits(launch.split_keys, p.keys));
  launch.aligned = is_aligned(p);
  const int64_t at_once = std::min<int64_t>(p.layer_count, kLayersAtOnce);
  const Scratch scratch = lay_out_scratch(p, at_once, launch.splits);
  check(device.scratch_bytes >= scratch.end, "scratch: expected at least " + std::to_string(scratch.end) +
                                                 " bytes, got " + std::to_string(device.scratch_bytes));
  check(reinterpret_cast<uintptr_t>(device.scratch) % sizeof(float2) == 0, "scratch: expected 8 bytes of alignment");
  check(device.ticket_count >= at_once * p.batch, "tickets: expected at least " + std::to_string(at_once * p.batch) +
                                                      ", got " + std::to_string(device.ticket_count));
  auto* bytes = static_cast<unsigned char*>(device.scratch);
  launch.stats = reinterpret_cast<float2*>(bytes);
  launch.mean = reinterpret_cast<float*>(bytes + scratch.mean);
  launch.tickets = device.tickets;

  const DeviceGuard guard(device.device);
  CapturePlan plan{};
  plan.stats = p.lse == nullptr && p.keys > 0 && p.token_count > 0;
  for (int64_t begin = 0; begin < p.layer_count; begin += kLayersAtOnce) {
    plan.layers = static_cast<int>(std::min<int64_t>(p.layer_count - begin, kLayersAtOnce));
    std::copy_n(p.layers + begin, plan.layers, launch.layers);
    launch_layers(launch, plan);
    check_cuda(cudaMemsetAsync(launch.tickets, 0, sizeof(unsigned) * static_cast<size_t>(plan.layers * p.batch),
                               static_cast<cudaStream_t>(device.stream)),
               "cudaMemsetAsync");
  }
}

}  // namespace carve
