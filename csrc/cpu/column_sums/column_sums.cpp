// Column sums: the attention that each key gets from all rows, without a matrix of rows x keys.
//
// Rows are scored in blocks against chunks of keys, first for the log-sum-exp of each row, unless it is given, then for
// the sums. A thread has some rows, then some chunks, so every sum has a fixed order: rows of a block, then blocks.

#include <algorithm>
#include <cmath>
#include <vector>

#include "cpu/arena.h"
#include "cpu/capture/inputs.h"
#include "cpu/capture/kernels.h"
#include "cpu/parallel.h"

namespace carve {
namespace {

// Rows times heads of a block: its scores of a chunk take 198 KiB of a L2, and it shares each transposed panel of keys,
// which costs as much as seven rows.
constexpr int64_t kLines = 96;
// The scores of a row are at a distance that is no power of two, which would map them to one set of the L1.
constexpr int64_t kStride = kChunk + 16;
// With fewer products another thread costs more than it saves.
constexpr int64_t kSerialProducts = int64_t{1} << 19;
constexpr double kLog2E = 1.44269504088896341;

thread_local Arena packed_arena;
thread_local Arena staging_arena;
thread_local Arena scores_arena;
thread_local Arena sums_arena;
thread_local std::vector<double> totals_buffer;

int64_t divide_up(int64_t value, int64_t unit) { return (value + unit - 1) / unit; }

// Rows [first_row, first_row + rows) of one key head.
struct Block {
  int64_t batch;
  int64_t key_head;
  int64_t first_row;
  int64_t rows;
};

class ColumnSums {
 public:
  explicit ColumnSums(const ColumnSumsParams& params)
      : p_(params.capture),
        sums_(params.sums),
        kernels_(active_kernels()),
        score_(kernels_.score[static_cast<int>(p_.type)]),
        group_(p_.heads / p_.key_heads),
        rows_(std::max<int64_t>(kLines / group_, 1)),
        blocks_(divide_up(p_.rows, rows_)),
        chunks_(divide_up(p_.keys, kChunk)),
        factor_(p_.softcap == 0.0f && p_.scale > 0.0f ? p_.scale * kLog2E : kLog2E) {}

  void run() {
    const int64_t units = p_.batch * p_.key_heads;
    const int64_t products = p_.rows * p_.keys * p_.heads * p_.batch * p_.size;
    const int64_t threads = products < kSerialProducts ? 1 : std::max<int64_t>(p_.threads, 1);
    if (p_.lse == nullptr) {
      normalisers_.resize(static_cast<size_t>(p_.batch * p_.heads * p_.rows));
      run_range(units * blocks_, threads, [&](int64_t index) { normalise(block_at(index / blocks_, index % blocks_)); });
    }
    // Every stripe has chunks of all parts of the sequence, since causal rows see more of the first ones.
    const int64_t stripes = std::clamp<int64_t>(divide_up(2 * threads, units), 1, threads == 1 ? 1 : chunks_);
    run_range(units * stripes, threads, [&](int64_t index) { add_up(index / stripes, index % stripes, stripes); });
  }

 private:
  template <typename F>
  static void run_range(int64_t count, int64_t threads, const F& body) {
    const auto range = [&](int64_t begin, int64_t end) {
      for (int64_t index = begin; index < end; ++index) body(index);
    };
    threads == 1 ? range(0, count) : parallel_for(count, 1, range);
  }

  Block block_at(int64_t unit, int64_t block) const {
    const int64_t first = block * rows_;
    return {unit / p_.key_heads, unit % p_.key_heads, first, std::min(rows_, p_.rows - first)};
  }

  // The keys of a chunk that any row of a block sees, from a whole tile of keys on.
  Span find_visible_to_any(const Block& block, int64_t start, int64_t keys) const {
    Span any{keys, 0};
    for (int64_t row = block.first_row; row < block.first_row + block.rows; ++row) {
      const Span span = find_visible(p_, block.batch, row, start, keys);
      if (span.first >= span.last) continue;
      any = {std::min(any.first, span.first), std::max(any.last, span.last)};
    }
    return {any.first / kKeyTile * kKeyTile, any.last};
  }

  float* pack(const Block& block) const {
    const int64_t lines = rows_ * group_;
    float* const staging = staging_arena.floats(std::max(score_.panel_floats(p_.size), lines * p_.size));
    float* const packed = packed_arena.floats(score_.packed_floats(lines, p_.size));
    widen_rows(p_, *p_.layers, block.batch, block.key_head, block.first_row, block.rows, staging);
    score_.pack(staging, block.rows * group_, p_.size, packed);
    return packed;
  }

  // Calls body(line, head, row, scores, span, mask) for the lines of a block that see some keys of a chunk: `span` and
  // `mask` count from the chunk's start, and so do the scores, of which those before the block's span are not written.
  template <typename F>
  void for_each_line(const Block& block, int64_t chunk, const float* packed, const F& body) const {
    const int64_t start = chunk * kChunk;
    const int64_t keys = std::min(kChunk, p_.keys - start);
    const Span any = find_visible_to_any(block, start, keys);
    if (any.first >= any.last) return;
    float* const scores = scores_arena.floats(rows_ * group_ * kStride);
    const int64_t* strides = p_.layers->key_strides;
    const int64_t offset = block.batch * strides[0] + block.key_head * strides[1] + (start + any.first) * strides[2];
    const char* key = static_cast<const char*>(p_.layers->key) + offset * (p_.type == Float::kFloat32 ? 4 : 2);
    const int64_t lines = block.rows * group_;
    score_.scores({key, strides[2], any.last - any.first, p_.size, packed, lines, scores + any.first, kStride,
                   staging_arena.floats(score_.panel_floats(p_.size))});
    uint8_t masked[kChunk];
    for (int64_t line = 0; line < lines; ++line) {
      const int64_t row = block.first_row + line / group_;
      const int64_t head = block.key_head * group_ + line % group_;
      const Span span = find_visible(p_, block.batch, row, start, keys);
      if (span.first >= span.last) continue;
      const uint8_t* mask = mask_of(p_, block.batch, head, row, start, keys, masked);
      body(line, head, row, scores + line * kStride, span, mask);
    }
  }

