// The gradients of a capture: the exponentials of a few rows over all keys are computed again, as by a capture, and
// then replaced by the gradients of the products of query and key.
//
// The gradient of a logit is p * (given - total): p is its probability, given the gradient of the loss with respect to
// p, which is 0 at keys without a token, and total the sum of p * given over all keys of the row. Every sum has a fixed
// order: chunks of keys, rows, batches.

#include <algorithm>
#include <cmath>
#include <vector>

#include "cpu/arena.h"
#include "cpu/capture/unit.h"
#include "cpu/parallel.h"

namespace carve {
namespace {

// Scores of the rows that are computed at a time, or those of one row of all heads. A build for tests sets fewer.
#ifndef CARVE_GRADIENT_SCORES
#define CARVE_GRADIENT_SCORES (int64_t{1} << 21)
#endif
constexpr int64_t kScores = CARVE_GRADIENT_SCORES;
// With fewer products another thread costs more than it saves.
constexpr int64_t kSerialProducts = int64_t{1} << 18;

thread_local Arena panel_arena;

int64_t round_up(int64_t value, int64_t step) { return (value + step - 1) / step * step; }

// What is computed at a time: some rows of some batches, all heads of them.
struct Wave {
  int64_t first_batch;
  int64_t batches;
  int64_t first_row;
  int64_t rows;
};

// The sizes of the largest wave and where the parts of the scratch start, in floats.
struct WavePlan {
  WavePlan(const CaptureParams& p, const UnitPlan& unit) {
    const int64_t row_scores = std::max<int64_t>(p.heads * unit.stride, 1);
    rows = std::clamp<int64_t>(kScores / row_scores, 1, std::max<int64_t>(p.rows, 1));
    const int64_t fitting = rows < p.rows ? 1 : kScores / (row_scores * rows);
    batches = std::clamp<int64_t>(fitting, 1, std::max<int64_t>(p.batch, 1));
  }

  // `unit` has the rows of this plan.
  void place(const CaptureParams& p, const UnitPlan& unit) {
    const int64_t units = batches * p.key_heads;
    lines = rows * unit.group;
    unit_floats = round_up(unit.scratch_floats(), 16);
    given = units * unit_floats;
    query = given + batches * (p.each ? p.heads : 1) * rows * unit.stride;
    partials = query + units * lines * p.size;
    totals = partials + units * unit.chunks * lines * p.size;
    sinks = totals + units * lines;
    floats = sinks + units * lines;
  }

  int64_t rows;
  int64_t batches;
  int64_t lines = 0;  // of a unit
  int64_t unit_floats = 0;
  int64_t given = 0;     // [batches, heads or 1, rows, stride]: the gradients with respect to the probabilities
  int64_t query = 0;     // [units, lines, size]: in float32
  int64_t partials = 0;  // [units, chunks, lines, size]: the query's gradients by chunk
  int64_t totals = 0;    // [units, lines]
  int64_t sinks = 0;     // [units, lines]: the probabilities of the sink
  int64_t floats = 0;
};

class Backward {
 public:
  Backward(const CaptureParams& params, const CaptureGradients& gradients)
      : p_(params), g_(gradients), plan_(params, active_kernels()), wave_(params, plan_) {
    plan_.rows = wave_.rows;
    plan_.has_slopes = params.softcap != 0.0f;
    wave_.place(params, plan_);
  }

  int64_t scratch_floats() const { return wave_.floats; }

  void run() const {
    std::vector<double> sinks(static_cast<size_t>(p_.heads), 0.0);
    if (p_.keys == 0 || p_.rows == 0 || p_.batch == 0 || p_.token_count == 0) {
      std::fill_n(g_.query, p_.batch * p_.heads * p_.rows * p_.size, 0.0f);
      if (g_.key != nullptr) std::fill_n(g_.key, p_.batch * p_.key_heads * p_.keys * p_.size, 0.0f);
    } else {
      for (int64_t batch = 0; batch < p_.batch; batch += wave_.batches) {
        for (int64_t row = 0; row < p_.rows; row += wave_.rows) {
          run_wave({batch, std::min(wave_.batches, p_.batch - batch), row, std::min(wave_.rows, p_.rows - row)}, sinks);
        }
      }
    }
    for (int64_t head = 0; head < p_.heads && g_.sink != nullptr; ++head) {
      g_.sink[head] = static_cast<float>(sinks[static_cast<size_t>(head)]);
    }
  }

