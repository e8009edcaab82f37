// Runs column sums on odd sizes, between guard pages; built with sanitizers. Every instruction set of the machine has to
// be near a plain sum in float64, and to give the same bits for any number of threads.

#include <algorithm>
#include <cstdio>

#include "cpu/simd/isa.h"
#include "native/capture_problem.h"

namespace {

struct Options {
  bool mask;
  bool positions;
  int64_t window;
  float softcap;
  bool sink;
  bool lse;
};

float widen(float value, carve::Float) { return value; }

float widen(uint16_t value, carve::Float type) {
  if (type == carve::Float::kBfloat16) {
    const uint32_t bits = static_cast<uint32_t>(value) << 16;
    float result;
    std::memcpy(&result, &bits, sizeof(result));
    return result;
  }
  const int exponent = value >> 10 & 31, mantissa = value & 1023;
  const float size = exponent == 0 ? std::ldexp(static_cast<float>(mantissa), -24)
                                   : std::ldexp(static_cast<float>(mantissa + 1024), exponent - 25);
  return value >> 15 ? -size : size;
}

// Half precision of about -1 to 1 for either type: the exponent bits that would give infinity are cleared.
template <typename T>
void plant(Guarded<T>& values, int64_t count, int seed) {
  fill(values, count, seed);
  if constexpr (sizeof(T) == 2) {
    for (int64_t index = 0; index < count; ++index) values[index] = static_cast<T>(values[index] & 0xbfff);
  }
}

template <typename T>
class Problem {
 public:
  Problem(const Shape& shape, carve::Float type, const Options& options)
      : shape_(shape),
        type_(type),
        options_(options),
        query_(shape.batch * shape.heads * shape.rows * shape.size),
        key_(shape.batch * shape.key_heads * shape.keys * (shape.size + kGap)),
        sink_(shape.heads),
        lse_(shape.batch * shape.heads * shape.rows),
        mask_(shape.batch * shape.rows * shape.keys),
        positions_(shape.batch * shape.rows) {
    plant(query_, shape.batch * shape.heads * shape.rows * shape.size, 1);
    plant(key_, shape.batch * shape.key_heads * shape.keys * (shape.size + kGap), 2);
    fill(sink_, shape.heads, 3);
    fill(lse_, shape.batch * shape.heads * shape.rows, 4);
    for (int64_t index = 0; index < shape.batch * shape.rows * shape.keys; ++index) mask_[index] = index % 3 != 0;
    // From no key to all of them, and beyond.
    for (int64_t index = 0; index < shape.batch * shape.rows; ++index) {
      positions_[index] = static_cast<int32_t>(index * 37 % (shape.keys + 3)) - 1;
    }
    layer_.query = query_.get();
    layer_.query_strides[0] = shape.heads * shape.rows * shape.size;
    layer_.query_strides[1] = shape.size;
    layer_.query_strides[2] = shape.heads * shape.size;
    layer_.query_strides[3] = 1;
    layer_.key = key_.get();
    layer_.key_strides[0] = shape.key_heads * shape.keys * (shape.size + kGap);
    layer_.key_strides[1] = shape.keys * (shape.size + kGap);
    layer_.key_strides[2] = shape.size + kGap;
    layer_.sink = options.sink ? sink_.get() : nullptr;
  }

  std::vector<float> run(int64_t threads) {
    std::vector<float> sums(static_cast<size_t>(shape_.batch * shape_.heads * shape_.keys), NAN);
    carve::ColumnSumsParams params{};
    carve::CaptureParams& p = params.capture;
    p.layers = &layer_;
    p.layer_count = 1;
    p.batch = shape_.batch;
    p.heads = shape_.heads;
    p.key_heads = shape_.key_heads;
    p.rows = shape_.rows;
    p.keys = shape_.keys;
    p.size = shape_.size;
    p.type = type_;
    if (options_.positions) p.positions = {positions_.get(), false, {shape_.rows, 1}};
    if (options_.mask) {
      p.mask = mask_.get();
      p.mask_strides[0] = shape_.rows * shape_.keys;
      p.mask_strides[2] = shape_.keys;
      p.mask_strides[3] = 1;
    }
    if (options_.lse) p.lse = lse_.get();
    p.scale = kScale;
    p.softcap = options_.softcap;
    p.window = options_.window;
    p.threads = threads;
    params.sums = sums.data();
    carve::column_sums_cpu(params);
    return sums;
  }

