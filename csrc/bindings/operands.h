// The tensors of a boxed operator, read through torch's C interface: every property once, no text unless a check fails.
#pragma once

#include <cstdint>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <utility>
#include <vector>

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/c/shim.h>
#include <torch/csrc/stable/library.h>

namespace carve {
namespace {

// Throws with this message; never inlined, since it would make its callers slower.
template <typename... T>
[[noreturn]] __attribute__((noinline, cold)) void fail(const T&... message) {
  std::ostringstream text;
  (text << ... << message);
  throw std::runtime_error(text.str());
}

// The error of a call of torch's C interface, which is out of memory or misused.
inline void check_shim(AOTITorchError error, const char* call) {
  if (error != 0) fail(call, ": failed");
}

// A tensor that an operator owns.
class TensorOwner {
 public:
  explicit TensorOwner(AtenTensorHandle handle) : handle_(handle) {}
  TensorOwner(TensorOwner&& other) noexcept : handle_(std::exchange(other.handle_, nullptr)) {}
  TensorOwner(const TensorOwner&) = delete;
  TensorOwner& operator=(const TensorOwner&) = delete;
  TensorOwner& operator=(TensorOwner&&) = delete;
  ~TensorOwner() {
    if (handle_ != nullptr) static_cast<void>(aoti_torch_delete_tensor_object(handle_));
  }

 protected:
  AtenTensorHandle handle_;
};

// A shape of up to four dimensions.
struct Sizes {
  int64_t count;
  int64_t values[4];
};

// A tensor argument and what is asked of it more than once.
class Operand : public TensorOwner {
 public:
  explicit Operand(StableIValue value) : TensorOwner(torch::stable::detail::to<AtenTensorHandle>(value)) {
    check_shim(aoti_torch_get_dtype(handle_, &dtype), "aoti_torch_get_dtype");
    check_shim(aoti_torch_get_device_type(handle_, &device_type), "aoti_torch_get_device_type");
    check_shim(aoti_torch_get_device_index(handle_, &device), "aoti_torch_get_device_index");
    check_shim(aoti_torch_get_dim(handle_, &dims), "aoti_torch_get_dim");
    check_shim(aoti_torch_get_sizes(handle_, &sizes), "aoti_torch_get_sizes");
    check_shim(aoti_torch_get_strides(handle_, &strides), "aoti_torch_get_strides");
  }

  const void* data() const {
    const void* data = nullptr;
    check_shim(torch_get_const_data_ptr(handle_, &data), "torch_get_const_data_ptr");
    return data;
  }

  void* mutable_data() const {
    void* data = nullptr;
    check_shim(torch_get_mutable_data_ptr(handle_, &data), "torch_get_mutable_data_ptr");
    return data;
  }

  int64_t numel() const {
    int64_t product = 1;
    for (int64_t index = 0; index < dims; ++index) product *= sizes[index];
    return product;
  }

  bool is_contiguous() const {
    int64_t stride = 1;
    for (int64_t index = dims - 1; index >= 0; --index) {
      if (sizes[index] != 1 && strides[index] != stride) return numel() == 0;
      stride *= sizes[index];
    }
    return true;
  }

  bool has_shape(const Sizes& shape) const { return dims == shape.count && ends_with(shape); }

  // Whether the last dimensions have these sizes.
  bool ends_with(const Sizes& shape) const {
    const int64_t front = dims - shape.count;
    if (front < 0) return false;
    for (int64_t index = 0; index < shape.count; ++index) {
      if (sizes[front + index] != shape.values[index]) return false;
    }
    return true;
  }

  // Stays owned by this operand.
  AtenTensorHandle handle() const { return handle_; }

  // The strides of the first dimensions, 0 along one of a single element: that is no distance, and its alignment none.
  void copy_strides(int64_t count, int64_t* to) const {
    for (int64_t index = 0; index < count; ++index) to[index] = sizes[index] > 1 ? strides[index] : 0;
  }

  bool is_on_device_of(const Operand& other) const {
    return device_type == other.device_type && device == other.device;
  }

  int32_t dtype;
  int32_t device_type;
  int32_t device;  // -1 on a CPU
  int64_t dims;
  int64_t* sizes;
  int64_t* strides;
};

// The codes of dtypes, which torch may change.
struct DtypeCodes {
  int32_t float32 = aoti_torch_dtype_float32();
  int32_t float16 = aoti_torch_dtype_float16();
  int32_t bfloat16 = aoti_torch_dtype_bfloat16();
  int32_t float64 = aoti_torch_dtype_float64();
  int32_t int32 = aoti_torch_dtype_int32();
  int32_t int64 = aoti_torch_dtype_int64();
  int32_t uint8 = aoti_torch_dtype_uint8();
  int32_t boolean = aoti_torch_dtype_bool();
};
const DtypeCodes kDtypes;

const char* name_dtype(int32_t dtype) {
  if (dtype == kDtypes.float32) return "float32";
  if (dtype == kDtypes.float16) return "float16";
  if (dtype == kDtypes.bfloat16) return "bfloat16";
  if (dtype == kDtypes.float64) return "float64";
  if (dtype == kDtypes.int32) return "int32";
  if (dtype == kDtypes.int64) return "int64";
  if (dtype == kDtypes.uint8) return "uint8";
  if (dtype == kDtypes.boolean) return "bool";
  return "(another dtype)";
}

std::ostream& operator<<(std::ostream& stream, const Sizes& shape) {
  stream << "[";
  for (int64_t index = 0; index < shape.count; ++index) stream << (index > 0 ? ", " : "") << shape.values[index];
  return stream << "]";
}

// As in the errors of Python: a torch.float32 tensor of shape [2, 3].
std::ostream& operator<<(std::ostream& stream, const Operand& tensor) {
  stream << "a torch." << name_dtype(tensor.dtype) << " tensor of shape [";
  for (int64_t index = 0; index < tensor.dims; ++index) stream << (index > 0 ? ", " : "") << tensor.sizes[index];
  return stream << "]" << (tensor.is_contiguous() ? "" : " that is not contiguous");
}

// The arguments of a boxed operator in order; each that is read passes its ownership.
class OperandStack {
 public:
  explicit OperandStack(const StableIValue* stack) : next_(stack) {}

  template <typename T>
  T scalar() {
    return torch::stable::detail::to<T>(*next_++);
  }

  Operand tensor() { return Operand(*next_++); }

  std::optional<Operand> maybe_tensor() {
    auto* value = torch::stable::detail::to<StableIValue*>(*next_++);
    if (value == nullptr) return std::nullopt;
    const StableIValue inner = *value;
    // Allocated by `new` for an extension that targets a torch before 2.13.
    delete value;
    return std::optional<Operand>(std::in_place, inner);
  }

  std::vector<Operand> tensors() {
    struct List {
      StableListHandle handle;
      ~List() { static_cast<void>(torch_delete_list(handle)); }
    } list{torch::stable::detail::to<StableListHandle>(*next_++)};
    size_t count = 0;
    check_shim(torch_list_size(list.handle, &count), "torch_list_size");
    std::vector<Operand> taken;
    taken.reserve(count);
    for (size_t index = 0; index < count; ++index) {
      StableIValue element = 0;
      check_shim(torch_list_get_item(list.handle, index, &element), "torch_list_get_item");
      taken.emplace_back(element);
    }
    return taken;
  }

 private:
  const StableIValue* next_;
};

}  // namespace
}  // namespace carve
