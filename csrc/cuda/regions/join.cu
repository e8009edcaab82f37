// Joins parts that touch across the edges of tiles, and adds each to its region.

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
  const uint32_t count = upright + (job.height - 1) / kTileHeight * width;
  for (uint32_t index = blockIdx.x * kBlockThreads + threadIdx.x; index < count; index += gridDim.x * kBlockThreads) {
    const bool is_upright = index < upright;
    const uint32_t length = is_upright ? job.height : width;
    const uint32_t edge = (is_upright ? index : index - upright) / length + 1;
    const uint32_t at = (is_upright ? index : index - upright) % length;
    const uint32_t across = is_upright ? 1 : width;
    const uint32_t along = is_upright ? width : 1;
    const int32_t* one = job.labels + at * along + (edge * (is_upright ? kTileWidth : kTileHeight) - 1) * across;
    const int32_t* other = one + across;
    const int32_t parts[2] = {load_coherent(one), load_coherent(other)};
    const bool is_first = at == 0;
    const int32_t before[2] = {is_first ? kOff : load_coherent(one - along),
                               is_first ? kOff : load_coherent(other - along)};
    if (parts[0] != kOff && parts[1] != kOff) {
      if (parts[0] != before[0] || parts[1] != before[1]) join(parents, parts[0], parts[1]);
    } else if (job.is_eight && parts[0] != parts[1]) {
      // Over a corner, where no two of the four pixels touch otherwise.
      if (parts[0] != kOff && before[0] == kOff && before[1] != kOff) join(parents, parts[0], before[1]);
      if (parts[1] != kOff && before[1] == kOff && before[0] != kOff) join(parents, parts[1], before[0]);
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
    if (job.score == Score::kMean) atomicAdd(job.pixels + root, load_coherent(job.pixels + part));
    atomicMin(job.firsts + root, load_coherent(job.firsts + part));
    atomicMin(job.left + root, load_coherent(job.left + part));
    atomicMax(job.right + root, load_coherent(job.right + part));
    atomicMax(job.bottom + root, load_coherent(job.bottom + part));
  }
}

}  // namespace

void launch_join(const RegionsJob& job, int64_t most_regions, const RegionsLaunches& how) {
  const int64_t edges = int64_t{(job.width - 1) / kTileWidth} * job.height +
                        int64_t{(job.height - 1) / kTileHeight} * job.width;
  launch(how.of("join_kernel", count_blocks(edges, kBlockThreads, how.most_blocks), kBlockThreads), join_kernel, job);
  launch(how.of("add_kernel", count_blocks(most_regions, kBlockThreads, how.most_blocks), kBlockThreads), add_kernel,
         job);
}

}  // namespace carve
