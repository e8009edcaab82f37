// Joins parts that touch across the edges of tiles and from a frame to the next one, and adds each to its region.

#include "cuda/regions/regions.cuh"
#include "cuda/regions/union.cuh"

namespace carve {
namespace {

// A thread has two pixels on both sides of an edge between tiles, and those before them along the edge.
__global__ void __launch_bounds__(kBlockThreads) join_kernel(const __grid_constant__ RegionsJob job) {
  start_next_launch();
  wait_for_launch();
  if (has_reason(job.state)) return;
  const DeviceParents parents{job.parents};
  const uint32_t width = job.width;
  const uint32_t upright = (width - 1) / kTileWidth * job.height;
  const uint32_t of_a_frame = upright + (job.height - 1) / kTileHeight * width;
  const uint32_t count = of_a_frame * job.frames;
  for (uint32_t number = blockIdx.x * kBlockThreads + threadIdx.x; number < count; number += gridDim.x * kBlockThreads) {
    const uint32_t frame = number / of_a_frame;
    const uint32_t index = number % of_a_frame;
    const bool is_upright = index < upright;
    const uint32_t length = is_upright ? job.height : width;
    const uint32_t edge = (is_upright ? index : index - upright) / length + 1;
    const uint32_t at = (is_upright ? index : index - upright) % length;
    const uint32_t across = is_upright ? 1 : width;
    const uint32_t along = is_upright ? width : 1;
    const int32_t* one = job.labels + frame * width * job.height + at * along + (edge * (is_upright ? kTileWidth : kTileHeight) - 1) * across;
    const int32_t* other = one + across;
    const int32_t parts[2] = {load_coherent(one), load_coherent(other)};
    const bool is_first = at == 0;
    const int32_t before[2] = {is_first ? kOff : load_coherent(one - along),
                               is_first ? kOff : load_coherent(other - along)};
    if (parts[0] != kOff && parts[1] != kOff) {
      if (parts[0] != before[0] || parts[1] != before[1]) join(parents, parts[0], parts[1]);
    } else if (job.has_corners && parts[0] != parts[1]) {
      // Over a corner, where no two of the four pixels touch otherwise.
      if (parts[0] != kOff && before[0] == kOff && before[1] != kOff) join(parents, parts[0], before[1]);
      if (parts[1] != kOff && before[1] == kOff && before[0] != kOff) join(parents, parts[1], before[0]);
    }
  }
}

// Joins the parts of each frame to those of the frame before. A thread has one pixel, and the pixel in its place in the
// frame before; where that is below the threshold, over corners, the eight around it. Otherwise they are of its region.
__global__ void __launch_bounds__(kBlockThreads) join_frames_kernel(const __grid_constant__ RegionsJob job) {
  start_next_launch();
  wait_for_launch();
  if (has_reason(job.state)) return;
  const DeviceParents parents{job.parents};
  const uint32_t size = job.width * job.height;
  const uint32_t count = job.count - size;
  for (uint32_t index = blockIdx.x * kBlockThreads + threadIdx.x; index < count; index += gridDim.x * kBlockThreads) {
    const int32_t* before = job.labels + index;
    const int32_t part = load_coherent(before + size);
    if (part == kOff) continue;
    const int32_t same = load_coherent(before);
    if (same != kOff) {
      // Where the pixels before them are of the same two parts, those join them.
      const bool is_first = index == 0 || load_coherent(before + size - 1) != part || load_coherent(before - 1) != same;
      if (is_first) join(parents, part, same);
      continue;
    }
    if (!job.has_corners) continue;
    const uint32_t x = index % job.width;
    const uint32_t y = index / job.width % job.height;
    int32_t joined = kOff;
    for (int down = y == 0 ? 0 : -1; down <= (y + 1 == job.height ? 0 : 1); ++down) {
      for (int right = x == 0 ? 0 : -1; right <= (x + 1 == job.width ? 0 : 1); ++right) {
        const int32_t other = load_coherent(before + down * static_cast<int>(job.width) + right);
        if (other == kOff || other == joined) continue;
        join(parents, part, other);
        joined = other;
      }
    }
  }
}

// Adds each part that is not the root of its region to the root, and lists the roots in any order. The lanes of a warp
// share one atomic addition.
__global__ void __launch_bounds__(kBlockThreads) add_kernel(const __grid_constant__ RegionsJob job) {
  start_next_launch();
  wait_for_launch();
  if (has_reason(job.state)) return;
  const uint32_t lane = lane_of_thread();
  const uint32_t parts = load_coherent(&job.state->parts);
  for (uint32_t start = blockIdx.x * kBlockThreads; start < parts; start += gridDim.x * kBlockThreads) {
    const uint32_t part = start + threadIdx.x;
    const uint32_t root = part < parts ? find_root(DeviceParents{job.parents}, static_cast<int32_t>(part)) : parts;
    const bool is_root = part < parts && part == root;
    const uint32_t roots = __ballot_sync(kAllLanes, is_root);
    uint32_t number = 0;
    if (lane == 0 && roots != 0) number = atomicAdd(&job.state->regions, static_cast<uint32_t>(__popc(roots)));
    number = __shfl_sync(kAllLanes, number, 0) + __popc(roots & ((1u << lane) - 1));
    if (is_root) store(job.roots + number, static_cast<int32_t>(part));
    if (is_root || part >= parts) continue;
    atomicMin(job.parents + part, static_cast<int32_t>(root));
    const Key amount = load_coherent(job.amounts + part);
    if (job.score == Score::kMax) {
      atomicMax(job.amounts + root, amount);
    } else {
      atomicAdd(job.amounts + root, amount);
    }
    if (job.counts_pixels) atomicAdd(job.pixels + root, load_coherent(job.pixels + part));
    atomicMin(job.firsts + root, load_coherent(job.firsts + part));
    atomicMin(job.left + root, load_coherent(job.left + part));
    atomicMax(job.right + root, load_coherent(job.right + part));
    atomicMax(job.bottom + root, load_coherent(job.bottom + part));
    if (!job.has_frames) continue;
    atomicMin(job.upper + root, load_coherent(job.upper + part));
    atomicMax(job.back + root, load_coherent(job.back + part));
  }
}

}  // namespace

void launch_join(const RegionsJob& job, int64_t most_parts, const RegionsLaunches& how) {
  const int64_t edges = (int64_t{(job.width - 1) / kTileWidth} * job.height +
                         int64_t{(job.height - 1) / kTileHeight} * job.width) * job.frames;
  launch(how.of("join_kernel", count_blocks(edges, kBlockThreads, how.most_blocks), kBlockThreads), join_kernel, job);
  if (job.frames > 1) {
    launch(how.of("join_frames_kernel", count_blocks(job.count, kBlockThreads, how.most_blocks), kBlockThreads),
           join_frames_kernel, job);
  }
  launch(how.of("add_kernel", count_blocks(most_parts, kBlockThreads, how.most_blocks), kBlockThreads), add_kernel, job);
}

}  // namespace carve