 private:
  void run_wave(const Wave& wave, std::vector<double>& sinks) const {
    const int64_t units = wave.batches * p_.key_heads;
    const int64_t lines = wave.rows * plan_.group;
    const bool parallel = p_.threads > 1 && units * lines * p_.keys * std::max<int64_t>(p_.size, 1) > kSerialProducts;
    each_of(units, parallel, [&](int64_t unit) { pack(wave, unit); });
    each_of(units * plan_.chunks, parallel, [&](int64_t index) {
      float* const panel = panel_arena.floats(plan_.score.panel_floats(p_.size));
      score_chunk(plan_, unit_at(wave, index / plan_.chunks), index % plan_.chunks, scratch_of(index / plan_.chunks),
                  panel);
    });
    each_of(units, parallel, [&](int64_t unit) {
      relate_chunks(plan_, unit_at(wave, unit), scratch_of(unit), sinks_of(unit));
    });
    each_of(wave.batches * wave.rows, parallel, [&](int64_t index) {
      give(wave, index / wave.rows, index % wave.rows);
    });
    each_of(units * lines, parallel, [&](int64_t index) { add_total(index / lines, index % lines); });
    each_of(units * plan_.chunks, parallel, [&](int64_t index) {
      multiply(wave, index / plan_.chunks, index % plan_.chunks);
    });
    each_of(units * lines, parallel, [&](int64_t index) { add_partials(wave, index / lines, index % lines); });
    for (int64_t unit = 0; unit < units && g_.sink != nullptr; ++unit) {
      for (int64_t line = 0; line < lines; ++line) {
        const float share = sinks_of(unit)[line];
        sinks[static_cast<size_t>(head_of(unit, line))] -= static_cast<double>(share) * totals_of(unit)[line];
      }
    }
  }

  template <typename F>
  void each_of(int64_t count, bool parallel, const F& body) const {
    const auto range = [&](int64_t begin, int64_t end) {
      for (int64_t index = begin; index < end; ++index) body(index);
    };
    if (!parallel) return range(0, count);
    parallel_for(count, 1, range);
  }

  Unit unit_at(const Wave& wave, int64_t unit) const {
    return {p_.layers, wave.first_batch + unit / p_.key_heads, unit % p_.key_heads, wave.first_row, wave.rows, nullptr};
  }

  // The lines of a unit are [row, head of the group].
  int64_t head_of(int64_t unit, int64_t line) const {
    return unit % p_.key_heads * plan_.group + line % plan_.group;
  }

  float* scratch_of(int64_t unit) const { return g_.scratch + unit * wave_.unit_floats; }
  float* query_of(int64_t unit) const { return g_.scratch + wave_.query + unit * wave_.lines * p_.size; }
  float* totals_of(int64_t unit) const { return g_.scratch + wave_.totals + unit * wave_.lines; }
  float* sinks_of(int64_t unit) const { return g_.scratch + wave_.sinks + unit * wave_.lines; }

  float* partials_of(int64_t unit, int64_t chunk) const {
    return g_.scratch + wave_.partials + (unit * plan_.chunks + chunk) * wave_.lines * p_.size;
  }

  // Of a batch and a row of the wave, and of a head where each has its own map.
  float* given_of(int64_t batch, int64_t head, int64_t row) const {
    const int64_t line = p_.each ? batch * p_.heads + head : batch;
    return g_.scratch + wave_.given + (line * wave_.rows + row) * plan_.stride;
  }

