// Tests the emulator itself: correct kernels run in every order, and faulty ones fail with the right message.

#include <cstdio>
#include <functional>
#include <string>

#include "cuda/launch.cuh"

namespace {

constexpr int kThreads = 64;

struct Shared {
  float values[kThreads];
};

__global__ void add_up(const float* from, float* to) {
  Shared& shared = carve::block_shared<Shared>();
  const int thread = threadIdx.x;
  shared.values[thread] = carve::load(from + thread);
  __syncthreads();
  float sum = shared.values[kThreads - 1 - thread];
  for (int lane = 16; lane > 0; lane /= 2) sum += __shfl_xor_sync(carve::kAllLanes, sum, lane);
  __syncthreads();
  if (thread % 32 == 0) shared.values[thread / 32] = sum;
  __syncthreads();
  if (thread == 0) carve::store(to + blockIdx.x, shared.values[0] + shared.values[1]);
}

__global__ void shuffle(int* to) {
  const int lane = threadIdx.x % 32;
  int result = __shfl_up_sync(carve::kAllLanes, lane, 3) * 1000 + __shfl_down_sync(carve::kAllLanes, lane, 30);
  result += __shfl_sync(carve::kAllLanes, lane, 7) * 1000000;
  if (__ballot_sync(carve::kAllLanes, lane % 5 == 0) != 0x42108421u) result = -1;
  if (__any_sync(carve::kAllLanes, lane == 40) || !__all_sync(carve::kAllLanes, lane < 32)) result = -1;
  carve::store(to + threadIdx.x, result);
}

__global__ void read_poison(float* to) {
  carve::store(to + threadIdx.x, carve::block_shared<Shared>().values[threadIdx.x]);
}

__global__ void leave_early(float*) {
  if (threadIdx.x != 9) __syncthreads();
}

__global__ void wait_elsewhere(float*) {
  if (threadIdx.x < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}

__global__ void half_a_warp(float* to) {
  if (threadIdx.x % 32 < 16) carve::store(to, __shfl_sync(0xffffu, 1.0f, 0));
}

__global__ void misaligned(float* to) {
  carve::store(to, carve::load(reinterpret_cast<const float4*>(to + 1)).x);
}

__global__ void too_much(float* to) {
  struct Larger {
    float values[kThreads + 1];
  };
  carve::store(to, carve::block_shared<Larger>().values[0]);
}

// An addition of another block between the load and the store is lost.
__global__ void add_without_an_atomic(float* to) {
  if (threadIdx.x == 0) carve::store(to, carve::load_coherent(to) + 1.0f);
}

__global__ void add_with_an_atomic(float* to) {
  if (threadIdx.x == 0) atomicAdd(reinterpret_cast<int*>(to), 1);
}

int failures = 0;

void expect(bool holds, const char* what) {
  if (holds) return;
  std::printf("failed: %s\n", what);
  ++failures;
}

template <typename... T>
std::string error_of(unsigned blocks, unsigned threads, size_t shared, void (*kernel)(T...), T... arguments) {
  try {
    carve::launch({"kernel", dim3(blocks), dim3(threads), shared, nullptr}, kernel, arguments...);
  } catch (const std::runtime_error& error) {
    return error.what();
  }
  return "";
}

bool has(const std::string& text, const char* part) { return text.find(part) != std::string::npos; }

void run_correct_kernels() {
  float from[kThreads], to[kThreads];
  float sum = 0.0f;
  for (int i = 0; i < kThreads; ++i) sum += from[i] = static_cast<float>(i * i);
  const std::string error = error_of(5, kThreads, sizeof(Shared), add_up, static_cast<const float*>(from), &to[0]);
  expect(error.empty(), "a correct kernel runs");
  for (int block = 0; block < 5; ++block) expect(to[block] == sum, "every block adds up");
  int results[kThreads];
  expect(error_of(1, kThreads, 0, shuffle, static_cast<int*>(results)).empty(), "warp operations run");
  for (int lane = 0; lane < 32; ++lane) {
    const int expected = (lane < 3 ? lane : lane - 3) * 1000 + (lane < 2 ? lane + 30 : lane) + 7000000;
    expect(results[lane] == expected && results[lane + 32] == expected, "each lane receives the values of the others");
  }
  error_of(1, kThreads, sizeof(Shared), read_poison, static_cast<float*>(to));
  for (float value : to) expect(value != value, "shared memory starts as NaN");
}

void run_faulty_kernels() {
  alignas(16) float memory[kThreads] = {};
  float* to = memory;
  expect(has(error_of(1, kThreads, 0, leave_early, to), "deadlock: 63 threads wait"), "a thread that returns early");
  expect(has(error_of(1, kThreads, 0, wait_elsewhere, to), "divergence: threads wait at lines"), "two barriers");
  expect(has(error_of(1, kThreads, 0, half_a_warp, to), "without all lanes"), "a part of a warp");
  expect(has(error_of(1, 32, 0, misaligned, to), "misaligned address"), "a misaligned address");
  expect(has(error_of(1, kThreads, sizeof(Shared), too_much, to), "less shared memory"), "shared memory");
  expect(has(error_of(1, 40, 0, leave_early, to), "whole warps"), "a block with a part of a warp");
  expect(has(error_of(0, 32, 0, leave_early, to), "invalid configuration"), "a grid without blocks");
  emulator_configure(emulated::kForward, 1, 1, 1);
  expect(has(error_of(1, 32, 0, misaligned, to), "kernel: planted failure"), "a launch that fails");
}

void run_races() {
  for (unsigned seed = 1; seed <= 3; ++seed) {
    float plain = 0.0f, atomic = 0.0f;
    emulator_configure(emulated::kShuffled, 64, seed, 0);
    error_of(64, 32, 0, add_without_an_atomic, &plain);
    error_of(64, 32, 0, add_with_an_atomic, &atomic);
    expect(plain < 64.0f, "an addition is lost between blocks");
    expect(emulated::bits<int>(atomic) == 64, "an atomic addition is not lost");
  }
}

}  // namespace

int main() {
  for (emulated::Order order : {emulated::kForward, emulated::kReverse, emulated::kShuffled}) {
    for (unsigned resident : {1u, 3u}) {
      emulator_configure(order, resident, 5, 0);
      run_correct_kernels();
      run_faulty_kernels();
    }
  }
  run_races();
  std::printf("%d failures\n", failures);
  return failures == 0 ? 0 : 1;
}
