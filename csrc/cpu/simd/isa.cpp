#include "cpu/simd/isa.h"

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#ifdef CARVE_X86
#include <cpuid.h>
#endif
#if defined(CARVE_X86) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace carve {
namespace {

constexpr const char* kNames[] = {"plain", "avx2", "avx512", "avx512_bf16", "amx"};
constexpr int kCount = sizeof(kNames) / sizeof(kNames[0]);
constexpr int kUndecided = -1;
std::atomic<int> chosen{kUndecided};

#if defined(CARVE_X86) && defined(__linux__)
// Linux does not enable tile registers for a process that has not requested them: their first use would raise SIGILL.
bool request_tiles() {
  constexpr unsigned kTileBf16 = (1u << 22) | (1u << 24);
  constexpr int kRequestPermission = 0x1023;
  constexpr int kTileData = 18;
  unsigned eax = 0;
  unsigned ebx = 0;
  unsigned ecx = 0;
  unsigned edx = 0;
  if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) || (edx & kTileBf16) != kTileBf16) return false;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}
#else
[[maybe_unused]] bool request_tiles() { return false; }
#endif

// A machine with tiles has these as well, unless its hypervisor hides them.
bool has_pair_products() {
#ifdef CARVE_X86
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx512bf16");
#else
  return false;
#endif
}

Isa detect() {
#ifdef CARVE_X86
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (avx512 && request_tiles()) return Isa::kAmx;
  if (avx512) return has_pair_products() ? Isa::kAvx512Bf16 : Isa::kAvx512;
  if (avx2) return Isa::kAvx2;
#endif
  return Isa::kPlain;
}

int check_available(int number, const std::string& name) {
  const int best = static_cast<int>(best_isa());
  if (number > best) {
    throw std::runtime_error("CARVE_KERNELS_CPU: expected at most '" + std::string(kNames[best]) +
                             "' on this machine, got '" + name + "'");
  }
  if (static_cast<Isa>(number) == Isa::kAvx512Bf16 && !has_pair_products()) {
    throw std::runtime_error("CARVE_KERNELS_CPU: expected 'avx512' or 'amx' on this machine, which lacks AVX512_BF16, "
                             "got '" + name + "'");
  }
  return number;
}

int from_environment() {
  const char* name = std::getenv("CARVE_KERNELS_CPU");
  if (name == nullptr || *name == '\0') return static_cast<int>(best_isa());
  for (int number = 0; number < kCount; ++number) {
    if (std::strcmp(name, kNames[number]) == 0) return check_available(number, name);
  }
  throw std::runtime_error("CARVE_KERNELS_CPU: expected one of 'plain', 'avx2', 'avx512', 'avx512_bf16', 'amx', got '" +
                           std::string(name) + "'");
}

}  // namespace

Isa best_isa() {
  static const Isa best = detect();
  return best;
}

Isa active_isa() {
  int number = chosen.load(std::memory_order_relaxed);
  if (number == kUndecided) {
    number = from_environment();
    chosen.store(number, std::memory_order_relaxed);
  }
  return static_cast<Isa>(number);
}

void force_isa(int64_t number) {
  if (number >= kCount) {
    throw std::runtime_error("isa: expected a number up to " + std::to_string(kCount - 1) + ", got " +
                             std::to_string(number));
  }
  const int wanted = number < 0 ? kUndecided : static_cast<int>(number);
  chosen.store(wanted < 0 ? kUndecided : check_available(wanted, kNames[wanted]), std::memory_order_relaxed);
}

}  // namespace carve
