#include "cpu/capture/unit.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "cpu/capture/inputs.h"

namespace carve {
namespace {

// The exponentials of a unit stay in the L2 of a core while the keys stream through it.
constexpr int64_t kScratchFloats = int64_t{1} << 18;
// If less than half this many rows fit, this many share one read of the keys and the exponentials spill: a row of a
// group of 7 costs 84 bytes per key to write and read, another read of bfloat16 keys 256.
constexpr int64_t kSpilledRows = 8;
constexpr double kLog2E = 1.44269504088896341;

int64_t round_up(int64_t value, int64_t step) { return (value + step - 1) / step * step; }

}  // namespace

UnitPlan::UnitPlan(const CaptureParams& params, const CaptureKernels& kernels)
    : params(params), kernels(kernels), score(kernels.score[static_cast<int>(params.type)]) {
  group = params.heads / params.key_heads;
  chunks = (params.keys + kChunk - 1) / kChunk;
  // One cache line of padding: rows at a distance of a power of two would all map to one set of the L1.
  stride = round_up(params.keys, kKeyTile) + 16;
  tops_stride = round_up(chunks, 16);
  const int64_t fitting = kScratchFloats / std::max<int64_t>(group * stride, 1);
  const int64_t most = std::max<int64_t>(fitting < kSpilledRows / 2 ? kSpilledRows : fitting, 1);
  row_blocks = (params.rows + most - 1) / most;
  rows = (params.rows + row_blocks - 1) / std::max<int64_t>(row_blocks, 1);
  has_slopes = false;
}

int64_t UnitPlan::packed_floats() const { return round_up(score.packed_floats(rows * group, params.size), 16); }

int64_t UnitPlan::scratch_floats() const {
  const int64_t lines = rows * group;
  return lines * ((has_slopes ? 2 : 1) * stride + 2 * tops_stride) + packed_floats();
}

int64_t UnitPlan::staging_floats() const {
  return round_up(std::max(score.panel_floats(params.size), rows * group * params.size), 16);
}

void pack_unit(const UnitPlan& plan, const Unit& unit, float* scratch, float* staging) {
  const CaptureParams& p = plan.params;
  widen_rows(p, *unit.layer, unit.batch, unit.key_head, unit.first_row, unit.rows, staging);
  plan.score.pack(staging, unit.rows * plan.group, p.size, plan.packed_of(scratch));
}

void score_chunk(const UnitPlan& plan, const Unit& unit, int64_t chunk, float* scratch, float* staging) {
  const CaptureParams& p = plan.params;
  const int64_t start = chunk * kChunk;
  const int64_t keys = std::min(kChunk, p.keys - start);
  bool is_visible = false;
  for (int64_t row = 0; row < unit.rows && !is_visible; ++row) {
    const Span span = find_visible(p, unit.batch, unit.first_row + row, start, keys);
    is_visible = span.first < span.last;
  }
  const int64_t* strides = unit.layer->key_strides;
  const int64_t offset = unit.batch * strides[0] + unit.key_head * strides[1] + start * strides[2];
  const int64_t bytes = p.type == Float::kFloat32 ? 4 : 2;
  const char* key = static_cast<const char*>(unit.layer->key) + offset * bytes;
  if (is_visible) {
    plan.score.scores({key, strides[2], keys, p.size, plan.packed_of(scratch), unit.rows * plan.group,
                       plan.scores_of(scratch, 0) + start, plan.stride, staging});
  }
  // Memory would be idle during the exponentials: prefetch the next chunk, except its first tile, which scoring
  // fetched.
  const bool dense = strides[2] == p.size;
  const int64_t chunk_bytes = kChunk * p.size * bytes;
  const char* next = key + (keys + kKeyTile) * p.size * bytes;
  constexpr int64_t kRowBytes = kChunk * static_cast<int64_t>(sizeof(float));
  uint8_t masked[kChunk];
  for (int64_t line = 0; line < unit.rows * plan.group; ++line) {
    const int64_t row = unit.first_row + line / plan.group;
    const int64_t head = unit.key_head * plan.group + line % plan.group;
    const Span span = find_visible(p, unit.batch, row, start, keys);
    float* scores = plan.scores_of(scratch, line) + start;
    const uint8_t* mask = is_visible ? mask_of(p, unit.batch, head, row, start, keys, masked) : nullptr;
    const char* prefetch = dense ? next + std::min(line * kRowBytes, chunk_bytes) : reinterpret_cast<char*>(scores);
    float* slopes = plan.has_slopes ? plan.slopes_of(scratch, line) + start : nullptr;
    const Peak peak =
        plan.kernels.softmax({scores, keys, span.first, span.last, mask, p.scale, p.softcap, prefetch, slopes});
    plan.tops_of(scratch, line)[chunk] = peak.top;
    plan.sums_of(scratch, line)[chunk] = peak.sum;
  }
}

void relate_chunks(const UnitPlan& plan, const Unit& unit, float* scratch, float* sinks) {
  const CaptureParams& p = plan.params;
  for (int64_t line = 0; line < unit.rows * plan.group; ++line) {
    const int64_t row = unit.first_row + line / plan.group;
    const int64_t head = unit.key_head * plan.group + line % plan.group;
    float* tops = plan.tops_of(scratch, line);
    const float* sums = plan.sums_of(scratch, line);
    float top = *std::max_element(tops, tops + plan.chunks);
    const bool dead = top == -INFINITY;
    // The given log-sum-exp, or the sink: in base 2 like the maxima, but not rounded.
    double other = -INFINITY;
    if (p.lse != nullptr) {
      other = p.lse[(unit.batch * p.heads + head) * p.rows + row] * kLog2E;
      top = static_cast<float>(other);
    } else if (unit.layer->sink != nullptr) {
      other = unit.layer->sink[head] * kLog2E;
      top = std::max(top, static_cast<float>(other));
    }
    if (sinks != nullptr) sinks[line] = 0.0f;
    if (dead || top == -INFINITY) {
      std::fill(tops, tops + plan.chunks, 0.0f);
      continue;
    }
    plan.kernels.relate(tops, plan.chunks, top);
    double total = std::exp2(other - top);
    for (int64_t chunk = 0; chunk < plan.chunks && p.lse == nullptr; ++chunk) {
      total += static_cast<double>(tops[chunk]) * sums[chunk];
    }
    for (int64_t chunk = 0; chunk < plan.chunks; ++chunk) tops[chunk] = static_cast<float>(tops[chunk] / total);
    if (sinks != nullptr && unit.layer->sink != nullptr) {
      sinks[line] = static_cast<float>(std::exp2(unit.layer->sink[head] * kLog2E - top) / total);
    }
  }
}

void clear_padding(const UnitPlan& plan, const Unit& unit) {
  const CaptureParams& p = plan.params;
  const size_t bytes = static_cast<size_t>(p.token_count) * sizeof(float);
  for (int64_t row = unit.first_row; row < unit.first_row + unit.rows; ++row) {
    std::memset(unit.sums + row * p.token_count, 0, bytes);
    for (int64_t head = 0; p.each && head < plan.group; ++head) {
      const int64_t offset = unit.batch * p.maps_strides[0] + (unit.key_head * plan.group + head) * p.maps_strides[1];
      std::memset(unit.layer->maps + offset + row * p.maps_strides[2], 0, bytes);
    }
  }
}

void gather_runs(const UnitPlan& plan, const Unit& unit, const KeyRun* runs, int64_t count, const float* scratch) {
  const CaptureParams& p = plan.params;
  float* const from = const_cast<float*>(scratch);
  for (int64_t row = 0; row < unit.rows; ++row) {
    const int64_t query_row = unit.first_row + row;
    const int64_t offset = unit.batch * p.maps_strides[0] + unit.key_head * plan.group * p.maps_strides[1];
    float* each = p.each ? unit.layer->maps + offset + query_row * p.maps_strides[2] : nullptr;
    plan.kernels.gather({plan.scores_of(from, row * plan.group), plan.tops_of(from, row * plan.group), plan.stride,
                         plan.tops_stride, plan.group, runs, count, unit.sums + query_row * p.token_count, each,
                         p.maps_strides[1]});
  }
}

}  // namespace carve
