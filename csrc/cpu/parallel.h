// Threads for the kernels: torch's pool in the extension, plain threads in the programs of tests/native.
#pragma once

#include <cstdint>

namespace carve {

// For passes that take about a nanosecond per pixel: with fewer pixels, waiting for a second thread on a busy machine
// takes longer than the pass.
constexpr int64_t kPixelsPerPart = 1 << 20;

// Defined in bindings/parallel.cpp and tests/native/parallel.cpp. Calls body(context, begin, end) for ranges that cover
// [0, count), of at least `grain` each.
void parallel_parts(int64_t count, int64_t grain, void (*body)(void*, int64_t, int64_t), void* context);

// Calls body(begin, end). The ranges depend on the number of threads; results must not.
template <class Body>
void parallel_for(int64_t count, int64_t grain, const Body& body) {
  const auto call = [](void* context, int64_t begin, int64_t end) { (*static_cast<const Body*>(context))(begin, end); };
  parallel_parts(count, grain, call, const_cast<void*>(static_cast<const void*>(&body)));
}

}  // namespace carve
