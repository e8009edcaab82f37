// How a capture on a GPU is divided into launches. No header of CUDA: what a capture needs is known without a GPU.
#pragma once

#include "carve.h"

namespace carve {

constexpr int64_t kMostBlocks = 65535;    // on the second and third axis of a grid
constexpr int64_t kThreadsOfBlock = 128;  // of every kernel
constexpr int64_t kMostTokenParts = 256;  // of warps in a block of capture_maps, and of blocks in a row
// As many as fit into the 4 KB of arguments that every driver accepts; more layers take further launches.
constexpr int64_t kLayersAtOnce = 32;

// How a capture is divided into launches, and where its scratch lies.
struct CapturePlan {
  bool is_plain;     // the first kernel multiplies without tensor cores
  bool is_reread;    // the second kernel reads the tokens' keys
  int64_t layers;    // at a time
  int64_t rows;      // at a time
  int64_t padded;
  int64_t queries_at_once;
  int64_t query_blocks;
  int64_t split_keys;
  int64_t splits;
  int64_t token_chunks;
  int64_t token_blocks;
  // Offsets in the scratch, in bytes; the span is at 0.
  int64_t stats;
  int64_t parts;
  int64_t scores;
  int64_t bytes;    // of the scratch
  int64_t tickets;
};

// Whether there is a mask, a softcap or a negative scale, or heads are not of 64, 128 or 256 elements. Such captures
// have kernels of their own, which take fewer queries at a time: a short capture takes no longer than to load
// instructions.
inline bool is_general(const CaptureParams& p) {
  const bool is_whole = p.size == 64 || p.size == 128 || p.size == 256;
  return !is_whole || p.mask != nullptr || p.softcap != 0.0f || p.scale < 0.0f;
}

// From the sizes, `type` and whether `lse` is null. `is_aligned`: every key starts at a multiple of 16 bytes and is
// whole vectors of them. With less scratch than a plan wants, keys are read again instead of their scores being stored,
// if that is possible.
CapturePlan plan_capture(const CaptureParams& sizes, bool is_aligned, int64_t scratch_bytes = INT64_MAX);

}  // namespace carve
