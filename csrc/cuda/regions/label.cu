// The parts of regions: a block labels a tile of 32 x 64 pixels in shared memory, by union-find over the runs of rows.

#include <limits>

#include "cuda/regions/regions.cuh"
#include "cuda/regions/union.cuh"

namespace carve {
namespace {

// A constant map that was resized is constant up to a few rounding errors.
template <class T>
constexpr double kFlat = 16.0 * std::numeric_limits<T>::epsilon();

constexpr double kInfinity = std::numeric_limits<double>::infinity();

constexpr uint32_t kTilePixels = kTileWidth * kTileHeight;
// Half of the pixels: no two pixels of one colour of a checkerboard touch.
constexpr uint32_t kTileParts = kTilePixels / 2;

// 28 KB: four blocks share a multiprocessor of 128 KB.
struct LabelShared {
  PickShared pick;
  uint32_t bits[kTileHeight];    // of each row, the pixels above the threshold
  uint32_t firsts[kTileHeight];  // and the first pixels of parts
  uint32_t before[kTileHeight];  // the parts that begin in the rows above
  uint32_t begin;  // the number of the tile's first part among those of all tiles
  uint32_t parts;
  // For the first pixel of each run: its parent, which never follows it (itself, if a root); in the end, of a root, ~n
  // where n is the number of its part in the tile.
  int32_t labels[kTilePixels];
  // For each part.
  Key amounts[kTileParts];
  uint32_t columns[kTileParts];  // those that it has pixels in, as bits
  int32_t bottoms[kTileParts];
  uint32_t pixels[kTileParts];
};

// Computed by every block, with the same result. Products are rounded before they are added, as in NumPy.
template <class T>
struct Threshold {
  T value;
  double peak;
  Reason reason;
};

template <class T>
__device__ __forceinline__ Threshold<T> find_threshold(const RegionsJob& job, PickShared& shared) {
  const RegionsState* state = job.state;
  constexpr int kLast = kPasses<T> - 1;
  const Key prefix = load_coherent(&state->prefix[kLast]) << digit_bits<T>(kLast);
  const Key next_prefix = load_coherent(&state->next);
  const double low = value_of<T>(static_cast<BitsOf<T>>(load_coherent(&state->low)));
  const double high = value_of<T>(static_cast<BitsOf<T>>(load_coherent(&state->high)));
  const PickedDigit picked = pick_digit<count_digits<T>(kLast), kBlockThreads>(
      state->counts + counts_before<T>(kLast), load_coherent(&state->rank[kLast]), shared);
  const Key key = prefix | picked.digit;
  Key next = picked.is_repeated ? key : picked.next < count_digits<T>(kLast) ? prefix | picked.next : next_prefix;
  if (next == Key(~BitsOf<T>(0))) next = key;  // the greatest value of all
  const T below = value_of<T>(static_cast<BitsOf<T>>(key));
  const T above = value_of<T>(static_cast<BitsOf<T>>(next));
  const T weight = static_cast<T>(job.weight);
  Threshold<T> found;
  if constexpr (sizeof(T) == 4) {
    const float part = __fmul_rn(__fsub_rn(above, below), weight);
    found.value = job.from_above ? __fsub_rn(above, part) : __fadd_rn(below, part);
  } else {
    const double part = __dmul_rn(__dsub_rn(above, below), weight);
    found.value = job.from_above ? __dsub_rn(above, part) : __dadd_rn(below, part);
  }
  found.peak = -low > high ? -low : high;
  if (!(low > -kInfinity && high < kInfinity)) {
    found.reason = Reason::kNotFinite;
  } else if (__dsub_rn(high, low) <= __dmul_rn(kFlat<T>, found.peak)) {
    found.reason = Reason::kConstant;
  } else {
    // The range of extreme values overflows to an infinite or NaN threshold, which no value reaches.
    found.reason = high >= static_cast<double>(found.value) ? Reason::kNone : Reason::kNoPixel;
  }
  return found;
}

// What does not depend on the values of a tile.
struct Tile {
  uint32_t x, y, frame;  // of its first pixel

