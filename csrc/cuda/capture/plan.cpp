#include "cuda/capture/plan.h"

#include <algorithm>

// The tests run with less on small sizes what takes large ones.
#ifndef CARVE_MOST_SCORES
#define CARVE_MOST_SCORES (64 << 20)
#endif

namespace carve {
namespace {

constexpr int64_t kMostScores = CARVE_MOST_SCORES;   // bytes of scores at a time
constexpr int64_t kCachedScores = kMostScores / 6;   // of a layer, up to which storing them was faster on an H100
constexpr int64_t kManyQueries = 32;                 // from which a second read costs fewer bytes than stored scores
constexpr int64_t kMultiprocessors = 132;  // of an H100; the result depends on the splits, so not on the device
constexpr int64_t kMostSplitKeys = 2048;
constexpr int64_t kMostRows = 4096;        // at a time; see split_query
constexpr int64_t kMostGroup = 1 << 22;    // queries of a key head at a time; see split_query
constexpr int64_t kScoreBytes = 4;
constexpr int64_t kStatBytes = 8;
constexpr int64_t kPartBytes = 16;

int64_t ceil_div(int64_t value, int64_t by) { return (value + by - 1) / by; }

// Keys that a block of the first kernel takes at a time; see Shape.
int64_t block_keys(const CaptureParams& p, bool is_plain) { return is_plain ? 32 : p.size <= 128 ? 128 : 64; }

// Queries of a key head in one block, which its shared memory of 99 KB has to hold; see stream_bytes.
int64_t most_queries(const CaptureParams& p, bool is_plain) {
  return is_plain || is_general(p) ? 64 : p.size <= 128 ? 256 : 128;
}

int64_t most_rows(const CaptureParams& p) {
  return std::min({p.rows, kMostRows, std::max<int64_t>(1, kMostGroup / (p.heads / p.key_heads) - 1)});
}

// The splits of the keys, for as many blocks as run at the same time: two on a multiprocessor where each has work for
// long enough, three where not, since the start of a block, which reads its queries, costs as much as 100 to 300 keys.
// Splits are of up to 2048 keys, so that the last blocks do not end alone.
void plan_splits(const CaptureParams& p, CapturePlan& plan) {
  const int64_t queries = p.heads / p.key_heads * plan.rows, unit = block_keys(p, plan.is_plain);
  plan.query_blocks = ceil_div(queries, most_queries(p, plan.is_plain));
  plan.queries_at_once = ceil_div(queries, plan.query_blocks);
  if (plan.query_blocks > 1) plan.queries_at_once = ceil_div(plan.queries_at_once, 32) * 32;
  plan.query_blocks = ceil_div(queries, plan.queries_at_once);
  const int64_t problems = plan.layers * p.batch * p.key_heads * plan.query_blocks;
  const auto split_over = [&](int64_t blocks) { return ceil_div(p.keys, std::max<int64_t>(1, blocks / problems)); };
  int64_t keys = split_over(2 * kMultiprocessors);
  if (queries <= 8 && keys < 1024) keys = split_over(3 * kMultiprocessors);
  plan.split_keys = ceil_div(std::min(std::max(keys, unit), kMostSplitKeys), unit) * unit;
  plan.splits = ceil_div(p.keys, plan.split_keys);
}

// Where the scratch lies. Never less for fewer layers or keys: a session allocates once for its longest step.
void plan_scratch(const CaptureParams& p, int64_t layers, int64_t row_bytes, CapturePlan& plan) {
  const int64_t lines = layers * p.batch * p.rows;
  const int64_t at_once = 3 * kMultiprocessors / (p.batch * p.key_heads * plan.query_blocks);
  const int64_t shortest = layers * ceil_div(p.keys, block_keys(p, plan.is_plain));
  const int64_t splits =
      std::max(std::min(shortest, std::max(at_once, layers)), layers * ceil_div(p.keys, kMostSplitKeys));
  const int64_t stats = p.lse == nullptr ? p.batch * p.rows * p.heads * splits : 0;
  plan.stats = 16;
  plan.parts = plan.stats + ceil_div(stats * kStatBytes, 16) * 16;
  plan.scores = plan.parts + lines * std::max<int64_t>(1, ceil_div(p.token_count, 64)) * kPartBytes;
  plan.bytes = plan.scores;
  if (!plan.is_reread) plan.bytes += std::min(row_bytes * p.rows * layers, std::max(row_bytes, kMostScores));
  plan.tickets = lines;
}

}  // namespace

CapturePlan plan_capture(const CaptureParams& p, bool is_aligned, int64_t scratch_bytes) {
  CapturePlan plan{};
  if (p.batch == 0 || p.rows == 0 || p.heads == 0) return plan;
  plan.is_plain = !is_aligned || p.type == Float::kFloat32;
  plan.padded = ceil_div(p.keys, 32) * 32;
  const int64_t layers = std::min<int64_t>({p.layer_count, kLayersAtOnce, std::max<int64_t>(1, kMostBlocks / p.batch)});
  const int64_t row_bytes = p.batch * p.heads * plan.padded * kScoreBytes;
  // The second read takes 16 rows at a time.
  const bool is_many = !plan.is_plain && p.heads / p.key_heads * std::min<int64_t>(p.rows, 16) >= kManyQueries;
  const bool is_empty = p.keys == 0 || p.token_count == 0;
  plan.is_reread = !plan.is_plain && !is_empty &&
                   (p.lse != nullptr || row_bytes > kMostScores || (is_many && row_bytes * p.rows > kCachedScores));
  plan.layers = layers;
  plan.rows = most_rows(p);
  if (!plan.is_reread) {
    const int64_t most = std::max<int64_t>(1, kMostScores / std::max<int64_t>(1, row_bytes));
    plan.rows = std::min(plan.rows, most);
    plan.layers = std::min(layers, std::max<int64_t>(1, most / plan.rows));
  }
  plan_splits(p, plan);
  plan_scratch(p, layers, row_bytes, plan);
  if (is_many && !plan.is_reread && plan.bytes > scratch_bytes) {
    // Allocated for more keys, where none would be stored.
    plan.is_reread = true;
    plan.layers = layers;
    plan.rows = most_rows(p);
    plan_splits(p, plan);
    plan_scratch(p, layers, row_bytes, plan);
  }
  plan.token_chunks = 1;
  int64_t tokens = kThreadsOfBlock;
  if (plan.is_reread) {
    tokens = block_keys(p, false);
  } else {
    // Up to five blocks a multiprocessor, all at the same time: each merges the splits.
    const int64_t groups = std::max<int64_t>(1, ceil_div(p.token_count, kThreadsOfBlock));
    const int64_t lines = plan.layers * p.batch * plan.rows;
    // Its shared memory holds the parts of a block's warps and those of a row's blocks.
    const int64_t chunks = std::max(ceil_div(groups, kMostTokenParts), ceil_div(groups * lines, 5 * kMultiprocessors));
    plan.token_chunks = std::min({groups, chunks, kMostTokenParts / 4});
    tokens *= plan.token_chunks;
  }
  plan.token_blocks = std::max<int64_t>(1, ceil_div(p.token_count, tokens));
  return plan;
}

}  // namespace carve
