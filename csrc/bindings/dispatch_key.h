// The namespace and the dispatch key that the CUDA operators register for.
#pragma once

// The tests run the kernels on a CPU, with CPU tensors, under names of their own.
#ifndef CARVE_CUDA_NAMESPACE
#define CARVE_CUDA_NAMESPACE carve_kernels
#endif
#ifndef CARVE_CUDA_KEY
#define CARVE_CUDA_KEY CUDA
#endif

// The inner macros expand the names: STABLE_TORCH_LIBRARY_IMPL would paste CARVE_CUDA_NAMESPACE and CARVE_CUDA_KEY.
#define CARVE_CUDA_LIBRARY(module) CARVE_LIBRARY_OF(CARVE_CUDA_NAMESPACE, CARVE_CUDA_KEY, module)
// For operators about the kernels whose tensors are on the CPU.
#define CARVE_CUDA_HOST_LIBRARY(module) CARVE_LIBRARY_OF(CARVE_CUDA_NAMESPACE, CPU, module)
#define CARVE_LIBRARY_OF(space, key, module) STABLE_TORCH_LIBRARY_IMPL(space, key, module)
