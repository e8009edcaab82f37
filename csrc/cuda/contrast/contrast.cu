// Contrast on a GPU: how the work is divided, and the launches.

#include <algorithm>
#include <stdexcept>
#include <string>

#include "cuda/contrast/contrast.cuh"

namespace carve {
namespace {

void check(bool holds, const char* message) {
  if (!holds) throw std::runtime_error(std::string("contrast_cuda: ") + message);
}

int64_t divide_up(int64_t value, int64_t by) { return (value + by - 1) / by; }

int64_t count_chunks(int64_t maps) {
  return std::min(std::max(std::min(maps, kFewChunks), divide_up(maps, kMapsAtOnce)), kMostChunks);
}

int64_t maps_of_chunk(int64_t maps) { return divide_up(maps, count_chunks(maps)); }

GridLaunch describe(const ContrastParams& p, const ContrastDevice& device) {
  GridLaunch launch{};
  launch.task = p.task;
  launch.general = p.general;
  std::copy_n(device.task_strides, 2, launch.task_strides);
  launch.general_strides[0] = device.general_strides[0];
  launch.general_strides[1] = p.general_steps == 1 ? 0 : device.general_strides[1];
  launch.task_jump = launch.task_strides[0] - (p.steps - 1) * launch.task_strides[1];
  launch.general_jump = launch.general_strides[0] - (p.steps - 1) * launch.general_strides[1];
  launch.layer_weights = p.layer_weights;
  launch.step_weights = p.step_weights;
  launch.partials = static_cast<float*>(device.scratch);
  launch.maps = static_cast<int>(p.layers * p.steps);
  launch.steps = static_cast<int>(p.steps);
  launch.tokens = static_cast<int>(p.tokens);
  launch.maps_of_chunk = static_cast<int>(maps_of_chunk(p.layers * p.steps));
  const int64_t blocks = divide_up(p.tokens, kContrastThreads);
  const int64_t together = p.lam_is_mean ? divide_up(blocks, kMostTokenBlocks) : 1;
  launch.tokens_of_block = static_cast<int>(together * kContrastThreads);
  launch.lam = static_cast<float>(p.lam);
  return launch;
}

// The most cells that `pixels` neighbouring pixels of an axis read.
int64_t cells_of(int64_t pixels, int64_t all_cells, int64_t all_pixels) {
  const int64_t taps = divide_up(2 * std::max(all_cells, all_pixels), all_pixels);
  return std::min(all_cells, divide_up((pixels - 1) * all_cells, all_pixels) + 1 + taps);
}

// The tiles of a view. A block takes as many rows as its threads reach at once, or more where blocks are many.
PixelView describe(const ViewShape& shape, float* out, int64_t first_token, bool is_normalized) {
  PixelView view{};
  view.out = out;
  view.grid_h = static_cast<int>(shape.grid_h);
  view.grid_w = static_cast<int>(shape.grid_w);
  view.height = static_cast<int>(shape.height);
  view.width = static_cast<int>(shape.width);
  view.first_token = static_cast<int>(first_token);
  view.is_vector = shape.width % kQuad == 0 && reinterpret_cast<uintptr_t>(out) % 16 == 0;
  const int64_t all_quads = divide_up(shape.width, kQuad);
  int64_t across = divide_up(all_quads, kContrastThreads), quads = 0, cells = 0;
  for (;; across *= 2) {
    quads = divide_up(all_quads, across);
    cells = cells_of(kQuad * quads, shape.grid_w, shape.width);
    if (cells <= kMostBlended || quads == 1) break;
  }
  check(cells <= kMostBlended, "shapes: expected views of at most 10240 tokens to four pixels of a row");
  const int64_t at_once = kContrastThreads / quads;
  const int64_t wanted = is_normalized ? kWantedBlocks / 2 : kWantedBlocks;
  const int64_t rows = std::min(shape.height * across / wanted, kMostTileRows);
  view.across = static_cast<int>(divide_up(all_quads, quads));
  view.quads = static_cast<int>(quads);
  view.most_cells = static_cast<int>(cells);
  view.rows = static_cast<int>(std::min(std::max(divide_up(rows, at_once), int64_t{1}) * at_once,
                                        std::min(shape.height, kMostBlended / cells)));
  return view;
}

}  // namespace

int64_t contrast_cuda_scratch(const ContrastParams& sizes) {
  return count_chunks(sizes.layers * sizes.steps) * sizes.tokens * static_cast<int64_t>(sizeof(float));
}

void contrast_cuda(const ContrastParams& p, const ContrastDevice& device) {
  const int64_t maps = p.layers * p.steps;
  if (p.tokens == 0) return;
  check(maps > 0 && maps_of_chunk(maps) <= kMostMapsOfChunk, "task: expected 1 to 131072 layers and steps");
  const int64_t bytes = contrast_cuda_scratch(p);
  if (device.scratch_bytes < bytes) {
    throw std::runtime_error("contrast_cuda: scratch: expected at least " + std::to_string(bytes) + " bytes, got " +
                             std::to_string(device.scratch_bytes));
  }
  check(reinterpret_cast<uintptr_t>(device.scratch) % 16 == 0, "scratch: expected 16 bytes of alignment");
  check(p.tokens <= kMostCellsTimesPixels, "task: expected at most 2^28 tokens");
  for (int64_t index = 0; index < p.view_count; ++index) {
    const ViewShape& shape = p.views[index];
    check(shape.grid_h <= kMostCellsTimesPixels / shape.height && shape.grid_w <= kMostCellsTimesPixels / shape.width,
          "shapes: expected tokens times pixels below 2^28 on each axis");
  }
  const DeviceGuard guard(device.device);
  ContrastGrid how{};
  how.stream = static_cast<cudaStream_t>(device.stream);
  how.overlaps = overlaps_launches(device.device);
  const GridLaunch grid = describe(p, device);
  how.blocks = dim3(static_cast<unsigned>(divide_up(p.tokens, grid.tokens_of_block)),
                    static_cast<unsigned>(divide_up(maps, grid.maps_of_chunk)));
  launch_grid(grid, p.lam_is_mean, how);

  PixelsLaunch pixels{};
  pixels.partials = grid.partials;
  pixels.chunks = static_cast<int>(how.blocks.y);
  pixels.tokens = grid.tokens;
  pixels.normalize = p.normalize;
  int64_t first_token = 0;
  float* out = p.out;
  for (int64_t first = 0; first < p.view_count; first += kViewsAtOnce) {
    pixels.views = static_cast<int>(std::min(p.view_count - first, int64_t{kViewsAtOnce}));
    int64_t blocks = 0, blended = 0;
    for (int index = 0; index < pixels.views; ++index) {
      const ViewShape& shape = p.views[first + index];
      PixelView& view = pixels.view[index];
      view = describe(shape, out, first_token, p.normalize != Normalize::kNone);
      view.first_block = static_cast<int>(blocks);
      blocks += view.across * divide_up(shape.height, view.rows);
      check(blocks <= 0x7fffffff, "shapes: expected tiles of pixels that fit into a grid");
      blended = std::max(blended, int64_t{view.rows} * view.most_cells);
      first_token += shape.grid_h * shape.grid_w;
      out += shape.height * shape.width;
    }
    how.blocks = dim3(static_cast<unsigned>(blocks));
    launch_pixels(pixels, blended, how);
  }
}

}  // namespace carve
