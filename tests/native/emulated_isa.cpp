// In place of isa.cpp for programs with emulated kernels: every machine has AVX-512 and AVX512_BF16.

#include "cpu/simd/isa.h"

namespace carve {
namespace {

int64_t chosen = 0;

}  // namespace

Isa best_isa() { return Isa::kAvx512Bf16; }

// AVX2 is not emulated, and this machine may lack it.
Isa active_isa() { return chosen == static_cast<int64_t>(Isa::kAvx2) ? Isa::kPlain : static_cast<Isa>(chosen); }

void force_isa(int64_t number) { chosen = number; }

}  // namespace carve
