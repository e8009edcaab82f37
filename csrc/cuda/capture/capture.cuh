// The kernels' arguments, and how a capture is divided among blocks.
#pragma once

#include <cstdint>

#include "carve.h"
#include "cuda/device.cuh"

namespace carve {

constexpr int kThreads = 256;
constexpr int kMaxRows = 8;
constexpr int kMaxSize = 256;
// As many as fit into the 4 KB that every driver takes as arguments; more layers are launched in turns.
constexpr int kLayersAtOnce = 34;

// Keys of a split: 64 of them, 16 KB of bf16 at D = 128, are what one pass of a block holds in flight. From 2048 keys
// on the number stays at 32, with which 4 KV heads fill 132 SMs from one layer; each block of the second launch reads
// all the splits' results, 7 KB of them for 28 heads and one row.
constexpr int64_t kSplitKeys = 64;
constexpr int64_t kMaxSplits = 32;

struct CaptureLaunch {
  CaptureLayer layers[kLayersAtOnce];
  CaptureParams params;  // its `layers` is null
  CaptureDevice device;
  int64_t split_keys;
  int splits;
  int token_blocks;
  int heads_at_once;  // key heads that a block of the second launch holds at a time, a power of two
  bool aligned;       // every key starts at a multiple of 16 bytes and has whole vectors of them
  float2* stats;      // [layers, batch, heads, rows, splits], maximum, and sum of e^(logit - maximum)
  float* mean;        // [layers, batch, rows, token_count], where the maps are of each head
  unsigned* tickets;  // [layers, batch]
};
static_assert(sizeof(CaptureLaunch) <= 4096);

struct CapturePlan {
  int layers;
  bool stats;  // false where the log-sum-exp is known, or nothing is looked for
};

// One a type: the launches of one CapturePlan.
void launch_capture_float(const CaptureLaunch& launch, const CapturePlan& plan);
void launch_capture_half(const CaptureLaunch& launch, const CapturePlan& plan);
void launch_capture_bfloat(const CaptureLaunch& launch, const CapturePlan& plan);

}  // namespace carve
