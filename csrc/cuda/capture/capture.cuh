// The arguments of the kernels of capture, and what all of them share.
#pragma once

#include <cstdint>

#include "carve.h"
#include "cuda/capture/plan.h"
#include "cuda/device.cuh"

namespace carve {

constexpr int kThreads = static_cast<int>(kThreadsOfBlock);
constexpr int kWarps = kThreads / 32;
constexpr int kMaxSize = 256;
constexpr int kMostParts = static_cast<int>(kMostTokenParts);
constexpr float kLog2E = 1.44269504088896340736f;
constexpr float kLog2ELow = 1.92596299e-8f;  // log2(e) - kLog2E
// The maximum of no scores: finite, so that no difference of maxima is NaN.
constexpr float kLowest = -3.402823466e38f;

// A score is the product of a query and a key or, with a softcap, its tanh; `factor` makes it a logit in base 2. It is
// computed once and not rounded again: the exponent factor * score - maximum is one fma, so the digits that large
// logits lose are those that all of a row have in common.
struct Logit {
  float factor;
  float residual;    // what `factor` lost when it was rounded, as a share of it
  float inner;     // scale / softcap, 0 without a softcap
  bool is_negative;  // without a softcap: the scale is negative, and the factor its magnitude

  __device__ __forceinline__ bool changes() const { return inner != 0.0f || is_negative; }
  __device__ __forceinline__ float score(float product) const {
    return inner != 0.0f ? tanhf(product * inner) : -product;
  }
};

// What every block reads before its first load of keys comes first, in few lines of the constant cache.
struct CaptureLaunch {
  // Sizes of this launch: 32 bits, and no division before the first load.
  int batch;
  int heads;
  int key_heads;
  int group;  // heads of a key head
  int rows;
  int keys;
  int size;
  int padded;           // keys, rounded up to a tile of a warp
  int split_keys;       // a multiple of the keys that a block takes at a time
  int splits;
  int queries_at_once;  // queries of a key head that a block of the first kernel takes
  int query_blocks;
  float rows_inverse;   // 1 / rows
  Logit logit;
  int row_shift;        // of the second read: 2^row_shift rows in a tile
  int token_chunks;     // times 128 tokens are what a block of `capture_maps` takes
  int token_blocks;     // of the second kernel
  bool query_is_aligned;  // every query starts at a multiple of 16 bytes, is contiguous and near the next
  float* scores;        // [layers, batch, heads, rows, padded], or null
  float2* stats;        // [layers, batch, heads, rows, splits]: maximum, and sum of 2^(logit - maximum)
  float4* parts;        // [layers, batch, rows, token_blocks]: mass, entropy and number of a block's tokens
  const int32_t* span;  // the keys whose scores are stored; null: no scores are
  int64_t lse_rows;     // rows of `lse`
  CaptureParams params;  // its `layers` is null; `rows`, and all pointers, are those of the rows of this launch
  CaptureDevice device;
  CaptureLayer layers[kLayersAtOnce];
};
static_assert(sizeof(CaptureLaunch) <= 4096);

// The layer and the row of the batch of a block, from the last axis of the grid.
struct Problem {
  int layer;
  int batch;
  const CaptureLayer& arguments;

  __device__ __forceinline__ explicit Problem(const CaptureLaunch& launch)
      : layer(launch.batch == 1 ? blockIdx.z : blockIdx.z / static_cast<unsigned>(launch.batch)),
        batch(static_cast<int>(blockIdx.z) - layer * launch.batch),
        arguments(launch.layers[layer]) {}

  // The number of a (layer, row of the batch, head, row), and of a (layer, row of the batch, row).
  __device__ __forceinline__ int line(const CaptureLaunch& launch, int head, int row) const {
    return (static_cast<int>(blockIdx.z) * launch.heads + head) * launch.rows + row;
  }
  __device__ __forceinline__ int row_line(const CaptureLaunch& launch, int row) const {
    return static_cast<int>(blockIdx.z) * launch.rows + row;
  }
};

__device__ __forceinline__ int64_t index_at(const IndexMatrix& index, int64_t row, int64_t column) {
  const int64_t offset = row * index.strides[0] + column * index.strides[1];
  return index.is_int64 ? load(static_cast<const int64_t*>(index.data) + offset)
                        : load(static_cast<const int32_t*>(index.data) + offset);
}

// A token as a key, or -1 where it is padding.
__device__ __forceinline__ int key_of_token(const CaptureParams& p, int batch, int64_t token) {
  const int64_t key = token < p.token_count ? index_at(p.tokens, batch, token) : -1;
  return key >= 0 && key < p.keys ? static_cast<int>(key) : -1;
}

// The keys that positions and window make visible to a row, from `first` to `last`.
struct Visible {
  int first;
  int last;

  __device__ __forceinline__ bool has(int key) const { return key >= first && key <= last; }
};

__device__ __forceinline__ Visible visible_to(const CaptureParams& p, int batch, int row) {
  const int end = static_cast<int>(p.keys) - 1;
  if (p.positions.data == nullptr) return {0, end};
  const int64_t last = index_at(p.positions, batch, row), first = p.window == 0 ? 0 : last - p.window + 1;
  return {first < 0 ? 0 : first > end ? end + 1 : static_cast<int>(first),
          last > end ? end : last < 0 ? -1 : static_cast<int>(last)};
}

// A query of a group as head * rows + row: exact, since there are fewer than 2^22 of them and at most 4096 rows.
__device__ __forceinline__ void split_query(const CaptureLaunch& launch, int query, int& head, int& row) {
  head = static_cast<int>((static_cast<float>(query) + 0.5f) * launch.rows_inverse);
  row = query - head * launch.rows;
}

__device__ __forceinline__ bool mask_has(const CaptureParams& p, int batch, int head, int row, int key) {
  const int64_t* strides = p.mask_strides;
  return load(p.mask + batch * strides[0] + head * strides[1] + row * strides[2] + key * strides[3]) != 0;
}

// The launches of one element type and size of head; see stream.cuh, reread.cuh and plain.cu.
struct CaptureGrid {
  int layers;
  int64_t row_blocks;  // of the second read
  bool overlaps;       // the device overlaps dependent launches
};
void launch_stream_bfloat(const CaptureLaunch& launch, const CaptureGrid& grid);
void launch_stream_half(const CaptureLaunch& launch, const CaptureGrid& grid);
void launch_reread_bfloat(const CaptureLaunch& launch, const CaptureGrid& grid);
void launch_reread_half(const CaptureLaunch& launch, const CaptureGrid& grid);
void launch_plain(const CaptureLaunch& launch, const CaptureGrid& grid);
void launch_span(const CaptureLaunch& launch, int32_t* span);
void launch_maps(const CaptureLaunch& launch, const CaptureGrid& grid);

// What comes before the launches, on the host; see capture.cu.
// Whether every key of every layer starts at a multiple of 16 bytes and is whole vectors of them, with rows that
// 32 bits of stride reach.
bool keys_are_aligned(const CaptureParams& params);
// Throws std::runtime_error, which starts with the name of an operator, if a plan wants more memory than there is.
void check_memory(const char* name, const CapturePlan& plan, const CaptureDevice& device);
// The arguments of a plan's launches but those of `part_of`: some layers and rows, to which all pointers are moved.
CaptureLaunch whole_of(const CaptureParams& params, const CapturePlan& plan, const CaptureDevice& device);
CaptureLaunch part_of(const CaptureLaunch& all, const CaptureParams& params, int64_t first_layer, int64_t layers,
                      int64_t first_row, int64_t rows);

}  // namespace carve
