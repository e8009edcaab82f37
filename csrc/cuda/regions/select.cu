// Radix selection of the value at a rank: each pass counts one digit of the values whose leading digits match.

#include "cuda/regions/regions.cuh"

namespace carve {
namespace {

// Large blocks: the counters of every block are added to those of all, and a block of 512 threads shares its
// multiprocessor with one of the next launch, which loads its pixels while this one counts.
constexpr int kThreads = 512;
template <class T>
constexpr int kLoads = 64 / sizeof(T);
template <class T>
constexpr uint32_t kPixels = kThreads * kLoads<T>;
constexpr uint32_t kClearedCounts = 2048;  // by a block
static_assert(kMostCounts % kClearedCounts == 0);

template <class T, int kPass>
struct SelectShared {
  uint32_t counts[count_digits<T>(kPass)];
  BitsOf<T> least[kThreads / 32];
  PickShared pick;
};

// The outcome starts as the empty union of boxes, which regions then widen.
__global__ void __launch_bounds__(kBlockThreads) clear_kernel(const __grid_constant__ RegionsJob job) {
  start_next_launch();
  RegionsState* state = job.state;
  for (uint32_t digit = threadIdx.x; digit < kClearedCounts; digit += kBlockThreads) {
    store(&state->counts[blockIdx.x * kClearedCounts + digit], uint32_t(0));
  }
  if (blockIdx.x != 0 || threadIdx.x != 0) return;
  store(&state->low, ~Key(0));
  store(&state->high, Key(0));
  store(&state->next, ~Key(0));
  store(&state->prefix[0], Key(0));
  store(&state->rank[0], job.rank);
  store(&state->parts, uint32_t(0));
  store(&state->regions, uint32_t(0));
  store(&state->large, uint32_t(0));
  const bool is_empty = job.count == 0;
  store(&state->reason, static_cast<int32_t>(is_empty ? Reason::kEmpty : Reason::kNone));
  store(job.outcome + 0, int64_t(0));
  store(job.outcome + 1, static_cast<int64_t>(is_empty ? Reason::kEmpty : Reason::kNone));
  const int64_t ends[3] = {job.width, job.height, job.frames};
  const int64_t box[6] = {is_empty ? 0 : ends[0], is_empty ? 0 : ends[1], is_empty ? 0 : ends[2],
                          is_empty ? ends[0] : 0, is_empty ? ends[1] : 0, is_empty ? ends[2] : 0};
  each_edge(job, box, [&](int at, int64_t edge, bool) { store(job.outcome + 2 + at, edge); });
}

// The least value of a block, in thread 0. Called by all threads, each set of values with its own shared memory.
template <class Bits>
__device__ __forceinline__ Bits find_least(Bits least, Bits (&shared)[kThreads / 32]) {
  const auto reduce = [&] {
    for (int with = 16; with > 0; with /= 2) {
      const Bits other = __shfl_xor_sync(kAllLanes, least, with);
      least = other < least ? other : least;
    }
  };
  reduce();
  if (lane_of_thread() == 0) shared[threadIdx.x / 32] = least;
  __syncthreads();
  least = lane_of_thread() < kThreads / 32 ? shared[lane_of_thread()] : ~Bits(0);
  reduce();
  return least;
}

// The digits that are known before a pass, which hands them on. Called by all threads of a block.
template <class T, int kPass>
__device__ __forceinline__ BitsOf<T> find_prefix(RegionsState* state, PickShared& shared) {
  constexpr int kLast = kPass - 1;
  const uint32_t rank = load_coherent(&state->rank[kLast]);
  const Key before = load_coherent(&state->prefix[kLast]);
  const PickedDigit picked =
      pick_digit<count_digits<T>(kLast), kThreads>(state->counts + counts_before<T>(kLast), rank, shared);
  const BitsOf<T> prefix = static_cast<BitsOf<T>>(before << digit_bits<T>(kLast)) | picked.digit;
  if (blockIdx.x == 0 && threadIdx.x == 0) {
    store(&state->prefix[kPass], static_cast<Key>(prefix));
    store(&state->rank[kPass], picked.rank);
  }
  return prefix;
}

// Each block counts in shared memory: neighbouring pixels often have the same digit, and there increments of one
// counter by the lanes of a warp are a single operation, as long as no result is used.
template <class T, int kPass>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 4 ? 2 : 1)
    select_kernel(const __grid_constant__ RegionsJob job) {
  using Bits = BitsOf<T>;
  constexpr uint32_t kCounts = count_digits<T>(kPass);
  auto& shared = block_shared<SelectShared<T, kPass>>();
  RegionsState* state = job.state;
  start_next_launch();
  for (uint32_t digit = threadIdx.x; digit < kCounts; digit += kThreads) shared.counts[digit] = 0;

  constexpr int kKnown = shift_before<T>(kPass);
  Bits prefix = 0;
  Bits least = ~Bits(0);
  Bits greatest = 0;
#pragma unroll 1
  for (uint32_t start = blockIdx.x * kPixels<T>; start < job.count; start += gridDim.x * kPixels<T>) {
    const int steps = count_steps(job, start + threadIdx.x, kThreads, kLoads<T>);
    const T* from = static_cast<const T*>(job.saliency) + start + threadIdx.x;
    T values[kLoads<T>];
    // All loads before the first use: those of a thread at the end of the image have conditions.
    if (steps == kLoads<T>) {
#pragma unroll
      for (int step = 0; step < kLoads<T>; ++step) values[step] = load(from + step * kThreads);
    }
    if (start == blockIdx.x * kPixels<T>) {
      if constexpr (kPass > 0) {
        wait_for_launch();
        prefix = find_prefix<T, kPass>(state, shared.pick);
      }
      __syncthreads();
    }
    const auto count = [&](T value) {
      const Bits key = key_of(value);
      // Two shifts: before the first pass no bit is known, and a shift by the full width is undefined.
      const Bits leading = (key >> 1) >> (kKnown - 1);
      if (leading == prefix) atomicAdd(&shared.counts[(key >> shift_after<T>(kPass)) % kCounts], 1u);
      if ((kPass == 0 || leading > prefix) && key < least) least = key;
      if (key > greatest) greatest = key;
    };
    if (steps == kLoads<T>) {
#pragma unroll
      for (int step = 0; step < kLoads<T>; ++step) count(values[step]);
    } else {
#pragma unroll 1
      for (int step = 0; step < steps; ++step) count(load(from + step * kThreads));
    }
  }
  // The first pass counts while the counters of all blocks are cleared.
  if constexpr (kPass == 0) wait_for_launch();
  __syncthreads();
  for (uint32_t digit = threadIdx.x; digit < kCounts; digit += kThreads) {
    if (shared.counts[digit] != 0) atomicAdd(&state->counts[counts_before<T>(kPass) + digit], shared.counts[digit]);
  }
  if constexpr (kPass == 0 || kPass == kPasses<T> - 1) {
    least = find_least(least, shared.least);
    if (threadIdx.x == 0) atomicMin(kPass == 0 ? &state->low : &state->next, static_cast<Key>(least));
  }
  if constexpr (kPass == 0) {
    __syncthreads();
    greatest = ~find_least(static_cast<Bits>(~greatest), shared.least);
    if (threadIdx.x == 0) atomicMax(&state->high, static_cast<Key>(greatest));
  }
}

template <class T, int kPass = 0>
void launch_passes(const RegionsJob& job, const RegionsLaunches& how) {
  const unsigned blocks = count_blocks(job.count, kPixels<T>, how.most_blocks);
  launch(how.of("select_kernel", blocks, kThreads, sizeof(SelectShared<T, kPass>)), select_kernel<T, kPass>, job);
  if constexpr (kPass + 1 < kPasses<T>) launch_passes<T, kPass + 1>(job, how);
}

}  // namespace

void launch_select(const RegionsJob& job, bool is_double, const RegionsLaunches& how) {
  // What ran before may still use the outcome, or the scratch: this launch waits for its end.
  launch({"clear_kernel", kMostCounts / kClearedCounts, kBlockThreads, 0, how.stream}, clear_kernel, job);
  if (job.count == 0) return;
  is_double ? launch_passes<double>(job, how) : launch_passes<float>(job, how);
}

}  // namespace carve
