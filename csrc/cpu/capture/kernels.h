// The inner loops of capture, compiled once for each set of instructions; capture.cpp drives them.
#pragma once

#include <cstdint>

#include "carve.h"
#include "cpu/simd/isa.h"

#define CARVE_INLINE_MEMBER inline __attribute__((always_inline))
#define CARVE_INLINE static CARVE_INLINE_MEMBER

namespace carve {

struct Float16 {
  uint16_t bits;
};

struct Bfloat16 {
  uint16_t bits;
};

// Keys are scored, and their exponentials taken, in chunks of this many with a maximum of their own. A chunk does not
// know of the others, so any thread may do it. 512 scores of a GQA group of 8 fit in an L1 of 32 KiB with room to spare.
constexpr int64_t kChunk = 512;
// The scores of a row are padded to a multiple of this: kernels write whole tiles.
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

// Scores of one row and chunk, to be replaced by 2^(logit - top). All logits that are kept are in base 2.
struct ChunkRow {
  float* scores;
  int64_t keys;
  int64_t first;        // the row sees keys [first, last) of the chunk
  int64_t last;
  const uint8_t* mask;  // [keys], or null
  float scale;
  float softcap;
  const char* ahead;  // fetched meanwhile, as many bytes as there are of scores; any address will do
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
  const float* factors;  // what they are of the probability, [heads, factor_stride] for each chunk
  int64_t head_stride;
  int64_t factor_stride;
  int64_t heads;
  const KeyRun* runs;
  int64_t run_count;
  float* sum;        // [tokens], zero before: the sum over the heads
  float* each;       // [heads, each_stride], or null
  int64_t each_stride;
};

struct MeanRow {
  const float* parts;  // [part_count, part_stride] sums over some heads, [tokens] each
  int64_t part_count;
  int64_t part_stride;
  int64_t tokens;
  int64_t used;  // tokens that are no padding
  float heads;
  float* mean;  // [tokens]; may be parts
};

struct Summary {
  float mass;
  float entropy;
};

struct CaptureKernels {
  ScoreKernels score[3];  // by Float
  Peak (*softmax)(const ChunkRow& row);
  // tops[chunk] becomes 2^(tops[chunk] - top) in place.
  void (*relate)(float* tops, int64_t count, float top);
  void (*gather)(const GatherRow& row);
  Summary (*mean)(const MeanRow& row);
};

const CaptureKernels& capture_kernels_plain();
#ifdef CARVE_X86
const CaptureKernels& capture_kernels_avx2();
const CaptureKernels& capture_kernels_avx512();
const CaptureKernels& capture_kernels_amx();
#endif

}  // namespace carve
