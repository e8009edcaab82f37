// How the extension was built; the schemas are in carve_kernels/backends/native/schemas.py.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

// The build defines the architectures of the CUDA kernels where it compiles them: 80,90,
#ifdef CARVE_CUDA_ARCHITECTURES
// From the CUDA runtime, which is then linked in statically; only nvcc finds its headers.
extern "C" int cudaRuntimeGetVersion(int* version);
extern "C" int cudaDriverGetVersion(int* version);
#else
#define CARVE_CUDA_ARCHITECTURES
static int cudaRuntimeGetVersion(int*) { return 0; }
static int cudaDriverGetVersion(int*) { return 0; }
#endif

namespace {

constexpr int64_t kArchitectures[] = {CARVE_CUDA_ARCHITECTURES 0};
constexpr int64_t kCount = sizeof(kArchitectures) / sizeof(kArchitectures[0]) - 1;

void cuda_build(torch::stable::Tensor out) {
  STD_TORCH_CHECK(out.scalar_type() == torch::headeronly::ScalarType::Long && out.is_contiguous(),
                  "cuda_build: out: expected contiguous int64");
  STD_TORCH_CHECK(out.numel() >= kCount, "cuda_build: out: expected at least ", kCount, " elements");
  int64_t* to = out.mutable_data_ptr<int64_t>();
  for (int64_t index = 0; index < out.numel(); ++index) to[index] = index < kCount ? kArchitectures[index] : 0;
}

void cuda_versions(torch::stable::Tensor out) {
  STD_TORCH_CHECK(out.scalar_type() == torch::headeronly::ScalarType::Long && out.is_contiguous() && out.numel() == 2,
                  "cuda_versions: out: expected two contiguous int64");
  int runtime = 0, driver = 0;
  // A version that cannot be determined stays 0.
  static_cast<void>(cudaRuntimeGetVersion(&runtime));
  static_cast<void>(cudaDriverGetVersion(&driver));
  int64_t* to = out.mutable_data_ptr<int64_t>();
  to[0] = runtime;
  to[1] = driver;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(carve_kernels, CPU, m) {
  m.impl("cuda_build", TORCH_BOX(&cuda_build));
  m.impl("cuda_versions", TORCH_BOX(&cuda_versions));
}
