// Threads for the kernels without torch: always two, also for little work.

#include "cpu/parallel.h"

#include <thread>

namespace carve {

void parallel_parts(int64_t count, int64_t /*grain*/, void (*body)(void*, int64_t, int64_t), void* context) {
  const int64_t half = count / 2;
  std::thread other;
  if (half > 0) other = std::thread(body, context, 0, half);
  if (count > 0) body(context, half, count);
  if (other.joinable()) other.join();
}

}  // namespace carve
