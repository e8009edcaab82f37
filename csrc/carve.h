// What the torch-free sources offer to the files that register operators.
#pragma once

#include <cstdint>

namespace carve {

enum class Normalize { kNone, kSum, kMax, kMinmax };

// One rectangle of tokens and the pixels that it is spread over.
struct ViewShape {
  int64_t grid_h;
  int64_t grid_w;
  int64_t height;
  int64_t width;
};

// All arrays are contiguous and row-major; the tokens of the views, and their pixels, stand one view after the other.
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
  bool lam_is_mean;  // lam is the mean of each general map over its tokens, and `lam` is not read
  Normalize normalize;
};

void contrast_cpu(const ContrastParams& params);

enum class Float { kFloat32, kFloat16, kBfloat16 };

// A matrix of int32 or int64, or none.
struct IndexMatrix {
  const void* data;
  bool wide;
  int64_t strides[2];

  int64_t at(int64_t row, int64_t column) const {
    const int64_t offset = row * strides[0] + column * strides[1];
    return wide ? static_cast<const int64_t*>(data)[offset] : static_cast<const int32_t*>(data)[offset];
  }
};

// What differs from layer to layer. Strides count elements.
struct CaptureLayer {
  const void* query;  // [batch, heads, rows, size]
  int64_t query_strides[4];
  const void* key;  // [batch, key_heads, keys, size], elements of a key side by side
  int64_t key_strides[3];
  const float* sink;  // [heads], or null
  float* maps;        // [batch, rows, tokens], or [batch, heads, rows, tokens] for each head; tokens side by side
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
  bool each;       // maps of each head and not of their mean
  int64_t maps_strides[3];  // of batch, head and row
  int64_t mass_strides[2];  // of batch and row
  int64_t entropy_strides[2];
  int64_t threads;  // a hint; the result is the same for any number
};

void capture_cpu(const CaptureParams& params);

// What a capture on a device needs besides. All pointers, those of CaptureParams too, are the device's.
struct CaptureDevice {
  const int64_t* step;      // the step to write, or null; the layers' outputs are those of step 0
  int64_t steps;            // 1 where there is no step; another step than these is not written
  int64_t step_strides[3];  // of maps, mass and entropy
  int64_t token_stride;     // of maps
  void* scratch;
  int64_t scratch_bytes;
  int device;
  void* stream;
};

// Throws std::runtime_error where CUDA refuses, or the scratch is too small.
void capture_cuda(const CaptureParams& params, const CaptureDevice& device);

enum class Score { kSum, kMean, kMax };

// Why there is no region.
enum class Reason { kNone, kEmpty, kNotFinite, kConstant, kNoPixel };

struct RegionsParams {
  const void* saliency;  // [height, width], contiguous; double where `is_double`, else float
  bool is_double;
  int64_t height;
  int64_t width;
  double keep;
  int64_t top;    // keep at most so many regions, or 0 for:
  int64_t floor;  // keep max(floor, int(count * keep)) regions
  int64_t connectivity;
  Score score;
  int64_t capacity;  // regions that `boxes` and `scores` have room for
  bool* mask;        // [height, width]
  int64_t* boxes;    // [capacity, 4], x0 y0 x1 y1, best first
  double* scores;    // [capacity]
};

// How many regions were kept, and the union of their boxes: the whole image where it is none, which has a reason.
struct RegionsOutcome {
  int64_t kept;
  Reason reason;
  int64_t box[4];
};

// Throws std::runtime_error where more regions are to be kept than there is room for.
RegionsOutcome regions_cpu(const RegionsParams& params);

// Where the regions are found on a device: all arrays of the params are the device's.
struct RegionsPlace {
  int device;
  void* stream;
  void* scratch;     // as many bytes as regions_cuda_scratch says, aligned to 16
  int64_t* outcome;  // [6]: kept, reason and box of RegionsOutcome
  int64_t most_blocks;  // of a launch; the result is the same for any number
};

// The most regions that a picture can have.
int64_t count_most_regions(int64_t height, int64_t width, int64_t connectivity);
int64_t regions_cuda_scratch(int64_t height, int64_t width, int64_t connectivity);

// Launches and does not wait. Throws std::runtime_error where CUDA does not take a launch.
void regions_cuda(const RegionsParams& params, const RegionsPlace& place);

}  // namespace carve
