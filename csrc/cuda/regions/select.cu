// Radix selection of the value at a rank: each pass counts one digit of the values whose leading digits match.

#include "cuda/regions/regions.cuh"

namespace carve {
namespace {

struct SelectShared {
  uint32_t counts[kDigits];
  PickShared pick;
};

// One block per pass. The outcome starts as the empty union of boxes, which regions then widen.
__global__ void __launch_bounds__(kBlockThreads) clear_kernel(const __grid_constant__ RegionsJob job) {
  start_next_launch();
  RegionsState* state = job.state;
  for (uint32_t digit = threadIdx.x; digit < kDigits; digit += kBlockThreads) {
    store(&state->counts[blockIdx.x][digit], uint32_t(0));
  }
  if (blockIdx.x != 0 || threadIdx.x != 0) return;
  store(&state->low, ~Key(0));
  store(&state->high, Key(0));
  store(&state->next, ~Key(0));
  store(&state->prefix[0], Key(0));
  store(&state->rank[0], job.rank);
  store(&state->parts, uint32_t(0));
  store(&state->regions, uint32_t(0));
  const bool is_empty = job.count == 0;
  store(&state->reason, static_cast<int32_t>(is_empty ? Reason::kEmpty : Reason::kNone));
  store(job.outcome + 0, int64_t(0));
  store(job.outcome + 1, static_cast<int64_t>(is_empty ? Reason::kEmpty : Reason::kNone));
  store(job.outcome + 2, static_cast<int64_t>(is_empty ? 0 : job.width));
  store(job.outcome + 3, static_cast<int64_t>(is_empty ? 0 : job.height));
  store(job.outcome + 4, static_cast<int64_t>(is_empty ? job.width : 0));
  store(job.outcome + 5, static_cast<int64_t>(is_empty ? job.height : 0));
}

template <class Bits>
__device__ __forceinline__ void reduce_min(Key* address, Bits least) {
  for (int with = 16; with > 0; with /= 2) {
    const Bits other = __shfl_xor_sync(kAllLanes, least, with);
    least = other < least ? other : least;
  }
  if (lane_of_thread() == 0 && least != ~Bits(0)) atomicMin(address, static_cast<Key>(least));
}

template <class T>
__device__ __forceinline__ void load_keys(const RegionsJob& job, uint32_t start, BitsOf<T> (&keys)[kSteps]) {
  const T* values = static_cast<const T*>(job.saliency);
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    const uint32_t pixel = start + step * kBlockThreads + threadIdx.x;
    keys[step] = pixel < job.count ? key_of(load(values + pixel)) : 0;
  }
}

// The digits that are known before a pass, which hands them on. Called by all threads of a block.
template <class Bits>
__device__ __forceinline__ Bits find_prefix(RegionsState* state, int pass, PickShared& shared) {
  const uint32_t rank = load_coherent(&state->rank[pass - 1]);
  const Key before = load_coherent(&state->prefix[pass - 1]);
  const PickedDigit picked = pick_digit(state->counts[pass - 1], rank, shared);
  const Bits prefix = static_cast<Bits>(before << kDigitBits) | picked.digit;
  if (blockIdx.x == 0 && threadIdx.x == 0) {
    store(&state->prefix[pass], static_cast<Key>(prefix));
    store(&state->rank[pass], picked.rank);
  }
  return prefix;
}

// Each block counts in shared memory: neighbouring pixels often have the same digit, and there increments of one
// counter by the lanes of a warp are a single operation, as long as no result is used.
template <class T>
__global__ void __launch_bounds__(kBlockThreads) select_kernel(const __grid_constant__ RegionsJob job, int pass) {
  using Bits = BitsOf<T>;
  auto& shared = block_shared<SelectShared>();
  RegionsState* state = job.state;
  start_next_launch();
  uint32_t start = blockIdx.x * kBlockPixels;
  Bits keys[kSteps];
  load_keys<T>(job, start, keys);
  for (uint32_t digit = threadIdx.x; digit < kDigits; digit += kBlockThreads) shared.counts[digit] = 0;
  Bits prefix = 0;
  if (pass > 0) {
    wait_for_launch();
    prefix = find_prefix<Bits>(state, pass, shared.pick);
  }
  __syncthreads();

  const int shift = shift_after<T>(pass);
  const int known = shift_before<T>(pass);
  const Bits digit_mask = (Bits(1) << (known - shift)) - 1;
  Bits least = ~Bits(0);
  Bits greatest = 0;
  while (true) {
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      if (start + step * kBlockThreads + threadIdx.x >= job.count) break;
      // Two shifts: before the first pass no bit is known, and a shift by the full width is undefined.
      const Bits leading = (keys[step] >> 1) >> (known - 1);
      if (leading == prefix) atomicAdd(&shared.counts[(keys[step] >> shift) & digit_mask], 1u);
      if ((pass == 0 || leading > prefix) && keys[step] < least) least = keys[step];
      if (keys[step] > greatest) greatest = keys[step];
    }
    start += gridDim.x * kBlockPixels;
    if (start >= job.count) break;
    load_keys<T>(job, start, keys);
  }
  // The first pass counts while the counters of all blocks are cleared.
  if (pass == 0) wait_for_launch();
  __syncthreads();
  for (uint32_t digit = threadIdx.x; digit < kDigits; digit += kBlockThreads) {
    if (shared.counts[digit] != 0) atomicAdd(&state->counts[pass][digit], shared.counts[digit]);
  }
  if (pass > 0 && pass < kPasses<T> - 1) return;
  reduce_min(pass == 0 ? &state->low : &state->next, least);
  if (pass > 0) return;
  for (int with = 16; with > 0; with /= 2) {
    const Bits other = __shfl_xor_sync(kAllLanes, greatest, with);
    greatest = other > greatest ? other : greatest;
  }
  if (lane_of_thread() == 0) atomicMax(&state->high, static_cast<Key>(greatest));
}

template <class T>
void launch_passes(const RegionsJob& job, const RegionsLaunches& how) {
  const unsigned blocks = count_blocks(job.count, kBlockPixels, how.most_blocks);
  for (int pass = 0; pass < kPasses<T>; ++pass) {
    launch(how.of("select_kernel", blocks, kBlockThreads, sizeof(SelectShared)), select_kernel<T>, job, pass);
  }
}

}  // namespace

void launch_select(const RegionsJob& job, bool is_double, const RegionsLaunches& how) {
  // What ran before may still use the outcome, or the scratch: this launch waits for its end.
  launch({"clear_kernel", kMostPasses, kBlockThreads, 0, how.stream}, clear_kernel, job);
  if (job.count == 0) return;
  is_double ? launch_passes<double>(job, how) : launch_passes<float>(job, how);
}

bool regions_wait_for_launch() {
  cudaFuncAttributes attributes{};
  check_cuda(cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(clear_kernel)), "cudaFuncGetAttributes");
  return attributes.ptxVersion >= 90;
}

}  // namespace carve
