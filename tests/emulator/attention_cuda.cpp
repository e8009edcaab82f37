// Compares the CUDA kernels that attend and capture, in the emulator, with the CPU kernels of capture and with attention
// in double; as capture_cuda.cpp does it.

#include <cstdio>
#include <cstring>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#include "cpu/simd/isa.h"
#include "cuda/attention/attention.cuh"
#include "native/capture_problem.h"

#ifdef BFLOAT_ALONE
#include "emulator/bfloat_alone.h"
namespace carve {
void launch_attend_half(const AttentionLaunch&) { std::abort(); }
}  // namespace carve
#endif

namespace {

// What follows a row in memory: not read, and not written.
constexpr int64_t kGap = 8;

float float_of(uint16_t bits, carve::Float type) {
  return type == carve::Float::kFloat16 ? __half2float(__half{bits}) : __bfloat162float(__nv_bfloat16{bits});
}

// Values [batch, key heads, keys, size + kGap] and outputs [batch, heads, size + kGap], of NaN until they are written.
struct Values {
  int64_t size, count, output_count;
  Guarded<uint16_t> values, outputs;

  Values(const carve::CaptureParams& p, int64_t elements)
      : size(elements), count(p.batch * p.key_heads * p.keys * (size + kGap)),
        output_count(p.batch * p.heads * (size + kGap)), values(count), outputs(output_count) {
    fill(values, count, 4);
    for (int64_t index = 0; index < output_count; ++index) outputs[index] = 0x7fff;
    for (int64_t row = 0; row < p.batch * p.key_heads * p.keys; ++row) {
      for (int64_t gap = size; gap < size + kGap; ++gap) at(row, gap) = 0x7fff;
    }
    // What no head sees may hold anything.
    for (int64_t row = 0; row < p.batch * p.key_heads * p.keys; ++row) {
      const int64_t batch = row / (p.key_heads * p.keys), key = row % p.keys;
      for (int64_t element = 0; element < size && !sees(p, batch, key); ++element) at(row, element) = 0x7fff;
    }
  }

  static bool sees(const carve::CaptureParams& p, int64_t batch, int64_t key) {
    if (p.mask != nullptr) return p.mask[batch * p.mask_strides[0] + key * p.mask_strides[3]] != 0;
    if (p.positions.data == nullptr) return true;
    const int64_t last = p.positions.at(batch, 0);
    return key <= last && (p.window == 0 || key > last - p.window);
  }

  uint16_t& at(int64_t row, int64_t element) { return values[row * (size + kGap) + element]; }