  __device__ __forceinline__ bool has(const RegionsJob& job, uint32_t row, uint32_t column) const {
    return x + column < job.width && y + row < job.height;
  }
  __device__ __forceinline__ uint32_t pixel(const RegionsJob& job, uint32_t row, uint32_t column) const {
    return (frame * job.height + y + row) * job.width + x + column;
  }
};

__device__ __forceinline__ uint32_t count_tiles_across(const RegionsJob& job) {
  return (job.width + kTileWidth - 1) / kTileWidth;
}
__device__ __forceinline__ uint32_t count_tiles_down(const RegionsJob& job) {
  return (job.height + kTileHeight - 1) / kTileHeight;
}

// A tile is in one frame.
__device__ __forceinline__ Tile find_tile(const RegionsJob& job, uint32_t number) {
  const uint32_t across = count_tiles_across(job);
  const uint32_t down = count_tiles_down(job);
  const uint32_t line = number / across;
  return {number % across * kTileWidth, line % down * kTileHeight, line / down};
}

template <class T>
__device__ __forceinline__ void load_rows(const RegionsJob& job, const Tile& tile, T (&values)[kSteps]) {
  const T* from = static_cast<const T*>(job.saliency);
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    const uint32_t row = threadIdx.x / 32 * kSteps + step;
    const uint32_t lane = lane_of_thread();
    values[step] = tile.has(job, row, lane) ? load(from + tile.pixel(job, row, lane)) : T(0);
  }
}

__device__ __forceinline__ uint32_t run_starts(uint32_t bits) { return bits & ~(bits << 1); }
__device__ __forceinline__ bool has_bit(uint32_t bits, uint32_t lane) { return bits >> lane & 1; }
__device__ __forceinline__ uint32_t lanes_up_to(uint32_t lane) { return kAllLanes >> (31 - lane); }

// The first of the lanes whose bits end in this lane without a gap: `starts` has the first lanes of all.
__device__ __forceinline__ uint32_t first_lane_of_run(uint32_t starts, uint32_t lane) {
  return 31 - __clz(static_cast<int>(starts & lanes_up_to(lane)));
}

// The first pixel in the tile of the run that a pixel is in.
__device__ __forceinline__ int32_t head_of(uint32_t bits, uint32_t row, uint32_t lane) {
  return static_cast<int32_t>(row * kTileWidth + first_lane_of_run(run_starts(bits), lane));
}

// Of each run above that the run touches whose first pixel is in this lane, one pixel, as bits.
__device__ __forceinline__ uint32_t find_touched(uint32_t bits, uint32_t above, bool has_corners) {
  const uint32_t from_here = ~(lanes_up_to(lane_of_thread()) >> 1);
  const uint32_t gaps = ~bits & from_here;
  const uint32_t run = gaps == 0 ? from_here : from_here & ((gaps & (0u - gaps)) - 1);
  return run_starts(above & (has_corners ? run | run << 1 | run >> 1 : run));
}

// The number of the part in the tile.
__device__ __forceinline__ uint32_t find_number(const int32_t* labels, int32_t pixel) {
  int32_t label = load_shared(labels + pixel);
  while (label >= 0) label = load_shared(labels + label);
  return static_cast<uint32_t>(~label);
}

// Numbers the tile's parts by their first pixels. Called by one warp; thread 0 returns the number of the first part
// among all tiles, which it waits for where that is used.
__device__ __forceinline__ uint32_t number_parts(const RegionsJob& job, LabelShared& shared) {
  const uint32_t lane = lane_of_thread();
  static_assert(kTileHeight == 64, "two rows for each lane");
  const uint32_t counts[2] = {static_cast<uint32_t>(__popc(shared.firsts[2 * lane])),
                              static_cast<uint32_t>(__popc(shared.firsts[2 * lane + 1]))};
  uint32_t before = counts[0] + counts[1];
  for (unsigned by = 1; by < 32; by *= 2) {
    const uint32_t other = __shfl_up_sync(kAllLanes, before, by);
    if (lane >= by) before += other;
  }
  const uint32_t parts = __shfl_sync(kAllLanes, before, 31);
  before -= counts[0] + counts[1];
  shared.before[2 * lane] = before;
  shared.before[2 * lane + 1] = before + counts[0];
  if (lane != 0) return 0;
  shared.parts = parts;
  return parts == 0 ? 0 : atomicAdd(&job.state->parts, parts);
}

// What a warp adds to the parts of a row: the sums of the pixels above each lane that end there.
struct RowSums {
  uint32_t ends;  // lanes whose pixels end in this row
  Key amount;
  uint32_t pixels;
};

// The lanes side by side that end in a row are of one part: the last one adds for all of them. Sums are integers in
// two's complement, so their order is irrelevant.
__device__ __forceinline__ void add_row(const RegionsJob& job, LabelShared& shared, uint32_t row, RowSums sums,
                                        uint32_t number) {
  const uint32_t lane = lane_of_thread();
  const uint32_t first = first_lane_of_run(run_starts(sums.ends) | 1, lane);
  uint32_t longer = sums.ends & sums.ends << 1;
  for (uint32_t by = 1; longer != 0; by *= 2) {
    const Key other = __shfl_up_sync(kAllLanes, sums.amount, by);
    const uint32_t others = __shfl_up_sync(kAllLanes, sums.pixels, by);
    if (lane >= first + by) {
      sums.amount = job.score != Score::kMax ? sums.amount + other : other > sums.amount ? other : sums.amount;
      sums.pixels += others;
    }
    longer &= longer << by;
  }
  const bool is_last = has_bit(sums.ends & ~(sums.ends >> 1), lane);
  if (!is_last) return;
  if (job.score == Score::kMax) {
    atomicMax(&shared.amounts[number], sums.amount);
  } else {
    atomicAdd(&shared.amounts[number], sums.amount);
  }
  if (job.counts_pixels) atomicAdd(&shared.pixels[number], sums.pixels);
  atomicOr(&shared.columns[number], lanes_up_to(lane) & ~(lanes_up_to(first) >> 1));
  atomicMax(&shared.bottoms[number], static_cast<int32_t>(row));
}

// The loops over the rows of a warp are not unrolled: after other kernels the code comes from memory, too.
template <class T>
__device__ __forceinline__ void label_tile(const RegionsJob& job, LabelShared& shared, const Tile& tile,
                                           const T (&values)[kSteps], const Threshold<T>& threshold) {
  const uint32_t lane = lane_of_thread();
  const uint32_t begin = threadIdx.x / 32 * kSteps;
  const uint32_t end = begin + kSteps;
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    const uint32_t row = begin + step;
    const uint32_t bits = __ballot_sync(kAllLanes, tile.has(job, row, lane) && values[step] >= threshold.value);
    if (lane == 0) shared.bits[row] = bits;
  }
  __syncthreads();
  // Most tiles of a smooth image have nothing.
  if (!__any_sync(kAllLanes, (shared.bits[lane] | shared.bits[32 + lane]) != 0)) {
#pragma unroll 1
    for (uint32_t row = begin; row < end; ++row) {
      if (tile.has(job, row, lane)) store(job.labels + tile.pixel(job, row, lane), kOff);
    }
    return;
  }
  // Runs start below the first run that they touch, as far as the warp's rows go.
#pragma unroll 1
  for (uint32_t row = begin; row < end; ++row) {
    const uint32_t bits = shared.bits[row];
    if (!has_bit(run_starts(bits), lane)) continue;
    const uint32_t above = row > begin ? shared.bits[row - 1] : 0;
    const uint32_t touched = find_touched(bits, above, job.has_corners);
    const int32_t pixel = static_cast<int32_t>(row * kTileWidth + lane);
    const uint32_t first = static_cast<uint32_t>(__ffs(static_cast<int>(touched))) - 1;
    shared.labels[pixel] = touched == 0 ? pixel : head_of(above, row - 1, first);
  }
  __syncthreads();
#pragma unroll 1
  for (uint32_t row = begin; row < end; ++row) {
    const uint32_t bits = shared.bits[row];
    if (!has_bit(run_starts(bits), lane)) continue;
    const uint32_t above = row > 0 ? shared.bits[row - 1] : 0;
    uint32_t touched = find_touched(bits, above, job.has_corners);
    if (row > begin) touched &= touched - 1;
    for (; touched != 0; touched &= touched - 1) {
      const uint32_t other = static_cast<uint32_t>(__ffs(static_cast<int>(touched))) - 1;
      join(SharedParents{shared.labels}, static_cast<int32_t>(row * kTileWidth + lane),
           head_of(above, row - 1, other));
    }
  }
  __syncthreads();
#pragma unroll 1
  for (uint32_t row = begin; row < end; ++row) {
    const int32_t pixel = static_cast<int32_t>(row * kTileWidth + lane);
    const bool is_first = has_bit(run_starts(shared.bits[row]), lane) && shared.labels[pixel] == pixel;
    const uint32_t firsts = __ballot_sync(kAllLanes, is_first);
    if (lane == 0) shared.firsts[row] = firsts;
  }
  __syncthreads();
  const uint32_t first_part = threadIdx.x < 32 ? number_parts(job, shared) : 0;
  __syncthreads();
#pragma unroll 1
  for (uint32_t row = begin; row < end; ++row) {
    const uint32_t firsts = shared.firsts[row];
    if (!has_bit(firsts, lane)) continue;
    const uint32_t number = shared.before[row] + __popc(firsts & (lanes_up_to(lane) >> 1));
    shared.labels[row * kTileWidth + lane] = ~static_cast<int32_t>(number);
    shared.amounts[number] = 0;
    shared.columns[number] = 0;
    shared.bottoms[number] = 0;
    shared.pixels[number] = 0;
  }
  if (threadIdx.x == 0) shared.begin = first_part;
  __syncthreads();

