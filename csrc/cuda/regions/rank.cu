// Sorts the regions from the best to the worst, keeps the best and writes the mask.

#include "cuda/regions/regions.cuh"

namespace carve {
namespace {

// Tiles of 2^10 regions are sorted in shared memory: 12 bytes each are 12 KB per block, and 512 threads have a pair
// each. Then runs are merged 128 at a time: 2^10 -> 2^17 -> 2^24 -> 2^31 regions, so an image takes at most three
// launches and a smooth one with few regions none. An element finds its position by searching the other runs of its
// group.
constexpr uint32_t kTile = 1 << 10;
constexpr int kTileThreads = kTile / 2;
constexpr uint32_t kFan = 128;

struct TileShared {
  Key keys[kTile];
  int32_t firsts[kTile];
};

// The score of a region as an integer that is less for a better one. Sums are compared as integers: two different ones
// may round to the same score.
template <class T>
__device__ __forceinline__ double score_of_sum(const RegionsJob& job, Key sum) {
  return __dmul_rn(__ddiv_rn(static_cast<double>(static_cast<long long>(sum)), job.one), peak_of<T>(job.state));
}

template <class T>
__device__ __forceinline__ Key rank_key(const RegionsJob& job, uint32_t number) {
  const Key measured = load_coherent(job.keys[0] + number);
  if (job.score == Score::kMax) return ~measured;
  if (job.score == Score::kSum) return ~(measured ^ Key(1) << 63);
  return ~key_of(__ddiv_rn(score_of_sum<T>(job, measured), static_cast<double>(load(job.pixels + number))));
}

template <class T>
__device__ __forceinline__ double score_of_key(const RegionsJob& job, Key key) {
  return job.score == Score::kSum ? score_of_sum<T>(job, ~key ^ Key(1) << 63) : value_of<double>(~key);
}

__device__ __forceinline__ bool is_better(Key key, int32_t first, Key other_key, int32_t other_first) {
  return key != other_key ? key < other_key : first < other_first;
}

// A bitonic network over the least power of two that holds the tile.
template <class T>
__global__ void __launch_bounds__(kTileThreads) sort_tiles_kernel(const __grid_constant__ RegionsJob job) {
  auto& tile = block_shared<TileShared>();
  if (has_reason(job.state)) return;
  const uint32_t regions = load(&job.state->regions);
  for (uint32_t start = blockIdx.x * kTile; start < regions; start += gridDim.x * kTile) {
    const uint32_t size = regions - start < kTile ? regions - start : kTile;
    const uint32_t padded = size < 2 ? 2 : 1u << (32 - __clz(static_cast<int>(size - 1)));
    for (uint32_t index = threadIdx.x; index < padded; index += kTileThreads) {
      tile.keys[index] = index < size ? rank_key<T>(job, start + index) : ~Key(0);
      tile.firsts[index] = index < size ? load_coherent(job.firsts[0] + start + index) : INT32_MAX;
    }
    __syncthreads();
    for (uint32_t width = 2; width <= padded; width *= 2) {
      for (uint32_t distance = width / 2; distance > 0; distance /= 2) {
        const uint32_t low = 2 * threadIdx.x - (threadIdx.x & (distance - 1));
        const uint32_t high = low + distance;
        if (high < padded) {
          const Key keys[2] = {tile.keys[low], tile.keys[high]};
          const int32_t firsts[2] = {tile.firsts[low], tile.firsts[high]};
          const bool is_rising = (low & width) == 0;
          if (is_better(keys[1], firsts[1], keys[0], firsts[0]) == is_rising) {
            tile.keys[low] = keys[1], tile.keys[high] = keys[0];
            tile.firsts[low] = firsts[1], tile.firsts[high] = firsts[0];
          }
        }
        __syncthreads();
      }
    }
    // No barrier: a thread loads the next tile into the same elements that it stores here.
    for (uint32_t index = threadIdx.x; index < size; index += kTileThreads) {
      store(job.keys[0] + start + index, tile.keys[index]);
      store(job.firsts[0] + start + index, tile.firsts[index]);
    }
  }
}

__device__ __forceinline__ uint32_t count_better(const Key* keys, const int32_t* firsts, uint32_t size, Key key,
                                                 int32_t first) {
  uint32_t low = 0;
  uint32_t high = size;
  while (low < high) {
    const uint32_t middle = (low + high) / 2;
    const Key other = load(keys + middle);
    const bool is_before = other != key ? other < key : load(firsts + middle) < first;
    low = is_before ? middle + 1 : low;
    high = is_before ? high : middle;
  }
  return low;
}

// Merges sorted runs of one length, kFan at a time, from one buffer into the other; a single run stays.
__global__ void __launch_bounds__(kBlockThreads)
    merge_kernel(const __grid_constant__ RegionsJob job, uint32_t run, int from) {
  const uint32_t regions = load(&job.state->regions);
  if (has_reason(job.state) || regions <= run) return;
  const Key* keys = job.keys[from];
  const int32_t* firsts = job.firsts[from];
  const int64_t group_size = static_cast<int64_t>(run) * kFan;
  for (uint32_t index = blockIdx.x * kBlockThreads + threadIdx.x; index < regions; index += gridDim.x * kBlockThreads) {
    const Key key = load(keys + index);
    const int32_t first = load(firsts + index);
    const int64_t group = index / group_size * group_size;
    const int64_t end = group + group_size < regions ? group + group_size : regions;
    const int64_t own_run = index / run * run;
    int64_t sorted = group + (index - own_run);
    for (int64_t start = group; start < end; start += run) {
      if (start == own_run) continue;
      const uint32_t size = static_cast<uint32_t>(end - start < run ? end - start : run);
      sorted += count_better(keys + start, firsts + start, size, key, first);
    }
    store(job.keys[1 - from] + sorted, key);
    store(job.firsts[1 - from] + sorted, first);
  }
}

__device__ __forceinline__ void widen(int64_t* edge, int64_t to, bool is_least) {
  auto* address = reinterpret_cast<long long*>(edge);
  const long long value = to;
  const long long before = load_coherent(address);
  if (is_least && value < before) atomicMin(address, value);
  if (!is_least && value > before) atomicMax(address, value);
}

// One thread per kept region.
template <class T>
__global__ void __launch_bounds__(kBlockThreads) keep_kernel(const __grid_constant__ RegionsJob job) {
  if (has_reason(job.state)) return;
  const int64_t regions = load(&job.state->regions);
  const int64_t share = static_cast<int64_t>(__dmul_rn(static_cast<double>(regions), job.keep));
  const int64_t limit = job.top > 0 ? job.top : job.floor > share ? job.floor : share;
  const int64_t kept = limit < regions ? limit : regions;
  int from = 0;
  for (int64_t run = kTile; run < regions; run *= kFan) from = 1 - from;
  if (blockIdx.x == 0 && threadIdx.x == 0) store(job.outcome, kept);
  for (int64_t index = blockIdx.x * kBlockThreads + threadIdx.x; index < kept; index += gridDim.x * kBlockThreads) {
    const int32_t first = load(job.firsts[from] + index);
    const int32_t number = ~load(job.labels + first);
    const int64_t box[4] = {load_coherent(job.left + number), first / static_cast<int32_t>(job.width),
                            load(job.right + number), load(job.bottom + number)};
    store(job.left + number, kChosen);
    store(job.scores + index, score_of_key<T>(job, load(job.keys[from] + index)));
#pragma unroll
    for (int edge = 0; edge < 4; ++edge) {
      store(job.boxes + 4 * index + edge, box[edge]);
      widen(job.outcome + 2 + edge, box[edge], edge < 2);
    }
  }
}

// One thread per pixel, which is at most two steps from the number of its region.
__global__ void __launch_bounds__(kBlockThreads) mask_kernel(const __grid_constant__ RegionsJob job) {
  const bool is_whole = has_reason(job.state);
  for (uint32_t pixel = blockIdx.x * kBlockThreads + threadIdx.x; pixel < job.count;
       pixel += gridDim.x * kBlockThreads) {
    bool is_kept = is_whole;
    if (!is_whole) {
      int32_t label = load(job.labels + pixel);
      while (label >= 0) label = load(job.labels + label);
      is_kept = label != kOff && load(job.left + ~label) == kChosen;
    }
    store(job.mask + pixel, is_kept);
  }
}

template <class T>
void launch_all(const RegionsJob& job, int64_t most_regions, const RegionsLaunches& how) {
  launch({"sort_tiles_kernel", count_blocks(most_regions, kTile, how.most_blocks), kTileThreads, sizeof(TileShared),
          how.stream},
         sort_tiles_kernel<T>, job);
  int from = 0;
  for (int64_t run = kTile; run < most_regions; run *= kFan) {
    launch({"merge_kernel", count_blocks(most_regions, kBlockThreads, how.most_blocks), kBlockThreads, 0, how.stream},
           merge_kernel, job, static_cast<uint32_t>(run), from);
    from = 1 - from;
  }
  const int64_t share = static_cast<int64_t>(static_cast<double>(most_regions) * job.keep);
  const int64_t limit = job.top > 0 ? job.top : job.floor > share ? job.floor : share;
  launch({"keep_kernel", count_blocks(limit < most_regions ? limit : most_regions, kBlockThreads, how.most_blocks),
          kBlockThreads, 0, how.stream},
         keep_kernel<T>, job);
  launch({"mask_kernel", count_blocks(job.count, kBlockThreads, kSteps * how.most_blocks), kBlockThreads, 0,
          how.stream},
         mask_kernel, job);
}

}  // namespace

void launch_rank(const RegionsJob& job, bool is_double, int64_t most_regions, const RegionsLaunches& how) {
  is_double ? launch_all<double>(job, most_regions, how) : launch_all<float>(job, most_regions, how);
}

}  // namespace carve
