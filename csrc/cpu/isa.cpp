#include "isa.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

#if CARVE_X86 && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace carve {
namespace {

constexpr const char* kVariable = "CARVE_KERNELS_CPU";
constexpr const char* kNames[] = {"plain", "avx2", "avx512", "amx"};  // in the order of Isa

bool has_amx() {
#if CARVE_X86 && defined(__linux__)
  constexpr unsigned kAmxBf16 = 1u << 22;
  constexpr unsigned kAmxTile = 1u << 24;
  constexpr long kRequestPermission = 0x1023;  // ARCH_REQ_XCOMP_PERM
  constexpr long kTileData = 18;
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & kAmxBf16) == 0 || (d & kAmxTile) == 0) return false;
  // Without the kernel's permission, which holds for the whole process, the first tile instruction is a fault.
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

Isa best_isa() {
#if CARVE_X86
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl")) {
    return has_amx() ? Isa::kAmx : Isa::kAvx512;
  }
  if (__builtin_cpu_supports("avx2")) return Isa::kAvx2;
#endif
  return Isa::kPlain;
}

}  // namespace

Isa chosen_isa() {
  static const Isa best = best_isa();
  const char* name = std::getenv(kVariable);
  if (name == nullptr || *name == '\0') return best;
  for (int index = 0; index <= static_cast<int>(Isa::kAmx); ++index) {
    if (std::string(name) != kNames[index]) continue;
    if (index <= static_cast<int>(best)) return static_cast<Isa>(index);
    throw std::runtime_error(std::string(kVariable) + "=" + name + ": this machine has no more than " +
                             kNames[static_cast<int>(best)]);
  }
  throw std::runtime_error(std::string(kVariable) + ": expected plain, avx2, avx512 or amx, got " + name);
}

}  // namespace carve
