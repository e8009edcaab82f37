// Sorts the regions from the best to the worst, keeps the best and writes the mask.

#include <cmath>

#include "cuda/regions/regions.cuh"

// The tests merge a few runs in several launches.
#ifndef CARVE_MOST_RUNS
#define CARVE_MOST_RUNS 256
#endif

namespace carve {
namespace {

// Tiles of 2^11 regions are sorted in shared memory: 12 bytes each are 24 KB per block, and 512 threads have two pairs
// each. Then runs are merged, all of an image of up to 2^19 regions by one launch, and a smooth one with few regions
// by none. An element finds its position by searching the other runs of its group.
constexpr uint32_t kTile = 1 << 11;
constexpr int kTileThreads = kTile / 4;
constexpr int64_t kMostRuns = CARVE_MOST_RUNS;  // of a group: a thread of a block for each
static_assert(kMostRuns > 1 && kMostRuns <= kBlockThreads);

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
__device__ __forceinline__ Key rank_key(const RegionsJob& job, int32_t number) {
  const Key measured = load_settled(job.amounts + number);
  if (job.score == Score::kMax) return ~measured;
  if (job.score == Score::kSum) return ~(measured ^ Key(1) << 63);
  return ~key_of(__ddiv_rn(score_of_sum<T>(job, measured), static_cast<double>(load_settled(job.pixels + number))));
}

template <class T>
__device__ __forceinline__ double score_of_key(const RegionsJob& job, Key key) {
  return job.score == Score::kSum ? score_of_sum<T>(job, ~key ^ Key(1) << 63) : value_of<double>(~key);
}

struct Ranked {
  Key key;
  int32_t first;
};

__device__ __forceinline__ bool is_better(Key key, int32_t first, Key other_key, int32_t other_first) {
  return key != other_key ? key < other_key : first < other_first;
}

// Of a region that is left out: no score of finite values has it, and it is less than that of no region.
constexpr Key kLeftOut = ~Key(0);

__device__ __forceinline__ uint32_t count_kept(const RegionsJob& job, uint32_t found) {
  const uint32_t regions = job.leaves_out() ? load_coherent(&job.state->large) : found;
  const int64_t share = static_cast<int64_t>(__dmul_rn(static_cast<double>(regions), job.keep));
  const int64_t limit = job.top > 0 ? job.top : job.floor > share ? job.floor : share;
  return limit < regions ? static_cast<uint32_t>(limit) : regions;
}

// A bitonic network over the least power of two that holds the tile.
template <class T>
__global__ void __launch_bounds__(kTileThreads) sort_tiles_kernel(const __grid_constant__ RegionsJob job) {
  auto& tile = block_shared<TileShared>();
  start_next_launch();
  wait_for_launch();
  if (has_reason(job.state)) return;
  const uint32_t regions = load_coherent(&job.state->regions);
  for (uint32_t start = blockIdx.x * kTile; start < regions; start += gridDim.x * kTile) {
    const uint32_t size = regions - start < kTile ? regions - start : kTile;
    const uint32_t padded = size < 2 ? 2 : 1u << (32 - __clz(static_cast<int>(size - 1)));
    uint32_t large = 0;
#pragma unroll 1
    for (uint32_t index = threadIdx.x; index < padded; index += kTileThreads) {
      Key key = kLeftOut;
      int32_t first = INT32_MAX;
      if (index < size) {
        const int32_t root = load_settled(job.roots + start + index);
        const bool is_large = !job.leaves_out() || load_settled(job.pixels + root) >= job.min_size;
        key = is_large ? rank_key<T>(job, root) : kLeftOut;
        large += is_large;
        first = load_settled(job.firsts + root);
        store(job.amounts + root, key);
      }
      tile.keys[index] = key;
      tile.firsts[index] = first;
    }
    if (job.leaves_out()) {
      for (int with = 16; with > 0; with /= 2) large += __shfl_xor_sync(kAllLanes, large, with);
      if (lane_of_thread() == 0 && large != 0) atomicAdd(&job.state->large, large);
    }
    __syncthreads();
    for (uint32_t width = 2; width <= padded; width *= 2) {
      for (uint32_t distance = width / 2; distance > 0; distance /= 2) {
#pragma unroll 1
        for (uint32_t pair = threadIdx.x; pair < padded / 2; pair += kTileThreads) {
          const uint32_t low = 2 * pair - (pair & (distance - 1));
          const uint32_t high = low + distance;
          const Key keys[2] = {tile.keys[low], tile.keys[high]};
          const int32_t firsts[2] = {tile.firsts[low], tile.firsts[high]};
          const bool is_rising = (low & width) == 0;
          if (is_better(keys[1], firsts[1], keys[0], firsts[0]) == is_rising) {
            tile.keys[low] = keys[1], tile.keys[high] = keys[0];
            tile.firsts[low] = firsts[1], tile.firsts[high] = firsts[0];
          }
        }
        // The pairs of a warp are within 64 adjacent regions where their distance is at most 32.
        const bool is_near = distance > 1 ? distance <= 32 : width <= 32 && width < padded;
        is_near ? __syncwarp() : __syncthreads();
      }
    }
    // No barrier: a thread loads the next tile into the same elements that it stores here.
    for (uint32_t index = threadIdx.x; index < size; index += kTileThreads) {
      store(job.sorted_keys[0] + start + index, tile.keys[index]);
      store(job.sorted_firsts[0] + start + index, tile.firsts[index]);
    }
  }
}

// The regions from the best to the worst.
struct Sorted {
  const Key* keys;
  const int32_t* firsts;