  void pack(const Wave& wave, int64_t unit) const {
    pack_unit(plan_, unit_at(wave, unit), scratch_of(unit), query_of(unit));
  }

  bool is_used(int64_t key) const { return key >= 0 && key < p_.keys; }

  // The mean over the heads of the probabilities of a key.
  double mean_of(int64_t batch, int64_t row, int64_t key) const {
    double sum = 0.0;
    for (int64_t head = 0; head < p_.heads; ++head) {
      const int64_t unit = batch * p_.key_heads + head / plan_.group;
      const int64_t line = row * plan_.group + head % plan_.group;
      const float factor = plan_.tops_of(scratch_of(unit), line)[key / kChunk];
      sum += plan_.scores_of(scratch_of(unit), line)[key] * factor;
    }
    return sum / static_cast<double>(p_.heads);
  }

  // The gradients [token_count] of the entropy with respect to the means of a row, which are its argument. At a mean of
  // 0 they are infinite and count as 0: x ln x is 0 at 0.
  void slope_of_entropy(int64_t wave_batch, int64_t batch, int64_t row, std::vector<double>& means) const {
    double mass = 0.0;
    int64_t used = 0;
    for (int64_t token = 0; token < p_.token_count; ++token) {
      const int64_t key = p_.tokens.at(batch, token);
      double& mean = means[static_cast<size_t>(token)];
      mean = is_used(key) ? mean_of(wave_batch, row, key) : 0.0;
      mass += mean;
      used += is_used(key);
    }
    if (used < 2 || mass == 0.0) return std::fill(means.begin(), means.end(), 0.0);
    double spread = 0.0;
    for (double& mean : means) {
      mean /= mass;
      if (mean != 0.0) spread -= mean * std::log(mean);
    }
    const double unit = mass * std::log(static_cast<double>(used));
    for (double& share : means) {
      if (share != 0.0) share = -(std::log(share) + spread) / unit;
    }
  }

  // The gradients with respect to the probabilities of a row.
  void give(const Wave& wave, int64_t wave_batch, int64_t wave_row) const {
    const int64_t batch = wave.first_batch + wave_batch;
    const int64_t row = wave.first_row + wave_row;
    const int64_t at = batch * p_.rows + row;
    const double of_mass = g_.mass == nullptr ? 0.0 : g_.mass[at];
    const double of_entropy = g_.entropy == nullptr ? 0.0 : g_.entropy[at];
    std::vector<double> slopes;
    if (g_.entropy != nullptr) {
      slopes.resize(static_cast<size_t>(p_.token_count));
      slope_of_entropy(wave_batch, batch, wave_row, slopes);
    }
    for (int64_t head = 0; head < (p_.each ? p_.heads : 1); ++head) {
      float* const given = given_of(wave_batch, head, wave_row);
      std::fill_n(given, plan_.stride, 0.0f);
      const int64_t line = p_.each ? (batch * p_.heads + head) * p_.rows + row : at;
      const float* const of_maps = g_.maps == nullptr ? nullptr : g_.maps + line * p_.token_count;
      for (int64_t token = 0; token < p_.token_count; ++token) {
        const int64_t key = p_.tokens.at(batch, token);
        if (!is_used(key)) continue;
        const double of_map = of_maps == nullptr ? 0.0 : of_maps[token];
        double of_mean = of_mass + (p_.each ? 0.0 : of_map);
        if (g_.entropy != nullptr) of_mean += of_entropy * slopes[static_cast<size_t>(token)];
        // A token that is listed twice counts twice.
        given[key] += static_cast<float>(of_mean / static_cast<double>(p_.heads) + (p_.each ? of_map : 0.0));
      }
    }
  }

  const float* given_of_line(int64_t unit, int64_t line) const {
    return given_of(unit / p_.key_heads, head_of(unit, line), line / plan_.group);
  }

