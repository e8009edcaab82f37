// Capture: softmax of a few rows over all keys, gathered at the visual tokens. This file distributes the work.
//
// Exponentials are relative to the maximum of their chunk of keys; one factor per chunk turns them into probabilities
// at the end. So any thread may process a chunk, and every sum has a fixed order: lanes, chunks, heads of a group,
// groups.

#include <algorithm>
#include <cstddef>
#include <vector>

#include "cpu/arena.h"
#include "cpu/capture/unit.h"
#include "cpu/parallel.h"

namespace carve {
namespace {

// The sums of all KV heads are held until they are added: at most this many floats, or one layer of one batch row.
constexpr int64_t kWaveFloats = int64_t{1} << 21;
// With fewer elements of keys another thread costs more than it saves: 10 microseconds to wake it, reads at 10 GB/s.
constexpr int64_t kSerialElements = int64_t{1} << 16;

thread_local Arena staging_arena;
thread_local Arena scratch_arena;
thread_local Arena wave_arena;

// The tokens of a batch row that are not padding, as runs[first, last).
struct TokenRuns {
  size_t first;
  size_t last;
  int64_t used;
};

thread_local std::vector<KeyRun> run_buffer;
thread_local std::vector<TokenRuns> token_runs_buffer;

void find_runs(const CaptureParams& p, std::vector<KeyRun>& runs, std::vector<TokenRuns>& rows) {
  runs.clear();
  rows.clear();
  for (int64_t batch = 0; batch < p.batch; ++batch) {
    const size_t first = runs.size();
    int64_t used = 0;
    for (int64_t token = 0; token < p.token_count; ++token) {
      const int64_t key = p.tokens.at(batch, token);
      if (key < 0 || key >= p.keys) continue;
      ++used;
      const bool grows = runs.size() > first && runs.back().token + runs.back().count == token &&
                         runs.back().key + runs.back().count == key && key % kChunk != 0;
      if (grows) {
        ++runs.back().count;
      } else {
        runs.push_back({token, key, 1});
      }
    }
    rows.push_back({first, runs.size(), used});
  }
}

class Captures {
 public:
  explicit Captures(const CaptureParams& params)
      : p_(params), plan_(params, active_kernels()), runs_(run_buffer), token_runs_(token_runs_buffer) {
    find_runs(p_, run_buffer, token_runs_buffer);
  }

  void run() const {
    const int64_t pairs = p_.layer_count * p_.batch;
    const int64_t wave = std::max<int64_t>(kWaveFloats / std::max<int64_t>(pair_floats(), 1), 1);
    for (int64_t first = 0; first < pairs; first += wave) run_wave(first, std::min(wave, pairs - first));
  }

 private:
  // A pair is a layer and a batch row. Its sums are [key_heads, rows, token_count].
  int64_t pair_floats() const { return p_.key_heads * p_.rows * p_.token_count; }

  void run_wave(int64_t first_pair, int64_t pairs) const {
    float* const sums = wave_arena.floats(pairs * pair_floats());
    const int64_t units = pairs * p_.key_heads * plan_.row_blocks;
    const int64_t elements = p_.keys * p_.size;
    const int64_t threads = units * elements < kSerialElements ? 1 : std::max<int64_t>(p_.threads, 1);
    const int64_t turns = (units + threads - 1) / threads;
    // If a quarter of the threads or more would be idle, the threads share each unit instead.
    const bool whole = threads == 1 || plan_.chunks < 2 || 4 * units >= 3 * turns * threads;
    if (whole) {
      run_range(units, threads > 1, [&](int64_t begin, int64_t end) {
        for (int64_t index = begin; index < end; ++index) run_unit(unit_at(first_pair, index, sums));
      });
    } else {
      for (int64_t index = 0; index < units; ++index) split_unit(unit_at(first_pair, index, sums));
    }
    const int64_t rows = pairs * p_.rows;
    const bool parallel = threads > 1 && rows * p_.token_count * p_.key_heads > kSerialElements;
    run_range(rows, parallel, [&](int64_t begin, int64_t end) {
      for (int64_t index = begin; index < end; ++index) finish_row(first_pair, index, sums);
    });
  }