  __device__ __forceinline__ Ranked at(uint32_t index) const {
    return {load_settled(keys + index), load_settled(firsts + index)};
  }
};

// Several searches at a time: in each, the regions of the sorted range from `at` on that are better than another.
// `at` moves past them. A length of 0 searches nowhere.
template <int kSearches>
__device__ __forceinline__ void pass_better(const Sorted& sorted, uint32_t (&at)[kSearches],
                                            const uint32_t (&ends)[kSearches], const Ranked (&than)[kSearches]) {
  uint32_t longest = 0;
#pragma unroll
  for (int i = 0; i < kSearches; ++i) longest = ends[i] - at[i] > longest ? ends[i] - at[i] : longest;
  if (longest == 0) return;
  for (uint32_t by = 1u << (31 - __clz(static_cast<int>(longest))); by > 0; by /= 2) {
    Key keys[kSearches];
#pragma unroll
    for (int i = 0; i < kSearches; ++i) {
      // Loaded in any case: a branch would wait for the load before.
      keys[i] = load_settled(sorted.keys + (ends[i] - at[i] >= by ? at[i] + by - 1 : 0));
    }
#pragma unroll
    for (int i = 0; i < kSearches; ++i) {
      if (ends[i] - at[i] < by || keys[i] > than[i].key) continue;
      if (keys[i] < than[i].key || load_settled(sorted.firsts + at[i] + by - 1) < than[i].first) at[i] += by;
    }
  }
}

constexpr int kSearches = 8;

struct MergeShared {
  // Of each run of the group: where the elements between the block's first and its last one are.
  uint32_t begins[kBlockThreads], ends[kBlockThreads];
  uint32_t before[kBlockThreads / 32];  // of each warp's runs, the elements before the block's first one
};

// Merges sorted runs of one length, up to `fan` at a time, from one buffer into the other; a single run stays. Elements
// that cannot be among the kept ones are left out. A block has adjacent elements of one run: it finds where they belong
// in each other run, and then its threads search there.
__global__ void __launch_bounds__(kBlockThreads, 3)
    merge_kernel(const __grid_constant__ RegionsJob job, uint32_t run, uint32_t fan, int from) {
  auto& shared = block_shared<MergeShared>();
  start_next_launch();
  wait_for_launch();
  const uint32_t regions = load_coherent(&job.state->regions);
  if (has_reason(job.state) || regions <= run) return;
  const uint32_t kept = count_kept(job, regions);
  const Sorted sorted{job.sorted_keys[from], job.sorted_firsts[from]};
  const int64_t group_size = static_cast<int64_t>(run) * fan;
  static_assert(kTile % kBlockThreads == 0, "the elements of a block are of one run");
  for (uint32_t start = blockIdx.x * kBlockThreads; start < regions; start += gridDim.x * kBlockThreads) {
    const uint32_t own_begin = start / run * run;
    if (start - own_begin >= kept) continue;
    const auto end_of_run = [&](uint32_t begin) {
      const uint32_t length = run < kept ? run : kept;
      return regions - begin < length ? regions : begin + length;
    };
    const uint32_t own_end = end_of_run(own_begin);
    const uint32_t block_end = own_end - start < kBlockThreads ? own_end : start + kBlockThreads;
    const uint32_t group = static_cast<uint32_t>(start / group_size * group_size);
    const uint32_t group_end = group + group_size < regions ? static_cast<uint32_t>(group + group_size) : regions;
    const uint32_t runs = (group_end - group + run - 1) / run;

    uint32_t places[2] = {0, 0};
    uint32_t before = 0;
    if (threadIdx.x < runs && group + threadIdx.x * run != own_begin) {
      const uint32_t other = group + threadIdx.x * run;
      places[0] = places[1] = other;
      const uint32_t other_end = end_of_run(other);
      pass_better<2>(sorted, places, {other_end, other_end}, {sorted.at(start), sorted.at(block_end - 1)});
      before = places[0] - other;
    }
    shared.begins[threadIdx.x] = places[0];
    shared.ends[threadIdx.x] = places[1];
    for (int with = 16; with > 0; with /= 2) before += __shfl_xor_sync(kAllLanes, before, with);
    if (lane_of_thread() == 0) shared.before[threadIdx.x / 32] = before;
    __syncthreads();
    uint32_t place = start - own_begin;
    for (uint32_t warp = 0; warp < kBlockThreads / 32; ++warp) place += shared.before[warp];
    if (place < kept && start + threadIdx.x < block_end) {
      const Ranked own = sorted.at(start + threadIdx.x);
      place += threadIdx.x;
      for (uint32_t other = 0; other < runs; other += kSearches) {
        uint32_t at[kSearches], ends[kSearches];
        Ranked owns[kSearches];
#pragma unroll
        for (int i = 0; i < kSearches; ++i) {
          at[i] = shared.begins[other + i];
          ends[i] = shared.ends[other + i];
          owns[i] = own;
          place -= at[i];
        }
        pass_better<kSearches>(sorted, at, ends, owns);
#pragma unroll
        for (int i = 0; i < kSearches; ++i) place += at[i];
      }
      if (place < kept) {
        store(job.sorted_keys[1 - from] + group + place, own.key);
        store(job.sorted_firsts[1 - from] + group + place, own.first);
      }
    }
    __syncthreads();
  }
}

__device__ __forceinline__ void widen(int64_t* edge, int64_t to, bool is_least) {
  auto* address = reinterpret_cast<long long*>(edge);
  const long long value = to;
  const long long before = load_coherent(address);
  if (is_least && value < before) atomicMin(address, value);
  if (!is_least && value > before) atomicMax(address, value);
}

// Writes the box and the score of a kept region, and whether it widens their union.
template <class T>
__device__ __forceinline__ void write_region(const RegionsJob& job, const Sorted& sorted, int64_t index) {
  const Ranked region = sorted.at(static_cast<uint32_t>(index));
  const int32_t root = load_settled(job.parents + load_settled(job.labels + region.first));
  const int32_t line = region.first / static_cast<int32_t>(job.width);
  const int64_t box[6] = {load_settled(job.left + root),
                          job.has_frames ? load_settled(job.upper + root) : line,
                          job.has_frames ? line / static_cast<int32_t>(job.height) : 0,
                          load_settled(job.right + root),
                          load_settled(job.bottom + root),
                          job.has_frames ? load_settled(job.back + root) : 1};
  const double score = score_of_key<T>(job, region.key);
  const bool is_again = index < job.outcome_rows;
  const int edges = job.edges();
  int64_t* rows = job.outcome + 2 + edges;
  store(job.scores + index, score);
  if (is_again) store(rows + edges * job.outcome_rows + index, static_cast<int64_t>(bits_of(score)));
  each_edge(job, box, [&](int at, int64_t edge, bool is_least) {
    store(job.boxes + edges * index + at, edge);
    if (is_again) store(rows + edges * index + at, edge);
    widen(job.outcome + 2 + at, edge, is_least);
  });
}

// The first threads write a kept region each, and all of them the mask: a region is kept if it is not worse than the
// last kept one.
template <class T>
__global__ void __launch_bounds__(kBlockThreads) keep_kernel(const __grid_constant__ RegionsJob job, int fan) {
  start_next_launch();
  wait_for_launch();
  const uint32_t regions = load_coherent(&job.state->regions);
  const bool has_none = has_reason(job.state);
  const uint32_t kept = has_none ? 0 : count_kept(job, regions);
  const bool is_whole = kept == 0;
  const bool is_first = blockIdx.x == 0 && threadIdx.x == 0;
  Ranked last{0, 0};
  if (is_whole && !has_none && is_first) write_whole(job, Reason::kTooSmall);
  if (!is_whole) {
    int from = 0;
    for (int64_t run = kTile; run < regions; run *= fan) from = 1 - from;
    const Sorted sorted{job.sorted_keys[from], job.sorted_firsts[from]};
    last = sorted.at(kept - 1);
    if (is_first) store(job.outcome, static_cast<int64_t>(kept));
    for (int64_t index = blockIdx.x * kBlockThreads + threadIdx.x; index < kept; index += gridDim.x * kBlockThreads) {
      write_region<T>(job, sorted, index);
    }
  }
  for (uint32_t start = blockIdx.x * kBlockPixels; start < job.count; start += gridDim.x * kBlockPixels) {
    const int steps = count_steps(job, start + threadIdx.x, kBlockThreads, kSteps);
    const int32_t* from = job.labels + start + threadIdx.x;
    int32_t labels[kSteps];
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      labels[step] = !is_whole && step < steps ? load_settled(from + step * kBlockThreads) : kOff;
    }
    Key keys[kSteps];
    bool is_empty = true;
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      keys[step] = ~Key(0);
      is_empty = is_empty && labels[step] == kOff;
    }
    if (!is_empty) {
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        if (labels[step] != kOff) labels[step] = load_settled(job.parents + labels[step]);
      }
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        if (labels[step] != kOff) keys[step] = load_settled(job.amounts + labels[step]);
      }
    }
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      if (step >= steps) break;
      bool is_kept = is_whole || keys[step] < last.key;
      if (keys[step] == last.key && labels[step] != kOff) {
        is_kept = load_settled(job.firsts + labels[step]) <= last.first;
      }
      store(job.mask + start + threadIdx.x + step * kBlockThreads, is_kept);
    }
  }
}

