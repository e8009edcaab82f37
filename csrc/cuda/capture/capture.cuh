// The arguments of the kernels, and how blocks share a capture.
#pragma once

#include <cstdint>

#include "carve.h"
#include "cuda/device.cuh"

namespace carve {

constexpr int kThreads = 256;
constexpr int kMaxRows = 8;
constexpr int kMaxSize = 256;
// As many as fit into the 4 KB of arguments that every driver accepts; more layers take further launches.
constexpr int kLayersAtOnce = 34;

// Keys of a split: 64 keys, 16 KB of bf16 at D = 128, are what one iteration of a block holds in flight. From 2048 keys
// on there are 32 splits, with which 4 KV heads of one layer fill 132 SMs; each block of the second launch reads the
// results of all splits, 7 KB for 28 heads and one row.
constexpr int64_t kSplitKeys = 64;
constexpr int64_t kMaxSplits = 32;

struct CaptureLaunch {
  CaptureLayer layers[kLayersAtOnce];
  CaptureParams params;  // its `layers` is null
  CaptureDevice device;
  int64_t split_keys;
  int splits;
  int token_blocks;
  int heads_at_once;  // key heads that a block of the second launch processes at a time, a power of two
  bool aligned;       // every key starts at a multiple of 16 bytes and has whole vectors of them
  float2* stats;      // [layers, batch, heads, rows, splits], maximum, and sum of e^(logit - maximum)
  float* mean;        // [layers, batch, rows, token_count], where the maps are of each head
  unsigned* tickets;  // [layers, batch]
};
static_assert(sizeof(CaptureLaunch) <= 4096);

struct CapturePlan {
  int layers;
  bool stats;  // false if the log-sum-exp is given, or if there are no keys or no tokens
};

// The launches of one CapturePlan, for each element type.
void launch_capture_float(const CaptureLaunch& launch, const CapturePlan& plan);
void launch_capture_half(const CaptureLaunch& launch, const CapturePlan& plan);
void launch_capture_bfloat(const CaptureLaunch& launch, const CapturePlan& plan);

}  // namespace carve
