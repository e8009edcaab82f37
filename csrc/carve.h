// The interface between the kernels, which include no header of torch, and the bindings that register operators.
#pragma once

#include <cstdint>

namespace carve {

enum class Normalize { kNone, kSum, kMax, kMinmax };

// A grid of tokens and the size of the image that it is resized to.
struct ViewShape {
  int64_t grid_h;
  int64_t grid_w;
  int64_t height;
  int64_t width;
};

// All arrays are contiguous and row-major; tokens and pixels of the views are concatenated in the order of `views`.
struct ContrastParams {
  const float* task;            // [layers, steps, tokens]
  const float* general;         // [layers, general_steps, tokens]
  const double* layer_weights;  // [layers]
  const double* step_weights;   // [steps]
  const ViewShape* views;       // [view_count]; tokens is the sum of grid_h * grid_w
  float* out;                   // the sum of height * width
  int64_t layers;
  int64_t steps;
  int64_t general_steps;  // steps, or 1: the same general map for every step
  int64_t tokens;
  int64_t view_count;
  double lam;
  bool lam_is_mean;  // use the mean of each general map over its tokens and ignore `lam`
  Normalize normalize;
};

void contrast_cpu(const ContrastParams& params);

// Further arguments of a contrast on a device. All arrays of ContrastParams but `views` are device memory.
struct ContrastDevice {
  // In elements, of a layer and a step of the maps, whose tokens are contiguous.
  int64_t task_strides[2];
  int64_t general_strides[2];
  void* scratch;  // aligned to 16 bytes; any contents
  int64_t scratch_bytes;
  int device;
  void* stream;
};

// The bytes of scratch of a contrast, from its numbers of layers, steps and tokens.
int64_t contrast_cuda_scratch(const ContrastParams& sizes);

// Launches the kernels and does not wait. Throws std::runtime_error if a launch fails, or for sizes that they cannot
// divide.
void contrast_cuda(const ContrastParams& params, const ContrastDevice& device);

enum class Float { kFloat32, kFloat16, kBfloat16 };

// A matrix of int32 or, where `is_int64`, int64; `data` is null where there is none.
struct IndexMatrix {
  const void* data;
  bool is_int64;
  int64_t strides[2];

