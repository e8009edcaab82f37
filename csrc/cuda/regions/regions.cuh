// Shared by the kernels of regions: the arguments of a call, its scratch memory, and how they are launched.
#pragma once

#include <cstdint>

#include "carve.h"
#include "cuda/launch.cuh"
#include "cuda/regions/digits.cuh"

namespace carve {

// Pixel kernels: a step is 32 adjacent pixels of a warp, and each warp has eight steps in flight. With up to 64
// registers four blocks of 256 threads share a multiprocessor (4 x 256 x 64 of 65536), and 4 x 256 threads x 8 loads
// x 4 bytes are 32 KB in flight in each, where 3.35 TB/s x 600 ns / 132 = 15 KB hide the latency of memory.
constexpr int kBlockThreads = 256;
constexpr int kSteps = 8;
constexpr uint32_t kBlockPixels = kBlockThreads * kSteps;

// A tile is labelled by one block: a row of it is the lanes of a warp, and each warp has eight rows.
constexpr uint32_t kTileWidth = 32;
constexpr uint32_t kTileHeight = kSteps * (kBlockThreads / 32);

constexpr int32_t kOff = -1;  // the label of a pixel below the threshold

// One per call. A part is what a tile has of a region.
struct RegionsState {
  alignas(16) uint32_t counts[kMostCounts];  // of the digits of all passes
  Key low, high;             // the keys of the least and the greatest value
  Key next;                  // the least key with greater leading digits than the threshold's
  Key prefix[kMostPasses];   // before each pass, the digits that are known
  uint32_t rank[kMostPasses];  // and the rank among the values with these digits
  uint32_t parts, regions;
  uint32_t large;  // regions that are not left out; counted where any may be
  int32_t reason;
};

struct RegionsJob {
  const void* saliency;
  uint32_t count, width, height;  // the count is that of all frames
  uint32_t frames;
  bool has_frames;  // boxes have edges in time
  uint32_t rank;     // of the value below the threshold, from 0
  double weight;     // of the farther of the threshold's two neighbours, rounded to the dtype of the saliency
  bool from_above;   // the nearer one is the greater
  bool has_corners;
  Score score;
  uint32_t min_size;  // regions of fewer pixels are left out
  bool counts_pixels;
  double one;  // 1 in fixed point
  double keep;
  int64_t top, floor;
  bool* mask;
  int64_t* boxes;
  double* scores;
  int64_t* outcome;
  int64_t outcome_rows;  // of boxes and scores, which follow the numbers and the box of the outcome
  RegionsState* state;
  int32_t* labels;  // for each pixel, its part or kOff
  // For each part, in any order: its parent, a part of the same region with no greater number (itself, if a root), then
  // the root; what it adds to its region's score; its first pixel; its box. `upper` and `back` are for frames alone: in an
  // image the first pixel is in the top row.
  int32_t* parents;
  Key* amounts;  // of a region's root, in the end: its score as an integer that is less for a better one
  int32_t *firsts, *left, *right, *bottom, *upper, *back;
  uint32_t* pixels;  // for each part, where they are counted
  int32_t* roots;    // for each region, in any order
  // For each region by rank, in two buffers: its score as in `amounts`, and its first pixel.
  Key* sorted_keys[2];
  int32_t* sorted_firsts[2];

  __device__ __forceinline__ int edges() const { return has_frames ? 6 : 4; }
  __device__ __forceinline__ bool leaves_out() const { return min_size > 1; }
};

// What the outcome has of a box, given as x0 y0 f0 x1 y1 f1: each edge, and where it is among those that are written.
template <class Write>
__device__ __forceinline__ void each_edge(const RegionsJob& job, const int64_t (&box)[6], const Write& write) {
  int at = 0;
#pragma unroll
  for (int edge = 0; edge < 6; ++edge) {
    if (edge % 3 == 2 && !job.has_frames) continue;
    write(at++, box[edge], edge < 3);
  }
}

// What the outcome says where there is no region.
__device__ __forceinline__ void write_whole(const RegionsJob& job, Reason reason) {
  store(job.outcome + 1, static_cast<int64_t>(reason));
  const int64_t box[6] = {0, 0, 0, job.width, job.height, job.frames};
  each_edge(job, box, [&](int at, int64_t edge, bool) { store(job.outcome + 2 + at, edge); });
}

// The largest absolute value of the saliency, which is 1 in fixed point.
template <class T>
__device__ __forceinline__ double peak_of(const RegionsState* state) {
  const double low = value_of<T>(static_cast<BitsOf<T>>(load_coherent(&state->low)));
  const double high = value_of<T>(static_cast<BitsOf<T>>(load_coherent(&state->high)));
  return -low > high ? -low : high;
}

// Whether a previous kernel found a reason for no regions. One lane reads it for its warp.
__device__ __forceinline__ bool has_reason(const RegionsState* state) {
  return __any_sync(kAllLanes, lane_of_thread() == 0 && load_coherent(&state->reason) != 0);
}

// How many of a thread's pixels, from `first` on and `stride` from one to the next, are in the image: at most `most`.
// To compare a step with this number takes fewer instructions than to compare every pixel with the last one.
__device__ __forceinline__ int count_steps(const RegionsJob& job, uint32_t first, uint32_t stride, int most) {
  if (first >= job.count) return 0;
  const uint32_t steps = (job.count - first + stride - 1) / stride;
  return steps < static_cast<uint32_t>(most) ? static_cast<int>(steps) : most;
}

// The number of blocks for a kernel that processes `per_block` elements per block at a time.
inline unsigned count_blocks(int64_t elements, int64_t per_block, int64_t most) {
  const int64_t blocks = (elements + per_block - 1) / per_block;
  return static_cast<unsigned>(blocks < 1 ? 1 : blocks < most ? blocks : most);
}

// The launches of each file, called in this order. Each overlaps the one before it where `overlaps`: it reads the
// saliency, which none of them writes, before it waits for that one.
struct RegionsLaunches {
  cudaStream_t stream;
  int64_t most_blocks;
  bool overlaps;

  Launch of(const char* name, unsigned blocks, unsigned threads, size_t shared_bytes = 0) const {
    return {name, blocks, threads, shared_bytes, stream, overlaps};
  }
};
void launch_select(const RegionsJob& job, bool is_double, const RegionsLaunches& how);
void launch_label(const RegionsJob& job, bool is_double, const RegionsLaunches& how);
void launch_join(const RegionsJob& job, int64_t most_parts, const RegionsLaunches& how);
void launch_rank(const RegionsJob& job, bool is_double, int64_t most_regions, const RegionsLaunches& how);

}  // namespace carve
