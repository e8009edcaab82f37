#include "cpu/contrast/resize.h"

#include <algorithm>
#include <cmath>
#include <utility>
#include <vector>

#include "cpu/parallel.h"
#include "cpu/simd/wide.h"

namespace carve {
namespace {

constexpr int64_t kWrittenPerPart = 1 << 17;

// The cells that each pixel of a line interpolates, with their weights: [count, pixels].
struct Taps {
  int64_t count;
  int64_t pixels;
  std::vector<int32_t> cells;
  std::vector<double> weights;
};

CARVE_INLINE void weigh_cells(double scale, int32_t in, int64_t tap, int64_t pixels, int32_t* __restrict cells,
                                     double* __restrict weights, double* __restrict totals) {
  const double support = scale > 1.0 ? scale : 1.0;
  for (int64_t pixel = 0; pixel < pixels; ++pixel) {
    const double center = scale * (static_cast<double>(pixel) + 0.5);
    const int32_t first = static_cast<int32_t>(center - support + 0.5);
    const int32_t cell = (first > 0 ? first : 0) + static_cast<int32_t>(tap);
    const double weight = 1.0 - std::fabs(static_cast<double>(cell) + 0.5 - center) / support;
    const bool counts = cell < in && weight > 0.0;
    // 0 * NaN is NaN: instead of a cell without weight, read the nearest one, which has weight anyway.
    const int32_t nearest = static_cast<int32_t>(center);
    cells[pixel] = counts ? cell : (nearest < in ? nearest : in - 1);
    weights[pixel] = counts ? weight : 0.0;
    totals[pixel] += counts ? weight : 0.0;
  }
}

// Bilinear weights, widened by the scale where the line shrinks.
Taps make_taps(Isa isa, int64_t in, int64_t out) {
  const double scale = static_cast<double>(in) / static_cast<double>(out);
  Taps taps;
  taps.count = static_cast<int64_t>(std::ceil(2.0 * std::max(scale, 1.0)));
  taps.pixels = out;
  taps.cells.resize(static_cast<size_t>(taps.count * out));
  taps.weights.resize(taps.cells.size());
  std::vector<double> totals(static_cast<size_t>(out), 0.0);
  run_wide(isa, [&]() CARVE_INLINE_LAMBDA {
    for (int64_t tap = 0; tap < taps.count; ++tap) {
      weigh_cells(scale, static_cast<int32_t>(in), tap, out, taps.cells.data() + tap * out,
                  taps.weights.data() + tap * out, totals.data());
    }
    for (int64_t tap = 0; tap < taps.count; ++tap) {
      double* weights = taps.weights.data() + tap * out;
      for (int64_t pixel = 0; pixel < out; ++pixel) weights[pixel] /= totals[pixel];
    }
  });
  return taps;
}

// [grid_h, grid_w] to [height, grid_w], where height < grid_h.
std::vector<double> shrink_rows(Isa isa, const double* grid, const ViewShape& view) {
  const Taps rows = make_taps(isa, view.grid_h, view.height);
  std::vector<double> shrunk(static_cast<size_t>(view.height * view.grid_w), 0.0);
  run_wide(isa, [&]() CARVE_INLINE_LAMBDA {
    for (int64_t y = 0; y < view.height; ++y) {
      double* __restrict to = shrunk.data() + y * view.grid_w;
      for (int64_t tap = 0; tap < rows.count; ++tap) {
        const double weight = rows.weights[tap * view.height + y];
        const double* __restrict from = grid + rows.cells[tap * view.height + y] * view.grid_w;
        for (int64_t x = 0; x < view.grid_w; ++x) to[x] += weight * from[x];
      }
    }
  });
  return shrunk;
}

// Interpolates one row of cells to a row of pixels.
CARVE_INLINE void widen(const double* __restrict cells, const Taps& taps, float* __restrict row) {
  const int64_t pixels = taps.pixels;
  const int32_t* __restrict left = taps.cells.data();
  const double* __restrict left_weights = taps.weights.data();
  if (taps.count == 2) {
    const int32_t* __restrict right = left + pixels;
    const double* __restrict right_weights = left_weights + pixels;
    for (int64_t x = 0; x < pixels; ++x) {
      row[x] = static_cast<float>(left_weights[x] * cells[left[x]] + right_weights[x] * cells[right[x]]);
    }
    return;
  }
  for (int64_t x = 0; x < pixels; ++x) {
    double sum = 0.0;
    for (int64_t tap = 0; tap < taps.count; ++tap) {
      sum += left_weights[tap * pixels + x] * cells[left[tap * pixels + x]];
    }
    row[x] = static_cast<float>(sum);
  }
}

CARVE_INLINE void blend(const float* __restrict above, const float* __restrict below, float above_weight,
                               float below_weight, int64_t pixels, float* __restrict out) {
  for (int64_t x = 0; x < pixels; ++x) out[x] = above_weight * above[x] + below_weight * below[x];
}

// The two widened rows of cells around the current row of pixels; going down, each row is widened once.
class WideRows {
 public:
  WideRows(Isa isa, const double* grid, int64_t grid_w, const Taps& columns)
      : isa_(isa), grid_(grid), grid_w_(grid_w), columns_(columns) {
    for (Row& row : rows_) row.pixels.resize(static_cast<size_t>(columns.pixels));
  }

  // The rows above and below; calls go from the top to the bottom.
  std::pair<const float*, const float*> at(int32_t above, int32_t below) {
    if (rows_[1].cell == above) std::swap(rows_[0], rows_[1]);
    fill(rows_[0], above);
    if (below == above) return {rows_[0].pixels.data(), rows_[0].pixels.data()};
    fill(rows_[1], below);
    return {rows_[0].pixels.data(), rows_[1].pixels.data()};
  }

 private:
  struct Row {
    int32_t cell = -1;
    std::vector<float> pixels;
  };

  void fill(Row& row, int32_t cell) {
    if (row.cell == cell) return;
    row.cell = cell;
    run_wide(isa_, [&]() CARVE_INLINE_LAMBDA { widen(grid_ + cell * grid_w_, columns_, row.pixels.data()); });
  }

  Isa isa_;
  const double* grid_;
  int64_t grid_w_;
  const Taps& columns_;
  Row rows_[2];
};

}  // namespace

void resize(Isa isa, const double* grid, const ViewShape& view, float* out) {
  std::vector<double> shrunk;
  int64_t grid_h = view.grid_h;
  if (grid_h > view.height) {
    shrunk = shrink_rows(isa, grid, view);
    grid = shrunk.data();
    grid_h = view.height;
  }
  const Taps columns = make_taps(isa, view.grid_w, view.width);
  const Taps rows = make_taps(isa, grid_h, view.height);
  parallel_for(view.height, kWrittenPerPart / view.width + 1, [&](int64_t begin, int64_t end) {
    WideRows wide(isa, grid, view.grid_w, columns);
    for (int64_t y = begin; y < end; ++y) {
      const auto [above, below] = wide.at(rows.cells[y], rows.cells[view.height + y]);
      const float above_weight = static_cast<float>(rows.weights[y]);
      const float below_weight = static_cast<float>(rows.weights[view.height + y]);
      float* row = out + y * view.width;
      run_wide(isa, [&, above = above, below = below]() CARVE_INLINE_LAMBDA {
        blend(above, below, above_weight, below_weight, view.width, row);
      });
    }
  });
}

}  // namespace carve
