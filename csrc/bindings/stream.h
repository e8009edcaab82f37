// The current CUDA stream of torch, which the library does not link against where torch may have no CUDA.
#pragma once

#include <cstdint>

#include <dlfcn.h>

#include <torch/headeronly/util/Exception.h>

namespace carve {

// The handle of the current stream of a device: null, the default stream, for -1, a CPU.
inline void* current_stream(int32_t device) {
  // aoti_torch_get_current_cuda_stream of torch 2.10 or newer. Python's extensions are loaded without their symbols
  // becoming global, so that the library itself is asked second.
  using Find = int32_t (*)(int32_t device, void** stream);
  static const Find find = [] {
    const char* name = "aoti_torch_get_current_cuda_stream";
    void* symbol = dlsym(RTLD_DEFAULT, name);
    if (symbol == nullptr) {
      void* library = dlopen("libtorch_cuda.so", RTLD_NOLOAD | RTLD_LAZY);
      symbol = library == nullptr ? nullptr : dlsym(library, name);
    }
    return reinterpret_cast<Find>(symbol);
  }();
  if (device < 0) return nullptr;
  STD_TORCH_CHECK(find != nullptr, "the current stream: expected torch 2.10 or newer with CUDA in this process");
  void* stream = nullptr;
  STD_TORCH_CHECK(find(device, &stream) == 0, "the current stream: torch knows none of device ", device);
  return stream;
}

}  // namespace carve
