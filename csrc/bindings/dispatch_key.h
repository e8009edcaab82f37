// The dispatch key that the CUDA operators register for.
#pragma once

// The tests run the kernels on a CPU, with CPU tensors.
#ifndef CARVE_CUDA_KEY
#define CARVE_CUDA_KEY CUDA
#endif

// The second macro expands the key: STABLE_TORCH_LIBRARY_IMPL would paste the name CARVE_CUDA_KEY.
#define CARVE_CUDA_LIBRARY(module) CARVE_CUDA_LIBRARY_OF(CARVE_CUDA_KEY, module)
#define CARVE_CUDA_LIBRARY_OF(key, module) STABLE_TORCH_LIBRARY_IMPL(carve_kernels, key, module)
