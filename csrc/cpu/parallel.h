// Threads for the torch-free kernels: torch's own in the extension, plain ones where the kernels are tested alone.
#pragma once

#include <cstdint>

namespace carve {

// For passes that take about a nanosecond a pixel: on a busy machine the wait for a second thread is longer than a pass
// over fewer pixels.
constexpr int64_t kPixelsPerPart = 1 << 20;

// Defined by whoever links the kernels. Calls body(context, begin, end) for parts of [0, count) of at least `grain`.
void parallel_parts(int64_t count, int64_t grain, void (*body)(void*, int64_t, int64_t), void* context);

// Calls body(begin, end). How [0, count) is cut depends on the number of threads: results must not.
template <class Body>
void parallel_for(int64_t count, int64_t grain, const Body& body) {
  const auto call = [](void* context, int64_t begin, int64_t end) { (*static_cast<const Body*>(context))(begin, end); };
  parallel_parts(count, grain, call, const_cast<void*>(static_cast<const void*>(&body)));
}

}  // namespace carve
