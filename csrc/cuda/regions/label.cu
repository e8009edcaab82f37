// Connected regions of the pixels at or above the threshold: runs along the rows, union-find, sums and boxes.

#include "cuda/regions/regions.cuh"

namespace carve {
namespace {

// A constant map that was resized is constant up to a few rounding errors.
template <class T>
constexpr double kFlat = 16.0 * std::numeric_limits<T>::epsilon();

constexpr double kInfinity = std::numeric_limits<double>::infinity();

// Computed by every block, with the same result. Products are rounded before they are added, as in NumPy.
template <class T>
__device__ __forceinline__ Reason find_threshold(const RegionsJob& job, PickShared& shared, T& threshold) {
  const RegionsState* state = job.state;
  constexpr int kLast = kPasses<T> - 1;
  const PickedDigit picked = pick_digit(state->counts[kLast], load(&state->rank[kLast]), shared);
  const Key prefix = load(&state->prefix[kLast]) << (shift_before<T>(kLast) - shift_after<T>(kLast));
  const Key key = prefix | picked.digit;
  Key next = picked.is_repeated ? key : picked.next < kDigits ? prefix | picked.next : load(&state->next);
  if (next == ~Key(0)) next = key;  // the greatest value of all
  const T below = value_of<T>(static_cast<BitsOf<T>>(key));
  const T above = value_of<T>(static_cast<BitsOf<T>>(next));
  const T weight = static_cast<T>(job.weight);
  if constexpr (sizeof(T) == 4) {
    const float part = __fmul_rn(__fsub_rn(above, below), weight);
    threshold = job.from_above ? __fsub_rn(above, part) : __fadd_rn(below, part);
  } else {
    const double part = __dmul_rn(__dsub_rn(above, below), weight);
    threshold = job.from_above ? __dsub_rn(above, part) : __dadd_rn(below, part);
  }
  const double low = value_of<T>(static_cast<BitsOf<T>>(load(&state->low)));
  const double high = value_of<T>(static_cast<BitsOf<T>>(load(&state->high)));
  if (!(low > -kInfinity && high < kInfinity)) return Reason::kNotFinite;
  if (__dsub_rn(high, low) <= __dmul_rn(kFlat<T>, peak_of<T>(state))) return Reason::kConstant;
  // The range of extreme values overflows to an infinite or NaN threshold, which no value reaches.
  return high >= static_cast<double>(threshold) ? Reason::kNone : Reason::kNoPixel;
}

// The runs among the 32 pixels of a step, as bits. A run that continues from the previous step has no head here.
struct StepRuns {
  uint32_t heads;
  uint32_t own;   // the heads up to this lane, the last of which starts this lane's run
  uint32_t head;  // the first pixel of this lane's run, if it is in one
};

__device__ __forceinline__ StepRuns find_runs_of_step(uint32_t bits, uint32_t row_starts, uint32_t goes_on,
                                                      uint32_t pixel, uint32_t head_before) {
  const uint32_t lane = lane_of_thread();
  StepRuns runs;
  runs.heads = bits & (row_starts | ~(bits << 1 | goes_on));
  runs.own = runs.heads & (kAllLanes >> (31 - lane));
  runs.head = runs.own != 0 ? pixel - lane + (31 - __clz(static_cast<int>(runs.own))) : head_before;
  return runs;
}

// The parent of each pixel is the first pixel of its run in the chunk.
template <class T>
__global__ void __launch_bounds__(kBlockThreads) label_kernel(const __grid_constant__ RegionsJob job) {
  auto& shared = block_shared<PickShared>();
  T threshold;
  const Reason reason = find_threshold<T>(job, shared, threshold);
  if (reason != Reason::kNone) {
    if (blockIdx.x != 0 || threadIdx.x != 0) return;
    store(&job.state->reason, static_cast<int32_t>(reason));
    store(job.outcome + 1, static_cast<int64_t>(reason));
    store(job.outcome + 2, int64_t(0));
    store(job.outcome + 3, int64_t(0));
    store(job.outcome + 4, static_cast<int64_t>(job.width));
    store(job.outcome + 5, static_cast<int64_t>(job.height));
    return;
  }
  const T* values = static_cast<const T*>(job.saliency);
  const uint32_t lane = lane_of_thread();
  const uint32_t warps = gridDim.x * (kBlockThreads / 32);
  for (uint32_t chunk = blockIdx.x * (kBlockThreads / 32) + threadIdx.x / 32; chunk * kChunkPixels < job.count;
       chunk += warps) {
    uint32_t bits[kSteps];
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      const uint32_t pixel = chunk * kChunkPixels + step * 32 + lane;
      bits[step] = pixel < job.count && load(values + pixel) >= threshold;
    }
    uint32_t head = 0;
    uint32_t goes_on = 0;
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      const uint32_t pixel = chunk * kChunkPixels + step * 32 + lane;
      const bool is_on = bits[step] != 0;
      const uint32_t all = __ballot_sync(kAllLanes, is_on);
      const uint32_t row_starts = __ballot_sync(kAllLanes, pixel % job.width == 0);
      const StepRuns runs = find_runs_of_step(all, row_starts, goes_on, pixel, head);
      if (pixel < job.count) store(job.labels + pixel, is_on ? static_cast<int32_t>(runs.head) : kOff);
      head = __shfl_sync(kAllLanes, runs.head, 31);
      goes_on = all >> 31;
    }
  }
}