  const T* from = static_cast<const T*>(job.saliency);
  RowSums sums{0, 0, 0};
  uint32_t number = 0;
  uint32_t above = 0;
#pragma unroll 1
  for (uint32_t row = begin; row < end; ++row) {
    const uint32_t bits = shared.bits[row];
    const uint32_t below = row + 1 < end ? shared.bits[row + 1] : 0;
    const uint32_t pixel = tile.pixel(job, row, lane);
    if (has_bit(bits, lane)) {
      const double value = load(from + pixel);
      const Key amount = job.score == Score::kMax
                             ? key_of(value)
                             : static_cast<Key>(__double2ll_rn(__dmul_rn(__ddiv_rn(value, threshold.peak), job.one)));
      // A pixel below one of its part is in the same part.
      if (!has_bit(above, lane)) {
        number = find_number(shared.labels, head_of(bits, row, lane));
        sums.amount = amount;
        sums.pixels = 0;
      } else if (job.score != Score::kMax) {
        sums.amount += amount;
      } else if (amount > sums.amount) {
        sums.amount = amount;
      }
      ++sums.pixels;
    }
    if (tile.has(job, row, lane)) {
      const uint32_t part = shared.begin + number;
      store(job.labels + pixel, has_bit(bits, lane) ? static_cast<int32_t>(part) : kOff);
      if (has_bit(shared.firsts[row], lane)) {
        store(job.firsts + part, static_cast<int32_t>(pixel));
        if (job.has_frames) store(job.upper + part, static_cast<int32_t>(tile.y + row));
      }
    }
    sums.ends = bits & ~below;
    if (sums.ends != 0) add_row(job, shared, row, sums, number);
    above = bits;
  }
  __syncthreads();

