// Capture on a GPU, from the checks to the launches.

#include "cuda/capture/capture.cuh"
#include "cuda/capture/plan.h"

#include <algorithm>
#include <cmath>
#include <string>

#include "cuda/launch.cuh"

namespace carve {
namespace {

void check(bool holds, const char* message) {
  if (!holds) throw std::runtime_error(std::string("capture_layers: ") + message);
}

bool query_is_aligned(const CaptureLayer& layer, int64_t size) {
  bool aligned = reinterpret_cast<uintptr_t>(layer.query) % 16 == 0 && (size < 2 || layer.query_strides[3] == 1);
  for (int i = 0; i < 3; ++i) aligned = aligned && layer.query_strides[i] % 8 == 0;
  aligned = aligned && layer.query_strides[1] < 1 << 30 && layer.query_strides[2] < 1 << 30;
  return aligned;
}

Logit logit_of(const CaptureParams& p) {
  const bool has_cap = p.softcap != 0.0f;
  // Not exactly 0: a hidden key's score, -inf, times 0 would be NaN.
  const double exact = std::max(1e-30, std::abs(double{has_cap ? p.softcap : p.scale}) * 1.4426950408889634);
  Logit logit{};
  logit.factor = static_cast<float>(exact);
  logit.residual = static_cast<float>((exact - logit.factor) / logit.factor);
  // Not exactly 0, which is no softcap.
  logit.inner = has_cap ? p.scale / std::abs(p.softcap) : 0.0f;
  if (has_cap && logit.inner == 0.0f) logit.inner = 1e-30f;
  logit.is_negative = !has_cap && p.scale < 0.0f;
  return logit;
}

void launch_part(const CaptureLaunch& launch, const CapturePlan& plan, const CaptureGrid& grid) {
  const bool is_half = launch.params.type == Float::kFloat16;
  const bool has_scores = launch.params.keys > 0 && launch.params.token_count > 0;
  if (plan.is_plain) {
    if (has_scores) launch_plain(launch, grid);
  } else if (launch.params.lse == nullptr && has_scores) {
    is_half ? launch_stream_half(launch, grid) : launch_stream_bfloat(launch, grid);
  }
  if (!plan.is_reread) {
    CaptureGrid alone = grid;
    alone.overlaps = grid.overlaps && has_scores;
    return launch_maps(launch, alone);
  }
  is_half ? launch_reread_half(launch, grid) : launch_reread_bfloat(launch, grid);
}

}  // namespace

bool keys_are_aligned(const CaptureParams& p) {
  const int64_t elements = p.type == Float::kFloat32 ? 4 : 8;
  bool aligned = p.size % elements == 0;
  for (int64_t index = 0; index < p.layer_count; ++index) {
    const CaptureLayer& layer = p.layers[index];
    aligned = aligned && reinterpret_cast<uintptr_t>(layer.key) % 16 == 0;
    for (int64_t stride : layer.key_strides) aligned = aligned && stride % elements == 0;
    aligned = aligned && layer.key_strides[2] < 1 << 30;
  }
  return aligned;
}

void check_memory(const char* name, const CapturePlan& plan, const CaptureDevice& device) {
  const auto check_amount = [name](const char* argument, int64_t needed, int64_t given, const char* unit) {
    if (given >= needed) return;
    throw std::runtime_error(std::string(name) + ": " + argument + ": expected at least " + std::to_string(needed) +
                             unit + ", got " + std::to_string(given));
  };
  check_amount("scratch", plan.bytes, device.scratch_bytes, " bytes");
  if (reinterpret_cast<uintptr_t>(device.scratch) % 16 != 0) {
    throw std::runtime_error(std::string(name) + ": scratch: expected 16 bytes of alignment");
  }
  check_amount("tickets", plan.tickets, device.ticket_count, "");
}

CaptureLaunch whole_of(const CaptureParams& p, const CapturePlan& plan, const CaptureDevice& device) {
  CaptureLaunch launch{};
  launch.params = p;
  launch.params.layers = nullptr;
  launch.device = device;
  launch.logit = logit_of(p);
  launch.lse_rows = p.rows;
  auto* bytes = static_cast<unsigned char*>(device.scratch);
  launch.stats = reinterpret_cast<float2*>(bytes + plan.stats);
  launch.parts = reinterpret_cast<float4*>(bytes + plan.parts);
  launch.scores = reinterpret_cast<float*>(bytes + plan.scores);
  launch.padded = static_cast<int>(plan.padded);
  launch.split_keys = static_cast<int>(plan.split_keys);
  launch.splits = static_cast<int>(plan.splits);
  launch.queries_at_once = static_cast<int>(plan.queries_at_once);
  launch.token_chunks = static_cast<int>(plan.token_chunks);
  launch.token_blocks = static_cast<int>(plan.token_blocks);
  return launch;
}

CaptureLaunch part_of(const CaptureLaunch& all, const CaptureParams& p, int64_t first_layer, int64_t layers,
                      int64_t first_row, int64_t rows) {
  CaptureLaunch launch = all;
  CaptureParams& part = launch.params;
  const int64_t element = p.type == Float::kFloat32 ? 4 : 2;
  part.rows = rows;
  if (part.positions.data != nullptr) {
    part.positions.data = static_cast<const char*>(p.positions.data) +
                          first_row * p.positions.strides[1] * (p.positions.is_int64 ? 8 : 4);
  }
  if (part.mask != nullptr) part.mask += first_row * p.mask_strides[2];
  if (part.lse != nullptr) part.lse += first_row;
  launch.query_is_aligned = true;
  for (int64_t index = 0; index < layers; ++index) {
    CaptureLayer& layer = launch.layers[index];
    layer = p.layers[first_layer + index];
    layer.query = static_cast<const char*>(layer.query) + first_row * layer.query_strides[2] * element;
    layer.maps += first_row * p.maps_strides[2];
    layer.mass += first_row * p.mass_strides[1];
    layer.entropy += first_row * p.entropy_strides[1];
    launch.query_is_aligned = launch.query_is_aligned && query_is_aligned(layer, p.size);
  }
  launch.batch = static_cast<int>(p.batch);
  launch.heads = static_cast<int>(p.heads);
  launch.key_heads = static_cast<int>(p.key_heads);
  launch.group = launch.heads / launch.key_heads;
  launch.rows = static_cast<int>(rows);
  // The last rows may be fewer than the plan's.
  launch.query_blocks = (launch.group * launch.rows + launch.queries_at_once - 1) / launch.queries_at_once;
  launch.keys = static_cast<int>(p.keys);
  launch.size = static_cast<int>(p.size);
  launch.rows_inverse = 1.0f / static_cast<float>(rows);
  launch.row_shift = 0;
  while (launch.row_shift < 4 && 1 << launch.row_shift < rows) ++launch.row_shift;
  return launch;
}

void capture_cuda(const CaptureParams& p, const CaptureDevice& device) {
  check(p.size <= kMaxSize, "query: expected heads of up to 256 elements");
  if (p.batch == 0 || p.rows == 0 || p.heads == 0) return;
  const CapturePlan plan = plan_capture(p, keys_are_aligned(p), device.scratch_bytes);
  const int64_t most = 0x7fffffff;
  check(p.batch <= kMostBlocks && p.key_heads * plan.query_blocks <= kMostBlocks && p.keys < most &&
            (plan.is_reread || plan.token_blocks <= kMostTokenParts) && plan.token_blocks <= most && plan.layers * p.batch * p.heads * plan.rows <= most,
        "query, key, tokens: expected sizes whose blocks fit into a grid");
  check_memory("capture_layers", plan, device);
  CaptureLaunch launch = whole_of(p, plan, device);
  const DeviceGuard guard(device.device);
  CaptureGrid grid{};
  grid.overlaps = overlaps_launches(device.device);
  if (!plan.is_reread && p.keys > 0 && p.token_count > 0) {
    launch.span = device.span;
    if (device.span == nullptr) {
      auto* span = static_cast<int32_t*>(device.scratch);
      launch_span(launch, span);
      launch.span = span;
    }
  }
  for (int64_t layer = 0; layer < p.layer_count; layer += plan.layers) {
    for (int64_t row = 0; row < p.rows; row += plan.rows) {
      grid.layers = static_cast<int>(std::min(plan.layers, p.layer_count - layer));
      const int64_t rows = std::min(plan.rows, p.rows - row);
      grid.row_blocks = (rows + 15) / 16;
      launch_part(part_of(launch, p, layer, grid.layers, row, rows), plan, grid);
    }
  }
}

}  // namespace carve
