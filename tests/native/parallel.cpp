// Threads for the kernels that are tested without torch: two, whatever the machine has.

#include "cpu/parallel.h"

#include <thread>

namespace carve {

void parallel_parts(int64_t count, int64_t grain, void (*body)(void*, int64_t, int64_t), void* context) {
  if (count <= 0) return;
  const int64_t half = count > grain ? count / 2 : 0;
  std::thread other;
  if (half > 0) other = std::thread(body, context, 0, half);
  body(context, half, count);
  if (other.joinable()) other.join();
}

}  // namespace carve