  // The log-sum-exp of the rows of a block, in base 2.
  void normalise(const Block& block) {
    const float* const packed = pack(block);
    const int64_t lines = block.rows * group_;
    std::vector<double> tops(static_cast<size_t>(lines), -INFINITY);
    std::vector<double> totals(static_cast<size_t>(lines), 0.0);
    const auto add = [&](int64_t line, double top, double sum) {
      double& highest = tops[static_cast<size_t>(line)];
      double& total = totals[static_cast<size_t>(line)];
      if (top == -INFINITY) return;
      // A NaN is never higher, and stays in the total.
      const double higher = top > highest ? top : highest;
      total = total * std::exp2(highest - higher) + sum * std::exp2(top - higher);
      highest = higher;
    };
    for (int64_t line = 0; line < lines && p_.layers->sink != nullptr; ++line) {
      add(line, p_.layers->sink[block.key_head * group_ + line % group_] * kLog2E, 1.0);
    }
    for (int64_t chunk = 0; chunk < chunks_; ++chunk) {
      for_each_line(block, chunk, packed,
                    [&](int64_t line, int64_t, int64_t, float* scores, const Span& span, const uint8_t* mask) {
                      // From the first visible key on, so that no score is read that was not written.
                      const int64_t first = span.first;
                      const Peak peak = kernels_.softmax({scores + first, span.last - first, 0, span.last - first,
                                                          mask == nullptr ? nullptr : mask + first, p_.scale,
                                                          p_.softcap, reinterpret_cast<const char*>(scores), nullptr});
                      add(line, peak.top, peak.sum);
                    });
    }
    for (int64_t line = 0; line < lines; ++line) {
      const int64_t row = block.first_row + line / group_;
      const int64_t head = block.key_head * group_ + line % group_;
      const auto at = static_cast<size_t>(line);
      normalisers_[static_cast<size_t>((block.batch * p_.heads + head) * p_.rows + row)] =
          tops[at] + std::log2(totals[at]);
    }
  }

  // The log-sum-exp of a row in base 2; infinite where its probabilities are 0.
  double normaliser(int64_t batch, int64_t head, int64_t row) const {
    const auto at = static_cast<size_t>((batch * p_.heads + head) * p_.rows + row);
    return p_.lse == nullptr ? normalisers_[at] : p_.lse[at] * kLog2E;
  }

  // The sums of every `stripes`-th chunk of a key head.
  void add_up(int64_t unit, int64_t stripe, int64_t stripes) const {
    std::vector<double>& totals = totals_buffer;
    totals.assign(static_cast<size_t>(group_ * divide_up(chunks_ - stripe, stripes) * kChunk), 0.0);
    float* const sums = sums_arena.floats(group_ * kStride);
    for (int64_t index = 0; index < blocks_; ++index) {
      const Block block = block_at(unit, index);
      const float* packed = nullptr;
      for (int64_t chunk = stripe; chunk < chunks_; chunk += stripes) {
        const int64_t start = chunk * kChunk;
        const Span any = find_visible_to_any(block, start, std::min(kChunk, p_.keys - start));
        if (any.first >= any.last) continue;
        if (packed == nullptr) packed = pack(block);
        std::fill(sums, sums + group_ * kStride, 0.0f);
        for_each_line(block, chunk, packed,
                      [&](int64_t line, int64_t head, int64_t row, float* scores, const Span& span, const uint8_t* mask) {
                        const double whole = normaliser(block.batch, head, row);
                        if (std::isinf(whole)) return;
                        const auto peak = static_cast<float>(whole / factor_);
                        const auto rest = static_cast<float>(peak * factor_ - whole);
                        kernels_.add_columns({scores, span.first, span.last, mask, p_.scale, p_.softcap, peak, rest,
                                              sums + line % group_ * kStride});
                      });
        double* total = totals.data() + chunk / stripes * group_ * kChunk;
        for (int64_t head = 0; head < group_; ++head, total += kChunk) {
          const float* from = sums + head * kStride;
          for (int64_t key = any.first; key < any.last; ++key) total[key] += from[key];
        }
      }
    }
    const double* total = totals.data();
    for (int64_t chunk = stripe; chunk < chunks_; chunk += stripes) {
      const int64_t start = chunk * kChunk;
      const int64_t keys = std::min(kChunk, p_.keys - start);
      for (int64_t head = 0; head < group_; ++head, total += kChunk) {
        float* to = sums_ + (unit * group_ + head) * p_.keys + start;
        for (int64_t key = 0; key < keys; ++key) to[key] = static_cast<float>(total[key]);
      }
    }
  }

  const CaptureParams& p_;
  float* const sums_;
  const CaptureKernels& kernels_;
  const ScoreKernels& score_;
  const int64_t group_;   // query heads of one key head
  const int64_t rows_;    // rows of a block
  const int64_t blocks_;  // of a key head
  const int64_t chunks_;
  const double factor_;  // turns scores, or logits where they are no multiple of scores, into logits in base 2
  std::vector<double> normalisers_;  // [batch, heads, rows]
};

}  // namespace

void column_sums_cpu(const ColumnSumsParams& params) {
  if (params.capture.batch == 0 || params.capture.keys == 0) return;
  ColumnSums(params).run();
}

}  // namespace carve