  void add_total(int64_t unit, int64_t line) const {
    const float* const scores = plan_.scores_of(scratch_of(unit), line);
    const float* const factors = plan_.tops_of(scratch_of(unit), line);
    const float* const given = given_of_line(unit, line);
    double total = 0.0;
    for (int64_t chunk = 0; chunk < plan_.chunks; ++chunk) {
      const int64_t start = chunk * kChunk;
      const int64_t keys = std::min(kChunk, p_.keys - start);
      total += static_cast<double>(factors[chunk]) * plan_.kernels.gradient.weigh(scores + start, given + start, keys);
    }
    totals_of(unit)[line] = static_cast<float>(total);
  }

  // The gradients of the products of a chunk, those of its keys, and its part of those of the query.
  void multiply(const Wave& wave, int64_t unit, int64_t chunk) const {
    const GradientKernels& kernels = plan_.kernels.gradient;
    const int64_t start = chunk * kChunk;
    const int64_t keys = std::min(kChunk, p_.keys - start);
    const int64_t lines = wave.rows * plan_.group;
    float* const scratch = scratch_of(unit);
    bool is_read[kChunk] = {};
    for (int64_t line = 0; line < lines; ++line) {
      float* const values = plan_.scores_of(scratch, line) + start;
      const float* const slopes = plan_.has_slopes ? plan_.slopes_of(scratch, line) + start : nullptr;
      kernels.products({values, keys, plan_.tops_of(scratch, line)[chunk], given_of_line(unit, line) + start,
                        totals_of(unit)[line], slopes, p_.scale});
      for (int64_t key = 0; key < keys; ++key) is_read[key] |= values[key] != 0.0f;
    }
    // A key that no row sees may hold NaN, which times 0 would be NaN.
    int32_t columns[kChunk];
    int64_t count = 0;
    for (int64_t key = 0; key < keys; ++key) {
      if (is_read[key]) columns[count++] = static_cast<int32_t>(key);
    }
    const float* const values = plan_.scores_of(scratch, 0) + start;
    const Unit at = unit_at(wave, unit);
    if (count == 0) {
      std::fill_n(partials_of(unit, chunk), lines * p_.size, 0.0f);
    } else {
      const int64_t* strides = p_.layers->key_strides;
      const int64_t offset = at.batch * strides[0] + at.key_head * strides[1] + start * strides[2];
      const char* const key = static_cast<const char*>(p_.layers->key) + offset * (p_.type == Float::kFloat32 ? 4 : 2);
      kernels.query[static_cast<int>(p_.type)]({key, strides[2], p_.size, columns, count, values, plan_.stride, lines,
                                                partials_of(unit, chunk)});
    }
    if (g_.key == nullptr) return;
    float* const out = g_.key + ((at.batch * p_.key_heads + at.key_head) * p_.keys + start) * p_.size;
    kernels.key({values, plan_.stride, lines, query_of(unit), p_.size, keys, wave.first_row > 0, out});
  }

  void add_partials(const Wave& wave, int64_t unit, int64_t line) const {
    const int64_t batch = wave.first_batch + unit / p_.key_heads;
    const int64_t row = wave.first_row + line / plan_.group;
    float* const out = g_.query + ((batch * p_.heads + head_of(unit, line)) * p_.rows + row) * p_.size;
    std::copy_n(partials_of(unit, 0) + line * p_.size, p_.size, out);
    for (int64_t chunk = 1; chunk < plan_.chunks; ++chunk) {
      const float* const partial = partials_of(unit, chunk) + line * p_.size;
      for (int64_t element = 0; element < p_.size; ++element) out[element] += partial[element];
    }
  }

  const CaptureParams& p_;
  const CaptureGradients& g_;
  UnitPlan plan_;
  WavePlan wave_;
};

}  // namespace

int64_t capture_backward_cpu_scratch(const CaptureParams& params) { return Backward(params, {}).scratch_floats(); }

void capture_backward_cpu(const CaptureParams& params, const CaptureGradients& gradients) {
  Backward(params, gradients).run();
}

}  // namespace carve
