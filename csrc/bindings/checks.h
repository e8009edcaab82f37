// Checks of an operator's tensors before it takes their pointers.
#pragma once

#include <cstdint>

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

namespace carve {

inline void check_tensor(const torch::stable::Tensor& tensor, const char* op, const char* name, int64_t dims,
                         torch::headeronly::ScalarType dtype) {
  STD_TORCH_CHECK(tensor.dim() == dims, op, ": ", name, ": expected ", dims, " dimensions, got ", tensor.dim());
  STD_TORCH_CHECK(tensor.scalar_type() == dtype, op, ": ", name, ": unexpected dtype");
  STD_TORCH_CHECK(tensor.is_contiguous(), op, ": ", name, ": expected a contiguous tensor");
}

}  // namespace carve
