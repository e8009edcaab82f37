// The dispatch key that the operators of the device register for.
#pragma once

// The tests run the kernels on a CPU, and there the tensors are a CPU's.
#ifndef CARVE_CUDA_KEY
#define CARVE_CUDA_KEY CUDA
#endif

// One more expansion, so that the key and not the macro's name is registered.
#define CARVE_CUDA_LIBRARY(module) CARVE_CUDA_LIBRARY_OF(CARVE_CUDA_KEY, module)
#define CARVE_CUDA_LIBRARY_OF(key, module) STABLE_TORCH_LIBRARY_IMPL(carve_kernels, key, module)