  carve::AttentionValue arguments(const carve::CaptureParams& p) {
    const int64_t row = size + kGap;
    return {values.get(), {p.key_heads * p.keys * row, p.keys * row, row}, size, outputs.get(), {p.heads * row, row}};
  }
};

// The output of a head, and what its roundings may be relative to: the same sum of absolute values.
struct Expected {
  double output, scale;
};

std::vector<Expected> attend(const carve::CaptureParams& p, Values& values, int64_t batch, int64_t head) {
  const carve::CaptureLayer& layer = *p.layers;
  const auto* query = static_cast<const uint16_t*>(layer.query) + batch * layer.query_strides[0] +
                      head * layer.query_strides[1];
  const int64_t key_head = head / (p.heads / p.key_heads);
  const auto* keys = static_cast<const uint16_t*>(layer.key) + batch * layer.key_strides[0] +
                     key_head * layer.key_strides[1];
  std::vector<Expected> result(static_cast<size_t>(values.size));
  double sum = layer.sink == nullptr ? 0.0 : std::exp(double{layer.sink[head]});
  for (int64_t key = 0; key < p.keys; ++key) {
    if (!Values::sees(p, batch, key)) continue;
    double logit = 0.0;
    for (int64_t i = 0; i < p.size; ++i) {
      logit += double{float_of(query[i * layer.query_strides[3]], p.type)} *
               float_of(keys[key * layer.key_strides[2] + i], p.type);
    }
    logit *= p.scale;
    if (p.softcap != 0.0f) logit = p.softcap * std::tanh(logit / p.softcap);
    const double share = std::exp(logit);
    sum += share;
    const int64_t row = (batch * p.key_heads + key_head) * p.keys + key;
    for (int64_t element = 0; element < values.size; ++element) {
      const double value = float_of(values.at(row, element), p.type);
      result[static_cast<size_t>(element)].output += share * value;
      result[static_cast<size_t>(element)].scale += share * std::abs(value);
    }
  }
  for (Expected& one : result) one.output = sum == 0.0 ? 0.0 : one.output / sum, one.scale /= sum == 0.0 ? 1.0 : sum;
  return result;
}

void check_outputs(const carve::CaptureParams& p, Values& values, const std::string& where) {
  // A probability and an output round once each.
  const double rounding = p.type == carve::Float::kFloat16 ? 0x1p-10 : 0x1p-7;
  for (int64_t line = 0; line < p.batch * p.heads; ++line) {
    const std::vector<Expected> expected = attend(p, values, line / p.heads, line % p.heads);
    for (int64_t element = 0; element < values.size + kGap; ++element) {
      const uint16_t bits = values.outputs[line * (values.size + kGap) + element];
      if (element >= values.size) {
        if (bits != 0x7fff) throw std::runtime_error("wrong: more than an output is written: " + where);
        continue;
      }
      const Expected& right = expected[static_cast<size_t>(element)];
      const double difference = std::abs(float_of(bits, p.type) - right.output);
      if (!(difference <= 0.6 * rounding * right.scale + 1e-5 * right.scale)) {
        throw std::runtime_error("wrong: output of head " + std::to_string(line) + ", element " +
                                 std::to_string(element) + ": " + where);
      }
    }
  }
}

std::vector<float> filled(const std::vector<float>& like) { return std::vector<float>(like.size(), NAN); }

// Both outputs of one call, with a step that follows one out of range.
void check_call(carve::CaptureParams params, int64_t value_size, bool has_span, const std::string& where) {
  const int64_t tokens = params.batch * params.maps_strides[0], rows = params.batch;
  Result expected{std::vector<float>(static_cast<size_t>(tokens), NAN),
                  std::vector<float>(static_cast<size_t>(rows), NAN),
                  std::vector<float>(static_cast<size_t>(rows), NAN)};
  carve::CaptureLayer layer = *params.layers;
  params.layers = &layer;
  layer.maps = expected.maps.data(), layer.mass = expected.mass.data(), layer.entropy = expected.entropy.data();
  carve::capture_cpu(params);
  Result result{filled(expected.maps), filled(expected.mass), filled(expected.entropy)};
  layer.maps = result.maps.data(), layer.mass = result.mass.data(), layer.entropy = result.entropy.data();

  Values values(params, value_size);
  const carve::AttentionPlan plan = carve::plan_attention(params, value_size);
  Guarded<unsigned char> scratch(plan.bytes);
  std::memset(scratch.get(), 0xff, plan.bytes);
  Guarded<unsigned> tickets(plan.tickets);
  std::memset(tickets.get(), 0, plan.tickets * sizeof(unsigned));
  Guarded<int64_t> step(1);
  Guarded<int32_t> span(2);
  span[0] = INT32_MAX, span[1] = -1;
  for (int64_t item = 0; item < params.batch * params.token_count; ++item) {
    const int64_t key = params.tokens.at(item / params.token_count, item % params.token_count);
    if (key < 0 || key >= params.keys) continue;
    span[0] = std::min(span[0], static_cast<int32_t>(key)), span[1] = std::max(span[1], static_cast<int32_t>(key));
  }
  carve::CaptureDevice device{};
  device.step = step.get();
  device.steps = 1;
  device.token_stride = 1;
  device.span = has_span ? span.get() : nullptr;
  device.scratch = scratch.get();
  device.scratch_bytes = plan.bytes;
  device.tickets = tickets.get();
  device.ticket_count = plan.tickets;
  step[0] = 1;
  carve::attend_cuda(params, values.arguments(params), device);
  // The model needs its output even if there is no step for the map.
  check_outputs(params, values, where + ", a step out of range");
  for (float value : result.maps) {
    if (!std::isnan(value)) throw std::runtime_error("wrong: a step out of range is written: " + where);
  }
  step[0] = 0;
  for (int64_t index = 0; index < values.output_count; ++index) values.outputs[index] = 0x7fff;
  carve::attend_cuda(params, values.arguments(params), device);
  check_outputs(params, values, where);
  if (!close(result, expected)) throw std::runtime_error("wrong: capture: " + where);
  if (tickets[0] != 0) throw std::runtime_error("wrong: a ticket is left: " + where);
}

void check(const Shape& shape, int64_t value_size, carve::Float type, unsigned seed, int views) {
  constexpr View kViews[] = {View::kAll, View::kPositions, View::kMask};
  for (int number = 0; number < views; ++number) {
    const bool each = number == 1;
    run<uint16_t>(shape, type, kViews[number], each, [&](const carve::CaptureParams& params) {
      emulator_configure(seed == 0 ? emulated::kReverse : emulated::kShuffled, seed == 0 ? 1 : 3, seed, 0);
      const std::string where = std::to_string(shape.keys) + " keys of " + std::to_string(shape.size) + ", view " +
                                std::to_string(number) + ", seed " + std::to_string(seed);
      check_call(params, value_size, number == 0, where);
    });
  }
}

void check_all(const std::string& amount) {
  carve::force_isa(0);
  struct Case {
    Shape shape;
    int64_t value_size;
  };
  // Groups of up to 8 and of more heads; several tiles of keys for a warp, and splits; heads that are not whole tiles;
  // values of another size; no keys, no tokens, and several blocks of tokens.
  std::vector<Case> cases = {
      {{2, 6, 2, 1, 67, 40, 35}, 24},    {{1, 7, 1, 1, 300, 64, 140}, 64},  {{1, 3, 3, 1, 140, 128, 9}, 128},
      {{1, 20, 1, 1, 40, 16, 4}, 72},    {{1, 2, 1, 1, 90, 256, 300}, 256}, {{1, 2, 2, 1, 33, 192, 20}, 128},
      {{1, 2, 1, 1, 0, 32, 4}, 32},      {{1, 2, 1, 1, 30, 32, 0}, 32},     {{1, 1, 1, 1, 1, 64, 1}, 64},
      // Splits of different maxima; more of them than the second kernel's warps read at a time.
      {{1, 2, 1, 1, 900, 128, 30}, 64},  {{1, 2, 1, 1, 4300, 8, 30}, 8},    {{140, 1, 1, 1, 270, 8, 2}, 8},
  };
  const bool is_first = amount == "first";
  if (is_first) cases.resize(2);
  if (amount == "few") cases.pop_back();
  for (unsigned seed = is_first ? 1 : 0; seed < (is_first || amount == "few" ? 2 : amount == "seeds" ? 6 : 3); ++seed) {
    for (const auto& [shape, value_size] : cases) {
      if (shape.batch > 2 && seed != 1) continue;
      const int views = is_first && value_size == 64 ? 1 : 3;
#ifndef BFLOAT_ALONE
      check(shape, value_size, carve::Float::kFloat16, seed, views);
#endif
      check(shape, value_size, carve::Float::kBfloat16, seed, views);
    }
  }
}

}  // namespace

int main(int count, char** arguments) {
  try {
    check_all(count > 1 ? arguments[1] : "");
  } catch (const std::exception& error) {
    std::printf("%s\n", error.what());
    return 1;
  }
  std::printf("0 failures\n");
  return 0;
}
