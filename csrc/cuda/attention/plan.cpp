#include "cuda/attention/plan.h"

#include <algorithm>

namespace carve {
namespace {

constexpr int64_t kMostQueries = 8;  // of a key head in a block: the columns of its products with values
// Two blocks on each multiprocessor of an H100; the result depends on the splits, so not on the device.
constexpr int64_t kBlocks = 2 * 132;
constexpr int64_t kMostSplitKeys = 2048;

int64_t ceil_div(int64_t value, int64_t by) { return (value + by - 1) / by; }

// Bytes of a part of the scratch, of which each starts at a multiple of 16.
int64_t whole(int64_t bytes) { return ceil_div(bytes, 16) * 16; }

}  // namespace

AttentionPlan plan_attention(const CaptureParams& p, int64_t value_size) {
  AttentionPlan plan{};
  if (p.batch == 0 || p.heads == 0) return plan;
  plan.layers = 1;
  plan.rows = 1;
  plan.padded = ceil_div(p.keys, 32) * 32;
  const int64_t group = p.heads / p.key_heads;
  plan.query_blocks = ceil_div(group, kMostQueries);
  plan.queries_at_once = ceil_div(group, plan.query_blocks);
  plan.query_blocks = ceil_div(group, plan.queries_at_once);
  // Keys that a block takes at a time; see Shape.
  const int64_t unit = std::max(p.size, value_size) <= 128 ? 128 : 64;
  const int64_t at_once = std::max<int64_t>(1, kBlocks / (p.batch * p.key_heads * plan.query_blocks));
  plan.split_keys = ceil_div(std::min(std::max(ceil_div(p.keys, at_once), unit), kMostSplitKeys), unit) * unit;
  plan.splits = std::max<int64_t>(1, ceil_div(p.keys, plan.split_keys));
  const int64_t most = std::max({int64_t{1}, std::min(ceil_div(p.keys, unit), at_once), ceil_div(p.keys, kMostSplitKeys)});
  const int64_t lines = p.batch * p.heads;

  // Up to five blocks a multiprocessor, all at the same time: each merges the splits.
  const int64_t groups = std::max<int64_t>(1, ceil_div(p.token_count, kThreadsOfBlock));
  const int64_t chunks = std::max(ceil_div(groups, kMostTokenParts), ceil_div(groups * p.batch, 5 * 132));
  plan.token_chunks = std::min({groups, chunks, kMostTokenParts / 4});
  plan.token_blocks = ceil_div(groups, plan.token_chunks);

  plan.stats = 16;
  plan.parts = plan.stats + whole(lines * most * 8);
  plan.outputs = plan.parts + p.batch * groups * 16;
  plan.scores = plan.outputs + whole(lines * most * value_size * 4);
  plan.bytes = plan.scores + lines * plan.padded * 4;
  plan.tickets = p.batch;
  return plan;
}

}  // namespace carve