// The root of a pixel. The grandparent becomes the parent of each visited pixel, which halves the path for later calls.
// Labels only decrease, so concurrent updates are safe.
__device__ __forceinline__ int32_t find_root(int32_t* labels, int32_t pixel) {
  int32_t parent = load_coherent(labels + pixel);
  while (parent != pixel) {
    const int32_t grandparent = load_coherent(labels + parent);
    if (grandparent != parent) atomicMin(labels + pixel, grandparent);
    pixel = parent;
    parent = grandparent;
  }
  return pixel;
}

// Only a root gets a new parent, one that precedes it. If another thread has joined it meanwhile, its root is found
// again.
__device__ __forceinline__ void join(int32_t* labels, uint32_t one, uint32_t other) {
  int32_t high = static_cast<int32_t>(one);
  int32_t low = static_cast<int32_t>(other);
  while (true) {
    high = find_root(labels, high);
    low = find_root(labels, low);
    if (high == low) return;
    if (high < low) {
      const int32_t swapped = high;
      high = low;
      low = swapped;
    }
    if (atomicCAS(labels + high, high, low) == high) return;
  }
}

// One thread per pixel: only the few pixels where runs meet have work, and the number of threads hides its latency.
__global__ void __launch_bounds__(kBlockThreads) join_kernel(const __grid_constant__ RegionsJob job) {
  if (has_reason(job.state)) return;
  const uint32_t width = job.width;
  const auto is_on = [&](uint32_t pixel) { return load_coherent(job.labels + pixel) != kOff; };
  for (uint32_t pixel = blockIdx.x * kBlockThreads + threadIdx.x; pixel < job.count;
       pixel += gridDim.x * kBlockThreads) {
    if (!is_on(pixel)) continue;
    const uint32_t x = pixel % width;
    const bool has_left = x > 0 && is_on(pixel - 1);
    if (has_left && pixel % kChunkPixels == 0) join(job.labels, pixel, pixel - 1);
    if (pixel < width) continue;
    const uint32_t above = pixel - width;
    if (is_on(above)) {
      // If the pixels on the left touch, too, they join the two runs.
      if (!has_left || !is_on(above - 1)) join(job.labels, pixel, above);
    } else if (job.is_eight) {
      if (x > 0 && !has_left && is_on(above - 1)) join(job.labels, pixel, above - 1);
      if (x + 1 < width && is_on(above + 1) && !is_on(pixel + 1)) join(job.labels, pixel, above + 1);
    }
  }
}

// Numbers the roots in any order; the lanes of a warp share one atomic addition.
__global__ void __launch_bounds__(kBlockThreads) number_kernel(const __grid_constant__ RegionsJob job) {
  if (has_reason(job.state)) return;
  const uint32_t lane = lane_of_thread();
  for (uint32_t start = blockIdx.x * kBlockThreads; start < job.count; start += gridDim.x * kBlockThreads) {
    const uint32_t pixel = start + threadIdx.x;
    const bool is_root = pixel < job.count && load_coherent(job.labels + pixel) == static_cast<int32_t>(pixel);
    const uint32_t roots = __ballot_sync(kAllLanes, is_root);
    if (roots == 0) continue;
    uint32_t number = 0;
    if (lane == 0) number = atomicAdd(&job.state->regions, static_cast<uint32_t>(__popc(roots)));
    number = __shfl_sync(kAllLanes, number, 0) + __popc(roots & ((1u << lane) - 1));
    if (!is_root) continue;
    store(job.labels + pixel, ~static_cast<int32_t>(number));
    store(job.keys[0] + number, Key(0));
    store(job.firsts[0] + number, static_cast<int32_t>(pixel));
    store(job.left + number, static_cast<int32_t>(job.width));
    store(job.right + number, 0);
    store(job.bottom + number, 0);
    store(job.pixels + number, uint32_t(0));
  }
}

// The number n of a pixel's region, as ~n. Paths are shortened as in find_root.
__device__ __forceinline__ int32_t find_number(int32_t* labels, uint32_t head) {
  int32_t pixel = static_cast<int32_t>(head);
  int32_t label = load_coherent(labels + pixel);
  while (label >= 0) {
    const int32_t next = load_coherent(labels + label);
    atomicMin(labels + pixel, next);
    pixel = label;
    label = next;
  }
  // The first pixel of every run gets the number: the mask then finds it in two steps.
  if (pixel != static_cast<int32_t>(head)) atomicMin(labels + head, label);
  return label;
}

