// The inner loops of capture, compiled once for each instruction set; unit.cpp calls them.
#pragma once

#include <cstdint>

#include "carve.h"
#include "cpu/simd/inline.h"
#include "cpu/simd/isa.h"

namespace carve {

struct Float16 {
  uint16_t bits;
};

struct Bfloat16 {
  uint16_t bits;
};

// Keys are scored and exponentiated in chunks of this size, each with its own maximum. Chunks are independent, so any
// thread may process any of them. 512 scores of a GQA group of 8 take 16 KiB, half of an L1 of 32 KiB.
constexpr int64_t kChunk = 512;
// The scores of a row are padded to a multiple of this number: kernels write whole tiles.
constexpr int64_t kKeyTile = 64;

struct ScoreBlock {
  const void* key;
  int64_t key_stride;  // in elements
  int64_t keys;        // up to kChunk
  int64_t size;
  const void* query;  // as packed by ScoreKernels::pack
  int64_t rows;
  float* scores;   // [rows, stride]; written up to the next multiple of kKeyTile keys
  int64_t stride;
  float* panel;  // scratch of panel_floats(size)
};

struct ScoreKernels {
  int64_t (*packed_floats)(int64_t rows, int64_t size);
  int64_t (*panel_floats)(int64_t size);
  void (*pack)(const float* query, int64_t rows, int64_t size, float* packed);
  void (*scores)(const ScoreBlock& block);
};

// Scores of one row and chunk, which are replaced by 2^(logit - top). Stored logits are in base 2.
struct ChunkRow {
  float* scores;
  int64_t keys;
  int64_t first;        // keys [first, last) of the chunk are visible to the row
  int64_t last;
  const uint8_t* mask;  // [keys], or null
  float scale;
  float softcap;
  const char* prefetch;  // as many bytes as the scores have are prefetched from here; any address is allowed
  float* slopes;         // [keys], or null: where the slopes of the softcap are written, of hidden keys too
};

struct Peak {
  float top;
  float sum;
};

// Tokens [token, token + count) are the keys [key, key + count) of one chunk.
struct KeyRun {
  int64_t token;
  int64_t key;
  int64_t count;
};

struct GatherRow {
  const float* scores;   // exponentials [heads, head_stride] of one row
  const float* factors;  // [heads, factor_stride], one per chunk: probability = exponential * factor
  int64_t head_stride;
  int64_t factor_stride;
  int64_t heads;
  const KeyRun* runs;
  int64_t run_count;
  float* sum;        // [tokens], zero on entry: the sum over the heads
  float* each;       // [heads, each_stride], or null
  int64_t each_stride;
};

struct MeanRow {
  const float* sums;  // [sum_count, sum_stride], of [tokens] each: sums over a group of heads
  int64_t sum_count;
  int64_t sum_stride;
  int64_t tokens;
  int64_t used;  // tokens that are not padding
  float heads;
  float* mean;  // [tokens]; may alias `sums`
};

// Scores of one row and chunk, whose probabilities 2^((logit - peak) * factor + rest) are added to the sums of the keys;
// the factor turns scores into logits in base 2. The scores are overwritten.
struct ColumnRow {
  float* scores;
  int64_t first;        // keys [first, last) of the chunk are visible to the row
  int64_t last;
  const uint8_t* mask;  // as of ChunkRow
  float scale;
  float softcap;
  float peak;
  float rest;
  float* sums;  // as many as the scores
};

struct Summary {
  float mass;
  float entropy;
};

// The gradients of the products of one row, from exponentials [keys] of a chunk, which they replace.
struct ProductRow {
  float* values;
  int64_t keys;
  float factor;         // probability = exponential * factor
  const float* given;   // [keys]: the gradients of the loss with respect to the probabilities
  float total;          // the sum of probability * given over all keys of the row
  const float* slopes;  // [keys], or null: those of the softcap
  float scale;
};

// Rows of the query's gradient from the keys of a chunk. Keys that are not listed are never read.
struct QueryGradient {
  const void* key;
  int64_t key_stride;
  int64_t size;
  const int32_t* columns;
  int64_t count;        // of columns, at least 1
  const float* values;  // [rows, stride]: the gradients of the products
  int64_t stride;
  int64_t rows;
  float* out;  // [rows, size]
};

// Rows of the key's gradient from those of the query.
struct KeyGradient {
  const float* values;  // [rows, stride]: the gradients of the products
  int64_t stride;
  int64_t rows;
  const float* query;  // [rows, size]
  int64_t size;
  int64_t keys;
  bool adds;   // to what is there
  float* out;  // [keys, size]
};

struct GradientKernels {
  // The sum of exponential * given over a chunk.
  float (*weigh)(const float* values, const float* given, int64_t keys);
  void (*products)(const ProductRow& row);
  void (*query[3])(const QueryGradient& gradient);  // indexed by Float
  void (*key)(const KeyGradient& gradient);
};

struct CaptureKernels {
  ScoreKernels score[3];  // indexed by Float
  Peak (*softmax)(const ChunkRow& row);
  // tops[chunk] becomes 2^(tops[chunk] - top) in place.
  void (*relate)(float* tops, int64_t count, float top);
  void (*gather)(const GatherRow& row);
  Summary (*mean)(const MeanRow& row);
  GradientKernels gradient;
  void (*add_columns)(const ColumnRow& row);
};

const CaptureKernels& capture_kernels_plain();
#ifdef CARVE_X86
const CaptureKernels& capture_kernels_avx2();
const CaptureKernels& capture_kernels_avx512();
const CaptureKernels& capture_kernels_avx512_bf16();
const CaptureKernels& capture_kernels_amx();
#endif

// Those of the instruction set in use.
const CaptureKernels& active_kernels();

}  // namespace carve