template <class T>
void launch_all(const RegionsJob& job, int64_t most_regions, const RegionsLaunches& how) {
  launch(how.of("sort_tiles_kernel", count_blocks(most_regions, kTile, how.most_blocks), kTileThreads,
                sizeof(TileShared)),
         sort_tiles_kernel<T>, job);
  // As few merges as can be, and no more runs at a time than they need.
  const int64_t runs = (most_regions + kTile - 1) / kTile;
  int64_t most = 1;
  int merges = 0;
  for (; most < runs; most *= kMostRuns) ++merges;
  uint32_t fan = 2;
  while (std::pow(static_cast<double>(fan), merges) < static_cast<double>(runs)) ++fan;
  int from = 0;
  int64_t run = kTile;
  // Three blocks share a multiprocessor, and most images have no runs to merge.
  const unsigned blocks = count_blocks(most_regions, kBlockThreads, (how.most_blocks + 2) / 3);
  for (int merge = 0; merge < merges; ++merge) {
    launch(how.of("merge_kernel", blocks, kBlockThreads, sizeof(MergeShared)), merge_kernel, job,
           static_cast<uint32_t>(run), fan, from);
    from = 1 - from;
    run *= fan;
  }
  launch(how.of("keep_kernel", count_blocks(job.count, kBlockPixels, how.most_blocks), kBlockThreads), keep_kernel<T>,
         job, static_cast<int>(fan));
}

}  // namespace

void launch_rank(const RegionsJob& job, bool is_double, int64_t most_regions, const RegionsLaunches& how) {
  is_double ? launch_all<double>(job, most_regions, how) : launch_all<float>(job, most_regions, how);
}

}  // namespace carve