  int64_t at(int64_t row, int64_t column) const {
    const int64_t offset = row * strides[0] + column * strides[1];
    return is_int64 ? static_cast<const int64_t*>(data)[offset] : static_cast<const int32_t*>(data)[offset];
  }
};

// The arguments that differ from layer to layer. Strides count elements.
struct CaptureLayer {
  const void* query;  // [batch, heads, rows, size]
  int64_t query_strides[4];
  const void* key;  // [batch, key_heads, keys, size]; the last stride is 1
  int64_t key_strides[3];
  const float* sink;  // [heads], or null
  float* maps;        // [batch, rows, tokens], or [batch, heads, rows, tokens] where `each`; the last stride is 1
  float* mass;        // [batch, rows]
  float* entropy;     // [batch, rows]
};

struct CaptureParams {
  const CaptureLayer* layers;
  int64_t layer_count;
  int64_t batch;
  int64_t heads;
  int64_t key_heads;
  int64_t rows;
  int64_t keys;
  int64_t size;
  int64_t token_count;
  Float type;             // of query and key
  IndexMatrix tokens;     // [batch, token_count]; a token outside [0, keys) is padding
  IndexMatrix positions;  // [batch, rows], the last key that a row sees, or none
  const uint8_t* mask;    // [batch, heads, rows, keys], or null
  int64_t mask_strides[4];
  const float* lse;  // [batch, heads, rows], dense, or null
  float scale;
  float softcap;   // 0: none
  int64_t window;  // 0: none; needs positions
  bool each;       // write a map for each head instead of their mean
  int64_t maps_strides[3];  // of batch, head and row
  int64_t mass_strides[2];  // of batch and row
  int64_t entropy_strides[2];
  int64_t threads;  // a hint; the result does not depend on it
};

void capture_cpu(const CaptureParams& params);

// The gradients of a loss with respect to the parts of a capture of one layer, and those that follow from them. All
// arrays are dense.
struct CaptureGradients {
  const float* maps;     // [batch, rows, tokens], or [batch, heads, rows, tokens] where `each`; null: zeros
  const float* mass;     // [batch, rows], or null: zeros
  const float* entropy;  // [batch, rows], or null: zeros
  float* query;          // [batch, heads, rows, size]
  float* key;            // [batch, key_heads, keys, size], or null: not computed
  float* sink;           // [heads], or null: not computed
  float* scratch;        // capture_backward_cpu_scratch floats, aligned to 64 bytes; any contents
};

// In floats: a few for each row, head and key, of as many rows as are computed at a time.
int64_t capture_backward_cpu_scratch(const CaptureParams& params);

// Reads no output of the layer. A log-sum-exp that is given is that of the logits, and changes with them.
void capture_backward_cpu(const CaptureParams& params, const CaptureGradients& gradients);

// The attention that each key gets from all rows. Of the capture, one layer's query, key and sink are read, and what the
// rows see; it writes `sums` instead of maps.
struct ColumnSumsParams {
  CaptureParams capture;
  float* sums;  // [batch, heads, keys], dense
};

void column_sums_cpu(const ColumnSumsParams& params);

// Further arguments of a capture on a device. All pointers, also those of CaptureParams, are device memory.
struct CaptureDevice {
  const int64_t* step;      // the step to write, or null for step 0, which the layers' outputs point to
  int64_t steps;            // 1 where `step` is null; a step outside [0, steps) is not written
  int64_t step_strides[3];  // of maps, mass and entropy
  int64_t token_stride;     // of maps
  const int32_t* span;      // [2], the lowest and the highest token in [0, keys) of the batch, or null: then it is sought
  void* scratch;            // aligned to 16 bytes; any contents
  int64_t scratch_bytes;
  unsigned* tickets;  // zeros; a call leaves zeros
  int64_t ticket_count;
  int device;
  void* stream;
};

// Throws std::runtime_error if a CUDA call fails, or if the scratch or the tickets are too few.
void capture_cuda(const CaptureParams& params, const CaptureDevice& device);

// What attention reads and writes beside a capture of one layer and one row.
struct AttentionValue {
  const void* value;         // [batch, key_heads, keys, size], of the type of the key; the last stride is 1
  int64_t value_strides[3];
  int64_t size;
  void* output;  // [batch, heads, size], of the type of the query; the last stride is 1
  int64_t output_strides[2];
};

// The output of attention, and the capture of its row, from one read of keys and values; errors as of capture_cuda.
void attend_cuda(const CaptureParams& params, const AttentionValue& value, const CaptureDevice& device);

enum class Score { kSum, kMean, kMax };

// Why there is no region.
enum class Reason { kNone, kEmpty, kNotFinite, kConstant, kNoPixel, kTooSmall };

// An image, or the frames of a video, whose regions go on from a frame to the next one.
struct RegionsParams {
  const void* saliency;  // [frames, height, width], contiguous; double where `is_double`, else float
  bool is_double;
  bool has_frames;  // boxes have edges in time; an image has one frame, and none
  int64_t frames;
  int64_t height;
  int64_t width;
  double keep;
  int64_t top;    // keep at most this many regions; 0: use `floor`
  int64_t floor;  // keep max(floor, int(count * keep)) regions
  int64_t connectivity;  // 4 or 8 in an image; 6 or 26 with frames
  Score score;
  int64_t min_size;  // regions of fewer pixels are left out before `top` and `floor` count them; up to 1: none
  int64_t capacity;  // rows of `boxes` and `scores`
  bool* mask;        // [frames, height, width]
  int64_t* boxes;    // [capacity, edges()], x0 y0 x1 y1 or, with frames, x0 y0 f0 x1 y1 f1, best first
  double* scores;    // [capacity]

  int64_t edges() const { return has_frames ? 6 : 4; }
  bool has_corners() const { return connectivity == 8 || connectivity == 26; }
  bool leaves_out() const { return min_size > 1; }
};

// The number of kept regions and the union of their boxes; without a region, the whole saliency and the reason.
struct RegionsOutcome {
  int64_t kept;
  Reason reason;
  int64_t box[6];  // as many edges as each box
};

// Throws std::runtime_error if more regions are to be kept than `capacity`.
RegionsOutcome regions_cpu(const RegionsParams& params);

// Further arguments of regions on a device. All arrays of RegionsParams are device memory.
struct RegionsDevice {
  int device;
  void* stream;
  void* scratch;     // regions_cuda_scratch(...) bytes, aligned to 16
  int64_t* outcome;  // [2 + edges + (edges + 1) * outcome_rows]: kept, reason and box of RegionsOutcome; then as below
  int64_t most_blocks;  // in a launch; the result does not depend on it
  // The first rows of `boxes` and then, as bits, of `scores` once more after the outcome: one copy to the host brings
  // all that most callers read there. Rows past the kept regions are not written. 0: none.
  int64_t outcome_rows;
};

// The largest number of regions that a saliency of this size can have, and the scratch that they take. Both read
// frames, height, width, has_frames and connectivity alone.
int64_t count_most_regions(const RegionsParams& sizes);
int64_t regions_cuda_scratch(const RegionsParams& sizes);

// Launches the kernels and does not wait. Throws std::runtime_error if a launch fails.
void regions_cuda(const RegionsParams& params, const RegionsDevice& device);

}  // namespace carve