// Adds a run to its region. Most runs do not widen the box, and a read costs less than an atomic.
__device__ __forceinline__ void add_run(const RegionsJob& job, uint32_t head, uint32_t pixel, Key amount) {
  const int32_t number = ~find_number(job.labels, head);
  const uint32_t pixels = pixel - head + 1;
  const int32_t right = static_cast<int32_t>(pixel % job.width) + 1;
  const int32_t left = right - static_cast<int32_t>(pixels);
  const int32_t bottom = static_cast<int32_t>(pixel / job.width) + 1;
  if (left < load_coherent(job.left + number)) atomicMin(job.left + number, left);
  if (right > load_coherent(job.right + number)) atomicMax(job.right + number, right);
  if (bottom > load_coherent(job.bottom + number)) atomicMax(job.bottom + number, bottom);
  if (job.score == Score::kMax) {
    if (amount > load_coherent(job.keys[0] + number)) atomicMax(job.keys[0] + number, amount);
    return;
  }
  atomicAdd(job.keys[0] + number, amount);
  if (job.score == Score::kMean) atomicAdd(job.pixels + number, pixels);
}

// Runs are summed within a warp, so that a region of a million pixels takes a few thousand atomics. Sums are integers
// in two's complement: their order is irrelevant.
template <class T>
__global__ void __launch_bounds__(kBlockThreads) measure_kernel(const __grid_constant__ RegionsJob job) {
  if (has_reason(job.state)) return;
  const T* values = static_cast<const T*>(job.saliency);
  const double peak = peak_of<T>(job.state);
  const bool is_max = job.score == Score::kMax;
  const uint32_t lane = lane_of_thread();
  const uint32_t warps = gridDim.x * (kBlockThreads / 32);
  for (uint32_t chunk = blockIdx.x * (kBlockThreads / 32) + threadIdx.x / 32; chunk * kChunkPixels < job.count;
       chunk += warps) {
    uint32_t bits[kSteps + 1];
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      const uint32_t pixel = chunk * kChunkPixels + step * 32 + lane;
      bits[step] = pixel < job.count && load_coherent(job.labels + pixel) != kOff;
    }
#pragma unroll
    for (int step = 0; step < kSteps; ++step) bits[step] = __ballot_sync(kAllLanes, bits[step] != 0);
    bits[kSteps] = 0;  // a run ends with the chunk
    uint32_t head = 0;
    Key carried = 0;
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      const uint32_t pixel = chunk * kChunkPixels + step * 32 + lane;
      const uint32_t x = pixel % job.width;
      const uint32_t row_starts = __ballot_sync(kAllLanes, x == 0);
      const uint32_t row_ends = __ballot_sync(kAllLanes, x + 1 == job.width);
      const uint32_t goes_on = step == 0 ? 0 : bits[step - 1] >> 31;
      const StepRuns runs = find_runs_of_step(bits[step], row_starts, goes_on, pixel, head);
      const uint32_t ends = bits[step] & (row_ends | ~(bits[step] >> 1 | bits[step + 1] << 31));
      Key amount = 0;
      if (bits[step] >> lane & 1) {
        const double value = load(values + pixel);
        amount = is_max ? key_of(value) : static_cast<Key>(__double2ll_rn(__dmul_rn(__ddiv_rn(value, peak), job.one)));
      }
      const auto join_amounts = [&](Key other) { amount = !is_max ? amount + other : other > amount ? other : amount; };
      if (lane == 0 && goes_on && !(runs.heads & 1)) join_amounts(carried);
      const uint32_t first_lane = runs.own != 0 ? 31 - __clz(static_cast<int>(runs.own)) : 0;
      for (uint32_t by = 1; by < 32; by *= 2) {
        const Key other = __shfl_up_sync(kAllLanes, amount, by);
        if (lane >= first_lane + by) join_amounts(other);
      }
      if (ends >> lane & 1) add_run(job, runs.head, pixel, amount);
      head = __shfl_sync(kAllLanes, runs.head, 31);
      carried = __shfl_sync(kAllLanes, amount, 31);
    }
  }
}

template <class T>
void launch_all(const RegionsJob& job, const RegionsLaunches& how) {
  const unsigned blocks = count_blocks(job.count, kBlockPixels, how.most_blocks);
  launch({"label_kernel", blocks, kBlockThreads, sizeof(PickShared), how.stream}, label_kernel<T>, job);
  const unsigned pixel_blocks = count_blocks(job.count, kBlockThreads, kSteps * how.most_blocks);
  launch({"join_kernel", pixel_blocks, kBlockThreads, 0, how.stream}, join_kernel, job);
  launch({"number_kernel", pixel_blocks, kBlockThreads, 0, how.stream}, number_kernel, job);
  launch({"measure_kernel", blocks, kBlockThreads, 0, how.stream}, measure_kernel<T>, job);
}

}  // namespace

void launch_label(const RegionsJob& job, bool is_double, const RegionsLaunches& how) {
  is_double ? launch_all<double>(job, how) : launch_all<float>(job, how);
}

}  // namespace carve
