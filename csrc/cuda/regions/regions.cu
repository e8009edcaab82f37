// Regions of a saliency on a GPU: values computed on the host, scratch memory, and the launches in their order.

#include <algorithm>
#include <cmath>

#include "cuda/regions/regions.cuh"

namespace carve {
namespace {

// Divides the scratch memory. Buffers of greater alignment have to be taken first.
class ScratchAllocator {
 public:
  explicit ScratchAllocator(void* scratch) : at_(static_cast<unsigned char*>(scratch)) {}

  template <class T>
  T* take(int64_t count) {
    T* buffer = reinterpret_cast<T*>(at_);
    at_ += count * static_cast<int64_t>(sizeof(T));
    return buffer;
  }

 private:
  unsigned char* at_;
};

// The position of NumPy's linear percentile among the sorted values. NumPy rounds the fraction and its complement to
// the dtype of the saliency and interpolates from the nearer end.
void set_threshold(const RegionsParams& p, RegionsJob& job) {
  const double last = static_cast<double>(job.count) - 1.0;
  const double position = last * (100.0 * (1.0 - p.keep) / 100.0);
  job.rank = static_cast<uint32_t>(std::min(std::floor(position), last));
  const double fraction = position - static_cast<double>(job.rank);
  job.from_above = fraction >= 0.5;
  job.weight = job.from_above ? 1.0 - fraction : fraction;
}

// The parts of all frames, each labelled by itself: as many as regions, or more.
int64_t count_most_parts(const RegionsParams& sizes) {
  RegionsParams frame = sizes;
  frame.frames = 1;
  return sizes.frames * count_most_regions(frame);
}

RegionsJob describe(const RegionsParams& p, const RegionsDevice& device, int64_t most_parts) {
  RegionsJob job{};
  job.saliency = p.saliency;
  job.count = static_cast<uint32_t>(p.frames * p.height * p.width);
  job.height = static_cast<uint32_t>(p.height);
  job.width = static_cast<uint32_t>(p.width);
  job.frames = static_cast<uint32_t>(p.frames);
  job.has_frames = p.has_frames;
  job.has_corners = p.has_corners();
  job.score = p.score;
  // Clipped, none is left out or all of them are.
  job.min_size = static_cast<uint32_t>(std::clamp<int64_t>(p.min_size, 1, int64_t{job.count} + 1));
  job.counts_pixels = p.score == Score::kMean || job.min_size > 1;
  job.keep = p.keep;
  job.top = p.top;
  job.floor = p.floor;
  job.mask = p.mask;
  job.boxes = p.boxes;
  job.scores = p.scores;
  job.outcome = device.outcome;
  job.outcome_rows = device.outcome_rows;
  int bits = 0;
  while (job.count >> bits != 0) ++bits;
  job.one = std::ldexp(1.0, std::min(36, 62 - bits));
  if (job.count > 0) set_threshold(p, job);

  ScratchAllocator scratch(device.scratch);
  job.state = scratch.take<RegionsState>(1);
  job.amounts = scratch.take<Key>(most_parts);
  for (Key*& keys : job.sorted_keys) keys = scratch.take<Key>(most_parts);
  for (int32_t*& firsts : job.sorted_firsts) firsts = scratch.take<int32_t>(most_parts);
  for (int32_t** numbers : {&job.parents, &job.firsts, &job.left, &job.right, &job.bottom}) {
    *numbers = scratch.take<int32_t>(most_parts);
  }
  if (p.has_frames) {
    for (int32_t** numbers : {&job.upper, &job.back}) *numbers = scratch.take<int32_t>(most_parts);
  }
  // In use until the regions are sorted for the first time, into buffer 0: the memory of buffer 1.
  job.pixels = reinterpret_cast<uint32_t*>(job.sorted_keys[1]);
  job.roots = job.sorted_firsts[1];
  job.labels = scratch.take<int32_t>(job.count);
  return job;
}

}  // namespace

int64_t count_most_regions(const RegionsParams& p) {
  // No two touch: the pixels of one colour of a checkerboard; over corners, those in every second frame, row and column.
  if (!p.has_corners()) return (p.frames * p.height * p.width + 1) / 2;
  return (p.frames + 1) / 2 * ((p.height + 1) / 2) * ((p.width + 1) / 2);
}

int64_t regions_cuda_scratch(const RegionsParams& p) {
  const int64_t part_bytes = 3 * sizeof(Key) + (p.has_frames ? 9 : 7) * sizeof(int32_t);
  return static_cast<int64_t>(sizeof(RegionsState)) + part_bytes * count_most_parts(p) +
         static_cast<int64_t>(sizeof(int32_t)) * p.frames * p.height * p.width;
}

void regions_cuda(const RegionsParams& params, const RegionsDevice& device) {
  const DeviceGuard guard(device.device);
  const RegionsLaunches how{static_cast<cudaStream_t>(device.stream), device.most_blocks,
                            overlaps_launches(device.device)};
  const int64_t most_parts = count_most_parts(params);
  const RegionsJob job = describe(params, device, most_parts);
  launch_select(job, params.is_double, how);
  if (job.count == 0) return;
  launch_label(job, params.is_double, how);
  launch_join(job, most_parts, how);
  launch_rank(job, params.is_double, count_most_regions(params), how);
}

}  // namespace carve
