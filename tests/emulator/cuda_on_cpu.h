// Runs CUDA kernels on the CPU, for tests only. Shared memory starts as NaN; warp operations need all 32 lanes; threads
// that wait at different barriers, or return while others wait, are an error. The threads of all resident blocks are
// interleaved: they switch at atomics and, in shuffled order, at some loads and stores.
// It models neither speed nor registers, nor the order in which other blocks see plain stores without a fence; under
// ThreadSanitizer a missing fence is a race.
#pragma once

#include <cmath>
#include <tuple>

#include "fibers.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define __align__(bytes) alignas(bytes)

#define EMULATED_VECTOR(type, name)                                             \
  struct alignas(2 * sizeof(type)) name##2 { type x, y; };                      \
  struct alignas(sizeof(type) < 8 ? 4 * sizeof(type) : 16) name##4 { type x, y, z, w; }; \
  inline name##2 make_##name##2(type x, type y) { return {x, y}; }              \
  inline name##4 make_##name##4(type x, type y, type z, type w) { return {x, y, z, w}; }
EMULATED_VECTOR(int, int)
EMULATED_VECTOR(unsigned, uint)
EMULATED_VECTOR(float, float)
EMULATED_VECTOR(double, double)

namespace emulated {

// Not macros: cudaLaunchConfig_t has members of the same names.
template <const dim3& (*Get)()>
struct Index {
  template <unsigned dim3::*Part>
  struct One {
    operator unsigned() const { return Get().*Part; }
  };
  One<&dim3::x> x;
  One<&dim3::y> y;
  One<&dim3::z> z;
};
inline const dim3& thread_index() { return me().index; }
inline const dim3& block_index() { return me().block->index; }
inline const dim3& block_size() { return machine().block; }
inline const dim3& grid_size() { return machine().grid; }

template <typename To, typename From>
To bits(From value) {
  static_assert(sizeof(To) == sizeof(From));
  To result;
  std::memcpy(&result, &value, sizeof(result));
  return result;
}

// Read back from memory, so that no compiler fuses this product or sum with another.
template <typename T>
T rounded(T value) {
  const volatile T stored = value;
  return stored;
}

// The `value` of lane source(lane).
template <typename T, typename Source>
T exchange(unsigned mask, T value, Source source, const char* file, int line) {
  static_assert(sizeof(T) <= 32);
  Unwatched unwatched;
  if (mask != 0xffffffffu) fail("a warp operation without all lanes");
  Warp& warp = me().block->warps[me().linear / kWarp];
  auto& slots = warp.slots[warp.meeting.generation & 1];
  std::memcpy(slots[me().linear % kWarp], &value, sizeof(T));
  meet(warp.meeting, file, line);
  T result;
  std::memcpy(&result, slots[source(me().linear % kWarp)], sizeof(T));
  return result;
}

template <typename T>
void touch(const T* address, int64_t& counter) {
  {
    Unwatched unwatched;
    if (reinterpret_cast<uintptr_t>(address) % alignof(T) != 0) fail("misaligned address");
    counter += sizeof(T);
  }
  maybe_switch(8);
}

inline bool is_shared(const void* address) {
  const unsigned char* begin = me().block->shared.get();
  return address >= begin && address < begin + machine().shared_bytes;
}

template <typename T, typename Change>
T atomically(T* address, Change change) {
  if (!is_shared(address)) check_waited();
  maybe_switch(1);
  T before = __atomic_load_n(address, __ATOMIC_RELAXED);
  while (!__atomic_compare_exchange_n(address, &before, change(before), false, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
  }
  maybe_switch(1);
  return before;
}

}  // namespace emulated

inline const emulated::Index<emulated::thread_index> threadIdx;
inline const emulated::Index<emulated::block_index> blockIdx;
inline const emulated::Index<emulated::block_size> blockDim;
inline const emulated::Index<emulated::grid_size> gridDim;

#define EMULATED_HERE const char *file = __builtin_FILE(), int line = __builtin_LINE()

inline void __syncthreads(EMULATED_HERE) { emulated::meet(emulated::me().block->barrier, file, line); }
inline void __syncwarp(unsigned mask = ~0u, EMULATED_HERE) {
  emulated::exchange(mask, 0, [](unsigned lane) { return lane; }, file, line);
}
template <typename T>
T __shfl_sync(unsigned mask, T value, int from, EMULATED_HERE) {
  return emulated::exchange(mask, value, [=](unsigned) { return unsigned(from) % 32; }, file, line);
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int with, EMULATED_HERE) {
  return emulated::exchange(mask, value, [=](unsigned lane) { return (lane ^ unsigned(with)) % 32; }, file, line);
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned by, EMULATED_HERE) {
  return emulated::exchange(mask, value, [=](unsigned lane) { return lane + by < 32 ? lane + by : lane; }, file, line);
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned by, EMULATED_HERE) {
  return emulated::exchange(mask, value, [=](unsigned lane) { return lane >= by ? lane - by : lane; }, file, line);
}
inline unsigned __ballot_sync(unsigned mask, int predicate, EMULATED_HERE) {
  emulated::Warp& warp = emulated::me().block->warps[emulated::me().linear / 32];
  auto& slots = warp.slots[warp.meeting.generation & 1];
  emulated::exchange(mask, predicate, [](unsigned lane) { return lane; }, file, line);
  emulated::Unwatched unwatched;
  unsigned result = 0;
  for (unsigned lane = 0; lane < 32; ++lane) result |= unsigned(*reinterpret_cast<int*>(slots[lane]) != 0) << lane;
  return result;
}
inline int __any_sync(unsigned mask, int predicate, EMULATED_HERE) {
  return __ballot_sync(mask, predicate, file, line) != 0;
}
inline int __all_sync(unsigned mask, int predicate, EMULATED_HERE) {
  return __ballot_sync(mask, predicate, file, line) == ~0u;
}

#define EMULATED_ATOMIC(name, change)                                        \
  template <typename T>                                                      \
  T name(T* address, T value) {                                              \
    return emulated::atomically(address, [=](T before) -> T { return change; }); \
  }
EMULATED_ATOMIC(atomicAdd, before + value)
EMULATED_ATOMIC(atomicSub, before - value)
EMULATED_ATOMIC(atomicMin, value < before ? value : before)
EMULATED_ATOMIC(atomicMax, value > before ? value : before)
EMULATED_ATOMIC(atomicOr, before | value)
EMULATED_ATOMIC(atomicAnd, before& value)
EMULATED_ATOMIC(atomicExch, ((void)before, value))
template <typename T>
T atomicCAS(T* address, T compare, T value) {
  return emulated::atomically(address, [=](T before) { return before == compare ? value : before; });
}
inline void __threadfence() {
  emulated::acquire(emulated::machine().fence);
  emulated::release(emulated::machine().fence);
}

using std::max;
using std::min;
inline float __int_as_float(int value) { return emulated::bits<float>(value); }
inline float __uint_as_float(unsigned value) { return emulated::bits<float>(value); }
inline int __float_as_int(float value) { return emulated::bits<int>(value); }
inline unsigned __float_as_uint(float value) { return emulated::bits<unsigned>(value); }
inline double __longlong_as_double(long long value) { return emulated::bits<double>(value); }
inline long long __double_as_longlong(double value) { return emulated::bits<long long>(value); }
inline int __popc(unsigned value) { return __builtin_popcount(value); }
inline int __popcll(unsigned long long value) { return __builtin_popcountll(value); }
inline int __ffs(int value) { return __builtin_ffs(value); }
inline int __clz(int value) { return value == 0 ? 32 : __builtin_clz(unsigned(value)); }
inline int __clzll(long long value) { return value == 0 ? 64 : __builtin_clzll(uint64_t(value)); }
inline float __fadd_rn(float a, float b) { return emulated::rounded(a + b); }
inline float __fsub_rn(float a, float b) { return emulated::rounded(a - b); }
inline float __fmul_rn(float a, float b) { return emulated::rounded(a * b); }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline double __dadd_rn(double a, double b) { return emulated::rounded(a + b); }
inline double __dsub_rn(double a, double b) { return emulated::rounded(a - b); }
inline double __dmul_rn(double a, double b) { return emulated::rounded(a * b); }
inline double __ddiv_rn(double a, double b) { return a / b; }
inline long long __double2ll_rn(double value) { return std::llrint(value); }

struct __half { uint16_t data; };
struct __nv_bfloat16 { uint16_t data; };
inline __half __ushort_as_half(unsigned short value) { return {value}; }
inline float __half2float(__half value) { return static_cast<float>(emulated::bits<_Float16>(value.data)); }
inline float __bfloat162float(__nv_bfloat16 value) { return __uint_as_float(unsigned(value.data) << 16); }

enum cudaError_t { cudaSuccess, cudaErrorLaunchFailure, cudaErrorPlanted };
using cudaStream_t = void*;
enum cudaLaunchAttributeID { cudaLaunchAttributeProgrammaticStreamSerialization };
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct { int programmaticStreamSerializationAllowed; } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
  cudaLaunchAttribute* attrs = nullptr;
  unsigned numAttrs = 0;
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
struct cudaFuncAttributes { int ptxVersion; };

namespace emulated {
// The number of runtime calls until one fails; none fails if it starts at 0.
inline int& planted_failure() {
  static int calls_left = 0;
  return calls_left;
}
inline cudaError_t called() { return --planted_failure() == 0 ? cudaErrorPlanted : cudaSuccess; }
}  // namespace emulated

inline const char* cudaGetErrorString(cudaError_t error) {
  if (error == cudaErrorPlanted) return "planted failure";
  return error == cudaSuccess ? "no error" : emulated::machine().error.c_str();
}
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, emulated::called(); }
inline cudaError_t cudaSetDevice(int) { return emulated::called(); }
inline cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) { return emulated::called(); }
inline cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* of, const void*) { return of->ptxVersion = 90, cudaSuccess; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaMemsetAsync(void* address, int value, size_t bytes, cudaStream_t) {
  std::memset(address, value, bytes);
  return emulated::called();
}
template <typename... Wanted, typename... Given>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Wanted...), Given&&... given) {
  if (emulated::called() != cudaSuccess) return cudaErrorPlanted;
  const std::tuple<Wanted...> arguments(std::forward<Given>(given)...);
  const bool overlaps = config->numAttrs > 0 && config->attrs[0].val.programmaticStreamSerializationAllowed != 0;
  const std::string error = emulated::run(config->gridDim, config->blockDim, config->dynamicSmemBytes, overlaps,
                                          [&] { std::apply(kernel, arguments); });
  emulated::machine().error = error;
  return error.empty() ? cudaSuccess : cudaErrorLaunchFailure;
}