  // The formula, a row at a time.
  std::vector<double> expected() {
    std::vector<double> sums(static_cast<size_t>(shape_.batch * shape_.heads * shape_.keys), 0.0);
    std::vector<double> logits(static_cast<size_t>(shape_.keys));
    for (int64_t line = 0; line < shape_.batch * shape_.heads * shape_.rows; ++line) {
      const int64_t row = line % shape_.rows, head = line / shape_.rows % shape_.heads;
      const int64_t batch = line / shape_.rows / shape_.heads;
      double total = options_.sink ? std::exp(static_cast<double>(sink_[head])) : 0.0;
      for (int64_t key = 0; key < shape_.keys; ++key) {
        double& logit = logits[static_cast<size_t>(key)];
        logit = sees(batch, row, key) ? logit_of(batch, head, row, key) : -INFINITY;
        total += std::exp(logit);
      }
      if (options_.lse) total = std::exp(static_cast<double>(lse_[line]));
      for (int64_t key = 0; key < shape_.keys && total > 0; ++key) {
        sums[static_cast<size_t>((batch * shape_.heads + head) * shape_.keys + key)] +=
            std::exp(logits[static_cast<size_t>(key)]) / total;
      }
    }
    return sums;
  }

 private:
  static constexpr int64_t kGap = 3;
  static constexpr float kScale = 0.3f;

  bool sees(int64_t batch, int64_t row, int64_t key) {
    if (options_.mask && mask_[(batch * shape_.rows + row) * shape_.keys + key] == 0) return false;
    if (!options_.positions) return true;
    const int64_t last = positions_[batch * shape_.rows + row];
    return key <= last && (options_.window == 0 || key > last - options_.window);
  }

  double logit_of(int64_t batch, int64_t head, int64_t row, int64_t key) {
    const int64_t shared = head / (shape_.heads / shape_.key_heads);
    const int64_t from = ((batch * shape_.rows + row) * shape_.heads + head) * shape_.size;
    const int64_t to = ((batch * shape_.key_heads + shared) * shape_.keys + key) * (shape_.size + kGap);
    double product = 0.0;
    for (int64_t element = 0; element < shape_.size; ++element) {
      product += static_cast<double>(widen(query_[from + element], type_)) * widen(key_[to + element], type_);
    }
    const double logit = product * kScale;
    return options_.softcap == 0.0f ? logit : options_.softcap * std::tanh(logit / options_.softcap);
  }

  const Shape shape_;
  const carve::Float type_;
  const Options options_;
  Guarded<T> query_;
  Guarded<T> key_;
  Guarded<float> sink_;
  Guarded<float> lse_;
  Guarded<uint8_t> mask_;
  Guarded<int32_t> positions_;
  carve::CaptureLayer layer_{};
};

template <typename T>
int check(const Shape& shape, carve::Float type, const Options& options) {
  Problem<T> problem(shape, type, options);
  const std::vector<double> expected = problem.expected();
  int failures = 0;
  for (int isa = 0; isa <= static_cast<int>(carve::best_isa()); ++isa) {
    carve::force_isa(isa);
    const std::vector<float> found = problem.run(1);
    for (size_t index = 0; index < found.size(); ++index) {
      // Written so that NaN fails.
      if (!(std::abs(found[index] - expected[index]) <= 2e-5 * expected[index])) {
        ++failures;
        break;
      }
    }
    for (int64_t threads : {2, 5}) failures += problem.run(threads) != found;
  }
  return failures;
}

}  // namespace

int main() {
  const std::vector<Shape> shapes = {
      {1, 1, 1, 1, 1, 32, 0},      {1, 2, 1, 3, 0, 32, 0},   {2, 6, 2, 5, 77, 40, 0},  {1, 14, 2, 19, 1030, 24, 0},
      {1, 3, 3, 101, 513, 9, 0},   {2, 4, 4, 33, 31, 80, 0}, {1, 97, 1, 2, 64, 16, 0}, {1, 2, 2, 200, 1100, 8, 0},
      {0, 2, 1, 3, 9, 32, 0},      {1, 2, 1, 0, 9, 32, 0},   {3, 8, 2, 1, 640, 12, 0}, {1, 2, 2, 100, 130, 7, 0},
  };
  const std::vector<Options> options = {
      {false, false, 0, 0.0f, false, false}, {true, false, 0, 0.0f, true, false},  {false, true, 0, 0.0f, false, true},
      {false, true, 40, 2.5f, true, false},  {true, true, 0, 0.0f, false, false},
  };
  int failures = 0;
  for (const Shape& shape : shapes) {
    for (const Options& one : options) {
      failures += check<float>(shape, carve::Float::kFloat32, one);
      failures += check<uint16_t>(shape, carve::Float::kFloat16, one);
      failures += check<uint16_t>(shape, carve::Float::kBfloat16, one);
    }
  }
  std::printf("%d failures\n", failures);
  return failures == 0 ? 0 : 1;
}