  template <typename F>
  void run_range(int64_t count, bool parallel, const F& body) const {
    if (count <= 0) return;
    if (!parallel) return body(int64_t{0}, count);
    parallel_for(count, 1, body);
  }

  Unit unit_at(int64_t first_pair, int64_t index, float* sums) const {
    const int64_t block = index % plan_.row_blocks;
    const int64_t key_head = index / plan_.row_blocks % p_.key_heads;
    const int64_t pair_of_wave = index / plan_.row_blocks / p_.key_heads;
    const int64_t pair = first_pair + pair_of_wave;
    const int64_t first_row = block * plan_.rows;
    return {&p_.layers[pair / p_.batch],
            pair % p_.batch,
            key_head,
            first_row,
            std::min(plan_.rows, p_.rows - first_row),
            sums + pair_of_wave * pair_floats() + key_head * p_.rows * p_.token_count};
  }

  const TokenRuns& start_unit(const Unit& unit) const {
    const TokenRuns& tokens = token_runs_[static_cast<size_t>(unit.batch)];
    if (tokens.used < p_.token_count) clear_padding(plan_, unit);
    return tokens;
  }

  void run_unit(const Unit& unit) const {
    const TokenRuns& tokens = start_unit(unit);
    if (tokens.used == 0) return;
    float* const staging = staging_arena.floats(plan_.staging_floats());
    float* const scratch = scratch_arena.floats(plan_.scratch_floats());
    pack_unit(plan_, unit, scratch, staging);
    for (int64_t chunk = 0; chunk < plan_.chunks; ++chunk) score_chunk(plan_, unit, chunk, scratch, staging);
    relate_chunks(plan_, unit, scratch, nullptr);
    gather_runs(plan_, unit, runs_.data() + tokens.first, static_cast<int64_t>(tokens.last - tokens.first), scratch);
  }

  void split_unit(const Unit& unit) const {
    const TokenRuns& tokens = start_unit(unit);
    if (tokens.used == 0) return;
    float* const scratch = scratch_arena.floats(plan_.scratch_floats());
    pack_unit(plan_, unit, scratch, staging_arena.floats(plan_.staging_floats()));
    run_range(plan_.chunks, true, [&](int64_t begin, int64_t end) {
      float* const staging = staging_arena.floats(plan_.staging_floats());
      for (int64_t chunk = begin; chunk < end; ++chunk) score_chunk(plan_, unit, chunk, scratch, staging);
    });
    relate_chunks(plan_, unit, scratch, nullptr);
    run_range(static_cast<int64_t>(tokens.last - tokens.first), true, [&](int64_t begin, int64_t end) {
      gather_runs(plan_, unit, runs_.data() + tokens.first + begin, end - begin, scratch);
    });
  }

  void finish_row(int64_t first_pair, int64_t index, float* sums) const {
    const int64_t row = index % p_.rows;
    const int64_t pair_of_wave = index / p_.rows;
    const int64_t batch = (first_pair + pair_of_wave) % p_.batch;
    const CaptureLayer& layer = p_.layers[(first_pair + pair_of_wave) / p_.batch];
    float* const group_sums = sums + pair_of_wave * pair_floats() + row * p_.token_count;
    float* const mean = p_.each ? group_sums : layer.maps + batch * p_.maps_strides[0] + row * p_.maps_strides[2];
    const Summary summary = plan_.kernels.mean({group_sums, p_.key_heads, p_.rows * p_.token_count, p_.token_count,
                                                token_runs_[static_cast<size_t>(batch)].used,
                                                static_cast<float>(p_.heads), mean});
    layer.mass[batch * p_.mass_strides[0] + row * p_.mass_strides[1]] = summary.mass;
    layer.entropy[batch * p_.entropy_strides[0] + row * p_.entropy_strides[1]] = summary.entropy;
  }

  const CaptureParams& p_;
  const UnitPlan plan_;
  const std::vector<KeyRun>& runs_;
  const std::vector<TokenRuns>& token_runs_;
};

}  // namespace

void capture_cpu(const CaptureParams& params) {
  if (params.layer_count == 0 || params.batch == 0 || params.rows == 0) return;
  Captures(params).run();
}

}  // namespace carve