namespace carve {

constexpr unsigned kAllLanes = 0xffffffffu;

template <typename T>
T load(const T* address) {
  emulated::touch(address, emulated::machine().counters.read_bytes);
  return *address;
}
template <typename T>
T load_uniform(const T* address) {
  int64_t uncounted = 0;
  const bool leads = emulated::me().linear % emulated::kWarp == 0;
  emulated::touch(address, leads ? emulated::machine().counters.read_bytes : uncounted);
  return *address;
}
template <typename T>
T load_coherent(const T* address) {
  emulated::check_waited();
  emulated::touch(address, emulated::machine().counters.read_bytes);
  static_assert(sizeof(T) % 4 == 0);
  T value;
  for (size_t word = 0; word < sizeof(T) / 4; ++word) {
    const uint32_t part = __atomic_load_n(reinterpret_cast<const uint32_t*>(address) + word, __ATOMIC_RELAXED);
    std::memcpy(reinterpret_cast<char*>(&value) + 4 * word, &part, 4);
  }
  return value;
}
template <typename T>
T load_settled(const T* address) {
  emulated::check_waited();
  return load(address);
}
template <typename T>
void store(T* address, T value) {
  emulated::check_waited();
  emulated::touch(address, emulated::machine().counters.written_bytes);
  *address = value;
}
inline uint4 load_stream(const void* address) { return load(static_cast<const uint4*>(address)); }
inline const char* computed(const char* address) { return address; }
inline float computed(float value) { return value; }
inline uint4 load_shared(const uint4* address) { return *address; }
inline int load_shared(const int* address) {
  emulated::maybe_switch(8);
  return __atomic_load_n(address, __ATOMIC_RELAXED);
}
inline float exp2_fast(float x) { return std::exp2(x); }
inline void fence() { __threadfence(); }
inline void start_next_launch() {}
inline void wait_for_launch() { emulated::me().has_waited = true; }

inline float half_of(unsigned word, int which, __half) {
  return __half2float(__ushort_as_half(static_cast<unsigned short>(word >> 16 * which)));
}
inline float half_of(unsigned word, int which, __nv_bfloat16) {
  return emulated::bits<float>(which == 0 ? word << 16 : word & 0xffff0000u);
}

inline unsigned pack(float low, float high, __nv_bfloat16) {
  const auto rounded = [](float value) -> unsigned {
    const unsigned bits = emulated::bits<unsigned>(value);
    // To nearest, ties to even; a NaN keeps its upper bits.
    return value != value ? bits >> 16 | 0x40 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  };
  return rounded(low) | rounded(high) << 16;
}
inline unsigned pack(float low, float high, __half) {
  const auto rounded = [](float value) -> unsigned { return emulated::bits<uint16_t>(static_cast<_Float16>(value)); };
  return rounded(low) | rounded(high) << 16;
}
inline unsigned low_halves(unsigned first, unsigned second) { return (first & 0xffff) | second << 16; }
inline unsigned high_halves(unsigned first, unsigned second) { return first >> 16 | (second & 0xffff0000u); }

// As csrc/cuda/device.cuh describes it. The values of a row of `a` are in four lanes, as are those of a column of `b`.
template <typename Element>
void multiply_add(float (&sums)[4], const uint4& a, unsigned b0, unsigned b1, Element element, EMULATED_HERE) {
  struct Words {
    unsigned a[4], b[2];
  };
  emulated::Warp& warp = emulated::me().block->warps[emulated::me().linear / 32];
  auto& slots = warp.slots[warp.meeting.generation & 1];
  emulated::exchange(kAllLanes, Words{{a.x, a.y, a.z, a.w}, {b0, b1}}, [](unsigned lane) { return lane; }, file, line);
  emulated::Unwatched unwatched;
  const unsigned lane = emulated::me().linear % 32, g = lane / 4, t = lane % 4;
  for (unsigned step = 0; step < 2; ++step) {
    for (unsigned other = 0; other < 4; ++other) {
      Words row, columns[2];
      std::memcpy(&row, slots[4 * g + other], sizeof(row));
      for (unsigned c = 0; c < 2; ++c) std::memcpy(&columns[c], slots[4 * (2 * t + c) + other], sizeof(row));
      for (int which = 0; which < 2; ++which) {
        for (unsigned i = 0; i < 4; ++i) {
          sums[i] += half_of(row.a[2 * step + i / 2], which, element) * half_of(columns[i % 2].b[step], which, element);
        }
      }
    }
  }
}

template <typename T>
T& block_shared() {
  if (sizeof(T) > emulated::machine().shared_bytes) emulated::fail("less shared memory than the kernel uses");
  return *reinterpret_cast<T*>(emulated::me().block->shared.get());
}

}  // namespace carve

// The interface of the tests.
extern "C" {
__attribute__((used, visibility("default"))) inline void emulator_configure(int order, unsigned resident, unsigned seed,
                                                                            int fail) {
  emulated::Machine& m = emulated::machine();
  m.order = static_cast<emulated::Order>(order), m.resident = resident, m.seed = seed;
  emulated::planted_failure() = fail;
}
__attribute__((used, visibility("default"))) inline void emulator_counters(int64_t* counters, bool reset) {
  emulated::Counters& now = emulated::machine().counters;
  std::memcpy(counters, &now, sizeof(now));
  if (reset) now = {};
}
}
