// Random inputs of capture between guard pages, for the programs that run it under sanitizers.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <vector>

#include <sys/mman.h>
#include <unistd.h>

#include "carve.h"

namespace {

struct Shape {
  int64_t batch;
  int64_t heads;
  int64_t key_heads;
  int64_t rows;
  int64_t keys;
  int64_t size;
  int64_t tokens;
};

enum class View { kAll, kMask, kPositions };

// An array that ends at a page without access: the sanitizers do not check vector and tile loads.
template <typename T>
class Guarded {
 public:
  explicit Guarded(int64_t count) {
    const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    const size_t bytes = static_cast<size_t>(count) * sizeof(T);
    const size_t used = (bytes + page - 1) / page * page;
    size_ = used + page;
    pages_ = static_cast<char*>(mmap(nullptr, size_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (pages_ == MAP_FAILED || mprotect(pages_ + used, page, PROT_NONE) != 0) std::abort();
    data_ = reinterpret_cast<T*>(pages_ + used - bytes);
  }
  Guarded(const Guarded&) = delete;
  Guarded& operator=(const Guarded&) = delete;
  ~Guarded() { munmap(pages_, size_); }

  T* get() const { return data_; }
  T& operator[](int64_t index) { return data_[index]; }

 private:
  char* pages_;
  size_t size_;
  T* data_;
};

template <typename T>
void fill(Guarded<T>& result, int64_t count, int seed) {
  uint32_t state = static_cast<uint32_t>(seed) * 2654435761u + 1;
  for (int64_t index = 0; index < count; ++index) {
    state = state * 1664525u + 1013904223u;
    const float value = static_cast<float>(state >> 8) / 8388608.0f - 1.0f;
    if constexpr (sizeof(T) == sizeof(float)) {
      result[index] = value;
    } else {
      uint32_t bits;
      std::memcpy(&bits, &value, sizeof(bits));
      result[index] = static_cast<T>(bits >> 16);
    }
  }
}

struct Result {
  std::vector<float> maps;
  std::vector<float> mass;
  std::vector<float> entropy;
};

template <typename T, typename Capture>
Result run(const Shape& shape, carve::Float type, View view, bool each, Capture capture) {
  const int64_t query_count = shape.batch * shape.heads * shape.rows * shape.size;
  const int64_t key_count = shape.batch * shape.key_heads * shape.keys * shape.size;
  Guarded<T> query(query_count);
  Guarded<T> key(key_count);
  Guarded<float> sink(shape.heads);
  fill(query, query_count, 1);
  fill(key, key_count, 2);
  fill(sink, shape.heads, 3);
  Guarded<uint8_t> mask(shape.batch * shape.rows * shape.keys);
  for (int64_t index = 0; index < shape.batch * shape.rows * shape.keys; ++index) mask[index] = index % 3 != 0;
  Guarded<int64_t> positions(shape.batch * shape.rows);
  for (int64_t index = 0; index < shape.batch * shape.rows; ++index) positions[index] = shape.keys - 1 - index % 5;
  Guarded<int32_t> tokens(shape.batch * shape.tokens);
  for (int64_t index = 0; index < shape.batch * shape.tokens; ++index) {
    tokens[index] = static_cast<int32_t>(index * 7 % (shape.keys + 3)) - 1;
  }
  Result result;
  result.maps.assign(static_cast<size_t>(shape.batch * (each ? shape.heads : 1) * shape.rows * shape.tokens), NAN);
  result.mass.assign(static_cast<size_t>(shape.batch * shape.rows), NAN);
  result.entropy.assign(static_cast<size_t>(shape.batch * shape.rows), NAN);

  carve::CaptureLayer layer{};
  layer.query = query.get();
  layer.query_strides[0] = shape.heads * shape.rows * shape.size;
  layer.query_strides[1] = shape.rows * shape.size;
  layer.query_strides[2] = shape.size;
  layer.query_strides[3] = 1;
  layer.key = key.get();
  layer.key_strides[0] = shape.key_heads * shape.keys * shape.size;
  layer.key_strides[1] = shape.keys * shape.size;
  layer.key_strides[2] = shape.size;
  layer.sink = sink.get();
  layer.maps = result.maps.data();
  layer.mass = result.mass.data();
  layer.entropy = result.entropy.data();

  carve::CaptureParams params{};
  params.layers = &layer;
  params.layer_count = 1;
  params.batch = shape.batch;
  params.heads = shape.heads;
  params.key_heads = shape.key_heads;
  params.rows = shape.rows;
  params.keys = shape.keys;
  params.size = shape.size;
  params.token_count = shape.tokens;
  params.type = type;
  params.tokens = {tokens.get(), false, {shape.tokens, 1}};
  if (view == View::kPositions) params.positions = {positions.get(), true, {shape.rows, 1}};
  if (view == View::kMask) {
    params.mask = mask.get();
    params.mask_strides[0] = shape.rows * shape.keys;
    params.mask_strides[2] = shape.keys;
    params.mask_strides[3] = 1;
  }
  params.scale = 0.3f;
  params.softcap = view == View::kMask ? 5.0f : 0.0f;
  params.window = view == View::kPositions ? 17 : 0;
  params.each = each;
  params.maps_strides[2] = shape.tokens;
  params.maps_strides[1] = each ? shape.rows * shape.tokens : 0;
  params.maps_strides[0] = (each ? shape.heads : 1) * shape.rows * shape.tokens;
  params.mass_strides[0] = params.entropy_strides[0] = shape.rows;
  params.mass_strides[1] = params.entropy_strides[1] = 1;
  capture(params);
  return result;
}

// Relative to each value: backends and instruction sets add in different orders.
bool close(const std::vector<float>& result, const std::vector<float>& expected, float tolerance) {
  for (size_t index = 0; index < expected.size(); ++index) {
    if (!(std::abs(result[index] - expected[index]) <= tolerance * std::abs(expected[index]) + 1e-30f)) return false;
  }
  return true;
}

bool close(const Result& result, const Result& expected) {
  return close(result.maps, expected.maps, 1e-4f) && close(result.mass, expected.mass, 1e-4f) &&
         close(result.entropy, expected.entropy, 1e-3f);
}

}  // namespace