  for (uint32_t index = threadIdx.x; index < shared.parts; index += kBlockThreads) {
    const uint32_t part = shared.begin + index;
    const uint32_t columns = shared.columns[index];
    store(job.parents + part, static_cast<int32_t>(part));
    store(job.amounts + part, shared.amounts[index]);
    store(job.left + part, static_cast<int32_t>(tile.x + __ffs(static_cast<int>(columns)) - 1));
    store(job.right + part, static_cast<int32_t>(tile.x + 32 - __clz(static_cast<int>(columns))));
    store(job.bottom + part, static_cast<int32_t>(tile.y) + shared.bottoms[index] + 1);
    if (job.has_frames) store(job.back + part, static_cast<int32_t>(tile.frame) + 1);
    if (job.counts_pixels) store(job.pixels + part, shared.pixels[index]);
  }
}

template <class T>
__global__ void __launch_bounds__(kBlockThreads, 4) label_kernel(const __grid_constant__ RegionsJob job) {
  auto& shared = block_shared<LabelShared>();
  start_next_launch();
  const uint32_t tiles = count_tiles_across(job) * count_tiles_down(job) * job.frames;
  Threshold<T> threshold;
#pragma unroll 1
  for (uint32_t number = blockIdx.x; number < tiles; number += gridDim.x) {
    const Tile tile = find_tile(job, number);
    T values[kSteps];
    load_rows(job, tile, values);
    if (number == blockIdx.x) {
      wait_for_launch();
      threshold = find_threshold<T>(job, shared.pick);
      if (threshold.reason != Reason::kNone) break;
    }
    // What the tile before has in shared memory was stored.
    __syncthreads();
    label_tile(job, shared, tile, values, threshold);
  }
  if (threshold.reason == Reason::kNone || blockIdx.x != 0 || threadIdx.x != 0) return;
  store(&job.state->reason, static_cast<int32_t>(threshold.reason));
  write_whole(job, threshold.reason);
}

template <class T>
void launch_tiles(const RegionsJob& job, const RegionsLaunches& how) {
  const int64_t across = (job.width + kTileWidth - 1) / kTileWidth;
  const int64_t down = (job.height + kTileHeight - 1) / kTileHeight;
  const unsigned blocks = count_blocks(across * down * job.frames, 1, how.most_blocks);
  launch(how.of("label_kernel", blocks, kBlockThreads, sizeof(LabelShared)), label_kernel<T>, job);
}

}  // namespace

void launch_label(const RegionsJob& job, bool is_double, const RegionsLaunches& how) {
  is_double ? launch_tiles<double>(job, how) : launch_tiles<float>(job, how);
}

}  // namespace carve
