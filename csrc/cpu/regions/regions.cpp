// Regions of a saliency: threshold, connected runs, scores, the best regions, their mask and boxes.

#include "carve.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/regions/runs.h"
#include "cpu/regions/threshold.h"

namespace carve {
namespace {

// A constant map that was resized is constant up to a few rounding errors.
constexpr double kFlat = 16.0;

struct Region {
  int64_t box[6];  // x0 y0 f0 x1 y1 f1
  int64_t pixels;
  int64_t sum;
  double score;
};

// Union-find over runs. A parent never follows its child, so a root is the run with the region's first pixel.
class Forest {
 public:
  explicit Forest(size_t runs) : parents_(runs) { std::iota(parents_.begin(), parents_.end(), 0); }

  int32_t find(int32_t run) {
    while (parents_[run] != run) run = parents_[run] = parents_[parents_[run]];
    return run;
  }

  void join(int32_t one, int32_t other) {
    one = find(one);
    other = find(other);
    parents_[std::max(one, other)] = std::min(one, other);
  }

 private:
  std::vector<int32_t> parents_;
};

// Joins the runs of rows that are `distance` rows from each other, but for those of row `skipped` of each frame, which
// has no such neighbour.
void join_rows(const RegionsParams& p, const std::vector<PixelRun>& runs, int64_t distance, int64_t skipped,
               Forest& forest) {
  const int32_t reach = p.has_corners() ? 1 : 0;
  const size_t count = runs.size();
  size_t above = 0;
  for (size_t below = 0; below < count; ++below) {
    const int64_t row = runs[below].row;
    if (p.frames > 1 && row % p.height == skipped) continue;
    while (runs[above].row + distance < row) ++above;
    // A run above that ends before this run also ends before all following runs.
    while (runs[above].row + distance == row && runs[above].end + reach <= runs[below].begin) ++above;
    for (size_t near = above; runs[near].row + distance == row && runs[near].begin < runs[below].end + reach; ++near) {
      forest.join(static_cast<int32_t>(near), static_cast<int32_t>(below));
    }
  }
}

// The rows of all frames follow each other: the same row of the frame before is `height` rows above.
void join_all(const RegionsParams& p, const std::vector<PixelRun>& runs, Forest& forest) {
  constexpr int64_t kNone = -1;
  join_rows(p, runs, 1, 0, forest);
  if (p.frames == 1) return;
  join_rows(p, runs, p.height, kNone, forest);
  if (!p.has_corners() || p.height == 1) return;
  join_rows(p, runs, p.height - 1, p.height - 1, forest);
  join_rows(p, runs, p.height + 1, 0, forest);
}

// The regions in the order of their first pixels; `owners` is the number of each run's region.
std::vector<Region> collect(const RegionsParams& p, const std::vector<PixelRun>& runs, Forest& forest,
                            std::vector<int32_t>& owners) {
  std::vector<Region> regions;
  owners.resize(runs.size());
  for (size_t index = 0; index < runs.size(); ++index) {
    const PixelRun& run = runs[index];
    const int64_t frame = p.frames > 1 ? run.row / p.height : 0;
    const int64_t row = run.row - frame * p.height;
    const size_t root = static_cast<size_t>(forest.find(static_cast<int32_t>(index)));
    if (root == index) {
      owners[index] = static_cast<int32_t>(regions.size());
      regions.push_back(
          {{run.begin, row, frame, run.end, row + 1, 0}, 0, 0, -std::numeric_limits<double>::infinity()});
    }
    owners[index] = owners[root];
    Region& region = regions[owners[index]];
    region.box[0] = std::min<int64_t>(region.box[0], run.begin);
    region.box[1] = std::min(region.box[1], row);
    region.box[3] = std::max<int64_t>(region.box[3], run.end);
    region.box[4] = std::max(region.box[4], row + 1);
    region.box[5] = frame + 1;
    region.pixels += run.end - run.begin;
    region.sum += run.sum;
    region.score = std::max(region.score, run.peak);
  }
  return regions;
}

// The numbers of the kept regions, best first.
std::vector<int32_t> rank(const RegionsParams& p, const FixedPoint& fixed, std::vector<Region>& regions) {
  for (Region& region : regions) {
    if (p.score == Score::kMax) continue;
    region.score = static_cast<double>(region.sum) / fixed.one * fixed.peak;
    if (p.score == Score::kMean) region.score /= static_cast<double>(region.pixels);
  }
  std::vector<int32_t> order(regions.size());
  std::iota(order.begin(), order.end(), 0);
  if (p.leaves_out()) {
    const auto is_small = [&](int32_t number) { return regions[number].pixels < p.min_size; };
    order.erase(std::remove_if(order.begin(), order.end(), is_small), order.end());
  }
  const int64_t count = static_cast<int64_t>(order.size());
  const int64_t share = static_cast<int64_t>(static_cast<double>(count) * p.keep);
  const int64_t kept = std::min(count, p.top > 0 ? p.top : std::max(p.floor, share));
  // Sums are compared as integers: two different ones may round to the same score.
  const auto is_better = [&](int32_t one, int32_t other) {
    const Region& a = regions[one];
    const Region& b = regions[other];
    if (p.score == Score::kSum) return a.sum != b.sum ? a.sum > b.sum : one < other;
    return a.score != b.score ? a.score > b.score : one < other;
  };
  std::nth_element(order.begin(), order.begin() + kept, order.end(), is_better);
  std::sort(order.begin(), order.begin() + kept, is_better);
  order.resize(static_cast<size_t>(kept));
  return order;
}

// The edges of a box that are written; returns what follows them.
int64_t* write_box(const RegionsParams& p, const int64_t (&box)[6], int64_t* to) {
  for (int edge = 0; edge < 6; ++edge) {
    if (p.has_frames || edge % 3 != 2) *to++ = box[edge];
  }
  return to;
}

RegionsOutcome write_whole(const RegionsParams& p, Reason reason) {
  std::fill(p.mask, p.mask + p.frames * p.height * p.width, true);
  RegionsOutcome outcome{0, reason, {}};
  write_box(p, {0, 0, 0, p.width, p.height, p.frames}, outcome.box);
  return outcome;
}

RegionsOutcome write_boxes(const RegionsParams& p, const std::vector<Region>& regions,
                           const std::vector<int32_t>& kept) {
  if (static_cast<int64_t>(kept.size()) > p.capacity) {
    throw std::runtime_error("regions_cpu: boxes: expected at least " + std::to_string(kept.size()) + " rows");
  }
  RegionsOutcome outcome{static_cast<int64_t>(kept.size()), Reason::kNone, {}};
  int64_t all[6] = {p.width, p.height, p.frames, 0, 0, 0};
  int64_t* box = p.boxes;
  double* score = p.scores;
  for (const int32_t number : kept) {
    const Region& region = regions[number];
    box = write_box(p, region.box, box);
    *score++ = region.score;
    for (int edge : {0, 1, 2}) all[edge] = std::min(all[edge], region.box[edge]);
    for (int edge : {3, 4, 5}) all[edge] = std::max(all[edge], region.box[edge]);
  }
  write_box(p, all, outcome.box);
  return outcome;
}

void write_mask(const RegionsParams& p, const std::vector<PixelRun>& runs, const std::vector<int32_t>& owners,
                size_t region_count, const std::vector<int32_t>& kept) {
  std::vector<bool> chosen(region_count, false);
  for (const int32_t number : kept) chosen[number] = true;
  std::fill(p.mask, p.mask + p.frames * p.height * p.width, false);
  for (size_t index = 0; index < runs.size(); ++index) {
    const PixelRun& run = runs[index];
    bool* row = p.mask + run.row * p.width;
    if (chosen[owners[index]]) std::fill(row + run.begin, row + run.end, true);
  }
}

template <class T>
RegionsOutcome find_regions(const RegionsParams& p) {
  const Isa isa = active_isa();
  const T* values = static_cast<const T*>(p.saliency);
  const int64_t count = p.frames * p.height * p.width;
  if (count == 0) return write_whole(p, Reason::kEmpty);
  const Range<T> range = find_range(isa, values, count);
  if (!range.is_finite) return write_whole(p, Reason::kNotFinite);
  const double low = range.low;
  const double high = range.high;
  const double largest = std::max(std::abs(low), std::abs(high));
  const double eps = std::numeric_limits<T>::epsilon();
  if (high - low <= kFlat * eps * largest) return write_whole(p, Reason::kConstant);

  int bits = 0;
  while (count >> bits != 0) ++bits;
  const FixedPoint fixed{largest, std::ldexp(1.0, std::min(36, 62 - bits))};
  const T threshold = find_threshold(isa, values, count, range, p.keep);
  const std::vector<PixelRun> runs = find_runs(isa, values, p.frames * p.height, p.width, threshold, p.score, fixed);
  // The range of extreme values overflows to an infinite threshold, which may exceed every value.
  if (runs.empty()) return write_whole(p, Reason::kNoPixel);

  Forest forest(runs.size());
  join_all(p, runs, forest);
  std::vector<int32_t> owners;
  std::vector<Region> regions = collect(p, runs, forest, owners);
  const std::vector<int32_t> kept = rank(p, fixed, regions);
  if (kept.empty()) return write_whole(p, Reason::kTooSmall);
  write_mask(p, runs, owners, regions.size(), kept);
  return write_boxes(p, regions, kept);
}

}  // namespace

RegionsOutcome regions_cpu(const RegionsParams& params) {
  return params.is_double ? find_regions<double>(params) : find_regions<float>(params);
}

}  // namespace carve
