// One unit of capture: a block of query rows of one KV head. It reads the keys once for its group of query heads.
#pragma once

#include <cstdint>
#include <vector>

#include "carve.h"
#include "cpu/capture/kernels.h"

namespace carve {

// Sizes shared by all units of a call.
struct UnitPlan {
  UnitPlan(const CaptureParams& params, const CaptureKernels& kernels);

  const CaptureParams& params;
  const CaptureKernels& kernels;
  const ScoreKernels& score;
  int64_t group;       // query heads of one KV head
  int64_t rows;        // the most query rows of a unit
  int64_t row_blocks;  // units of one KV head
  int64_t chunks;
  int64_t stride;       // floats from one row's scores to the next
  int64_t tops_stride;  // likewise for values that exist once per chunk
  bool has_slopes;      // the slopes of the softcap are kept; false by default

  int64_t scratch_floats() const;
  int64_t staging_floats() const;

  // Scratch of a unit: exponentials, then the maximum and the sum of each row and chunk, then the packed query, then
  // the slopes. The rows of a unit are [query row, head of the group].
  float* scores_of(float* scratch, int64_t row) const { return scratch + row * stride; }
  float* tops_of(float* scratch, int64_t row) const { return scratch + rows * group * stride + row * tops_stride; }
  float* sums_of(float* scratch, int64_t row) const { return tops_of(scratch, rows * group + row); }
  float* packed_of(float* scratch) const { return sums_of(scratch, rows * group); }
  float* slopes_of(float* scratch, int64_t row) const { return packed_of(scratch) + packed_floats() + row * stride; }

 private:
  int64_t packed_floats() const;
};

struct Unit {
  const CaptureLayer* layer;
  int64_t batch;
  int64_t key_head;
  int64_t first_row;
  int64_t rows;
  float* sums;  // [params.rows, token_count]: the sum over the group's heads
};

// The steps in their order. Threads may share the chunks, and then the runs, with one scratch and a staging buffer
// each.
void pack_unit(const UnitPlan& plan, const Unit& unit, float* scratch, float* staging);
void score_chunk(const UnitPlan& plan, const Unit& unit, int64_t chunk, float* scratch, float* staging);
// Writes the probability of the sink of each row, 0 without one, unless `sinks` is null.
void relate_chunks(const UnitPlan& plan, const Unit& unit, float* scratch, float* sinks);
void clear_padding(const UnitPlan& plan, const Unit& unit);
void gather_runs(const UnitPlan& plan, const Unit& unit, const KeyRun* runs, int64_t count, const float* scratch);

}  // namespace carve
