// The arguments of the two kernels of contrast, and how their work is divided.
#pragma once

#include <cstdint>

#include "carve.h"
#include "cuda/launch.cuh"

namespace carve {

constexpr int kContrastThreads = 256;
constexpr int kContrastWarps = kContrastThreads / 32;
// Maps (one layer and one step each) whose values a thread of the first kernel has in flight.
constexpr int kMapsAtOnce = 8;
// A map of up to 64 is in one of at most 8 chunks: the second kernel adds up the chunks of every cell that it reads,
// so that more of them would move work to it.
constexpr int64_t kFewChunks = 8;
constexpr int64_t kMostChunks = 32;
// Every block reads its general maps whole where their means are added: no more blocks of tokens than this.
constexpr int64_t kMostTokenBlocks = 8;
constexpr int64_t kMostMapsOfChunk = 4096;  // their weights and means are in shared memory
// Four pixels of a row for each thread that has any.
constexpr int kQuad = 4;
constexpr int64_t kMostBlended = 10240;  // floats of shared memory of a block of the second kernel
// Two for each multiprocessor of a large GPU, one where every block has to read the whole grid.
constexpr int64_t kWantedBlocks = 256;
constexpr int64_t kMostTileRows = 16;
// As many as fit into 4 KB of arguments; more views take further launches.
constexpr int kViewsAtOnce = 32;
// Positions on an axis are compared as integers of up to 8 * cells * pixels, which must stay below 2^31.
constexpr int64_t kMostCellsTimesPixels = (int64_t{1} << 28) - 1;

// Some maps, at some tokens: ratio to the general map, weighted sum.
struct GridLaunch {
  const float* task;     // [layers, steps, tokens]
  const float* general;  // [layers, steps, tokens]; the stride of a step is 0 where there is one for all
  int64_t task_strides[2];
  int64_t general_strides[2];
  int64_t task_jump;     // from the last step of a layer to the first of the next
  int64_t general_jump;
  const double* layer_weights;
  const double* step_weights;
  float* partials;  // [chunks, tokens]
  int maps;         // layers * steps
  int steps;
  int tokens;
  int maps_of_chunk;
  int tokens_of_block;  // a multiple of the threads
  float lam;
};

// A view, and its tiles of pixels: one for each block.
struct PixelView {
  float* out;
  int grid_h, grid_w, height, width;
  int first_token;
  int first_block;
  int across;      // tiles from the left to the right
  int rows;        // of a tile
  int quads;       // of four pixels, in a row of a tile
  int most_cells;  // of a row of a tile
  bool is_vector;  // each quad is one vector in memory
};

struct PixelsLaunch {
  const float* partials;  // [chunks, tokens]
  int chunks;
  int tokens;
  Normalize normalize;
  int views;
  PixelView view[kViewsAtOnce];
};
static_assert(sizeof(PixelsLaunch) <= 4096);

struct ContrastGrid {
  dim3 blocks;
  cudaStream_t stream;
  bool overlaps;  // the device overlaps dependent launches
};
void launch_grid(const GridLaunch& launch, bool lam_is_mean, const ContrastGrid& how);
// `blended`: the floats of the largest tile.
void launch_pixels(const PixelsLaunch& launch, int64_t blended, const ContrastGrid& how);

}  // namespace carve
