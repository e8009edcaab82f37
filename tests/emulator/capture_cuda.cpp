// Compares the CUDA kernels of capture in the emulator with the CPU kernels, on odd sizes, with guard pages around
// every array and in several orders of threads; built with sanitizers, which abort on accesses out of bounds and on
// races.

#include <cstdio>
#include <cstring>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "cpu/capture/kernels.h"
#include "cpu/simd/isa.h"
#include "cuda/capture/capture.cuh"
#include "native/capture_problem.h"

#ifdef BFLOAT_ALONE
#include "emulator/bfloat_alone.h"
#endif

namespace {

// What a call has beside the arguments of its view.
struct Call {
  const char* name;
  bool has_lse;    // a known log-sum-exp
  bool has_span;   // the caller knows the span of the tokens
  int64_t layers;  // that differ in their sinks and queries
  bool has_steps;  // writes one of several steps, every second element of the maps, with a negative scale
  int inputs;      // of kInputs, from the first on
};

struct Inputs {
  View view;
  bool each;
};

constexpr Inputs kInputs[] = {{View::kMask, false}, {View::kPositions, true}, {View::kAll, false},
                              {View::kMask, true},  {View::kPositions, false}, {View::kAll, true}};

const std::vector<Call> kCalls = {
    {"one layer", false, false, 1, false, 6},
    {"a known sum", true, false, 1, false, 6},
    {"steps", false, true, 3, true, 6},
};

// The first layer as it is, the second without sinks, the third with queries whose elements are in reverse, and so on.
std::vector<carve::CaptureLayer> layers_of(const carve::CaptureParams& p, int64_t count) {
  std::vector<carve::CaptureLayer> layers(static_cast<size_t>(count), *p.layers);
  const int64_t bytes = p.type == carve::Float::kFloat32 ? 4 : 2;
  for (size_t index = 0; index < layers.size(); ++index) {
    carve::CaptureLayer& layer = layers[index];
    if (index % 3 == 1) layer.sink = nullptr;
    if (index % 3 != 2) continue;
    layer.query = static_cast<const char*>(layer.query) + (p.size - 1) * bytes;
    layer.query_strides[3] = -1;
  }
  return layers;
}

// One output of all steps and layers, [steps, layers, size]: NaN until it is written.
class Output {
 public:
  Output(int64_t steps, int64_t layers, int64_t size, int64_t stride)
      : layers_(layers), size_(size), stride_(stride), count_(steps * layers * size * stride), data_(count_) {
    for (int64_t index = 0; index < count_; ++index) data_[index] = NAN;
  }

  int64_t step_stride() const { return layers_ * size_ * stride_; }
  float* layer(int64_t index) { return data_.get() + index * size_ * stride_; }
  // What a step and layer have; afterwards it counts as not written.
  std::vector<float> take(int64_t step, int64_t index) {
    std::vector<float> values;
    for (int64_t item = 0; item < size_; ++item) {
      float& value = layer(index)[step * step_stride() + item * stride_];
      values.push_back(value);
      value = NAN;
    }
    return values;
  }
  bool is_unwritten() {
    for (int64_t index = 0; index < count_; ++index) {
      if (!std::isnan(data_[index])) return false;
    }
    return true;
  }

 private:
  int64_t layers_, size_, stride_, count_;
  Guarded<float> data_;
};

struct Outputs {
  Output maps, mass, entropy;

  Outputs(const carve::CaptureParams& p, int64_t steps, int64_t layers, int64_t stride)
      : maps(steps, layers, p.batch * p.maps_strides[0], stride), mass(steps, layers, p.batch * p.rows, 1),
        entropy(steps, layers, p.batch * p.rows, 1) {}

  void attach(std::vector<carve::CaptureLayer>& layers) {
    for (size_t index = 0; index < layers.size(); ++index) {
      layers[index].maps = maps.layer(static_cast<int64_t>(index));
      layers[index].mass = mass.layer(static_cast<int64_t>(index));
      layers[index].entropy = entropy.layer(static_cast<int64_t>(index));
    }
  }
  Result take(int64_t step, int64_t layer) {
    return {maps.take(step, layer), mass.take(step, layer), entropy.take(step, layer)};
  }
  bool is_unwritten() { return maps.is_unwritten() && mass.is_unwritten() && entropy.is_unwritten(); }
};

std::vector<Result> on_cpu(carve::CaptureParams params, const Call& call) {
  std::vector<carve::CaptureLayer> layers = layers_of(params, call.layers);
  Outputs outputs(params, 1, call.layers, 1);
  outputs.attach(layers);
  params.layers = layers.data();
  params.layer_count = call.layers;
  carve::capture_cpu(params);
  std::vector<Result> results;
  for (int64_t layer = 0; layer < call.layers; ++layer) results.push_back(outputs.take(0, layer));
  return results;
}

void span_of(const carve::CaptureParams& p, int32_t* span) {
  span[0] = INT32_MAX, span[1] = -1;
  for (int64_t item = 0; item < p.batch * p.token_count; ++item) {
    const auto key = static_cast<int32_t>(p.tokens.at(item / p.token_count, item % p.token_count));
    if (key >= 0 && key < p.keys) span[0] = std::min(span[0], key), span[1] = std::max(span[1], key);
  }
}

std::vector<Result> on_device(carve::CaptureParams params, const Call& call) {
  const int64_t steps = call.has_steps ? 3 : 1, written = steps - 1, stride = call.has_steps ? 2 : 1;
  std::vector<carve::CaptureLayer> layers = layers_of(params, call.layers);
  Outputs outputs(params, steps, call.layers, stride);
  outputs.attach(layers);
  params.layers = layers.data();
  params.layer_count = call.layers;
  for (int64_t& maps_stride : params.maps_strides) maps_stride *= stride;
  // Of a multiple of 16 bytes in every shape here, or of an odd number.
  const bool aligned = params.type != carve::Float::kFloat32 && params.size % 8 == 0;
  const carve::CapturePlan needs = carve::plan_capture(params, aligned);
  Guarded<unsigned char> scratch(needs.bytes);
  std::memset(scratch.get(), 0xff, needs.bytes);
  Guarded<unsigned> tickets(needs.tickets);
  std::memset(tickets.get(), 0, needs.tickets * sizeof(unsigned));
  Guarded<int64_t> step(1);
  Guarded<int32_t> span(2);
  span_of(params, span.get());
  carve::CaptureDevice device{};
  device.step = call.has_steps ? step.get() : nullptr;
  device.steps = steps;
  device.step_strides[0] = outputs.maps.step_stride();
  device.step_strides[1] = outputs.mass.step_stride();
  device.step_strides[2] = outputs.entropy.step_stride();
  device.token_stride = stride;
  device.span = call.has_span ? span.get() : nullptr;
  device.scratch = scratch.get();
  device.scratch_bytes = needs.bytes;
  device.tickets = tickets.get();
  device.ticket_count = needs.tickets;
  if (call.has_steps) {
    step[0] = steps;
    carve::capture_cuda(params, device);
    if (!outputs.is_unwritten()) throw std::runtime_error("wrong: a step out of range is written");
  }
  step[0] = written;
  carve::capture_cuda(params, device);
  std::vector<Result> results;
  for (int64_t layer = 0; layer < call.layers; ++layer) results.push_back(outputs.take(written, layer));
  if (!outputs.is_unwritten()) throw std::runtime_error("wrong: more than a step's outputs are written");
  for (int64_t index = 0; index < needs.tickets; ++index) {
    if (tickets[index] != 0) throw std::runtime_error("wrong: a ticket is left");
  }
  return results;
}

// An entropy near 0, of one share near 1, has the digits of that share.
bool agree(const Result& result, const Result& expected) {
  for (size_t index = 0; index < expected.entropy.size(); ++index) {
    const float difference = std::abs(result.entropy[index] - expected.entropy[index]);
    if (!(difference <= 1e-3f * expected.entropy[index] + 2e-7f)) return false;
  }
  return close(result.maps, expected.maps, 1e-4f) && close(result.mass, expected.mass, 1e-4f);
}

// Throws at the first difference, with its place.
template <typename T>
void check(const Shape& shape, carve::Float type, const std::vector<Call>& calls, unsigned seed) {
  const int64_t lines = shape.batch * shape.heads * shape.rows;
  Guarded<float> lse(lines);
  for (int64_t line = 0; line < lines; ++line) {
    lse[line] = line % 11 == 10 ? -INFINITY : 2.0f + 0.01f * static_cast<float>(line % 13);
  }
  for (const Call& call : calls) {
    for (int number = 0; number < call.inputs; ++number) {
      const Inputs& inputs = kInputs[number];
      run<T>(shape, type, inputs.view, inputs.each, [&](carve::CaptureParams params) {
        params.lse = call.has_lse ? lse.get() : nullptr;
        params.scale = call.has_steps ? -0.3f : 0.3f;
        const std::vector<Result> expected = on_cpu(params, call);
        emulator_configure(seed == 0 ? emulated::kReverse : emulated::kShuffled, seed == 0 ? 1 : 3, seed, 0);
        const std::vector<Result> results = on_device(params, call);
        for (size_t layer = 0; layer < results.size(); ++layer) {
          if (agree(results[layer], expected[layer])) continue;
          throw std::runtime_error("wrong: " + std::to_string(shape.rows) + " rows of " + std::to_string(shape.keys) +
                                   " keys, inputs " + std::to_string(number) + ", " + call.name + ", layer " +
                                   std::to_string(layer) + ", seed " + std::to_string(seed));
        }
      });
    }
  }
}

void check_types(const Shape& shape, const std::vector<Call>& calls, unsigned seed) {
#ifndef BFLOAT_ALONE
  check<float>(shape, carve::Float::kFloat32, calls, seed);
  check<uint16_t>(shape, carve::Float::kFloat16, calls, seed);
#endif
  check<uint16_t>(shape, carve::Float::kBfloat16, calls, seed);
}

// The amount "first" is what every run of the tests has: two shapes, the second with two blocks of tokens, in one order
// of threads. "few" are all shapes with one kind of inputs, for ThreadSanitizer; "seeds" runs all in many orders.
void check_all(const std::string& amount) {
  carve::force_isa(0);
  std::vector<Shape> shapes = {
      {2, 2, 1, 3, 67, 40, 35}, {1, 2, 1, 1, 30, 16, 140}, {1, 2, 1, 3, 0, 32, 4}, {2, 6, 2, 5, 77, 40, 19},
      {1, 9, 3, 1, 133, 128, 21}, {1, 1, 1, 8, 65, 256, 3}, {1, 4, 2, 2, 40, 256, 40},
      // More queries of a key head than 8 and than 64, with stored scores; three blocks of tokens.
      {1, 12, 1, 1, 290, 64, 300}, {1, 12, 1, 7, 100, 128, 20},
      // More than 32, whose keys are read again: three blocks of tokens; two of queries and of rows.
      {1, 8, 1, 5, 419, 40, 260}, {1, 10, 1, 17, 66, 136, 20},
      // Rows in turns; keys that are not whole vectors, with two blocks of queries.
      {2, 4, 2, 9, 2000, 16, 10}, {1, 14, 1, 5, 66, 33, 9},
  };
  // More layers than one launch has arguments for, and more than one chunk of tokens in a block. More than one tile of
  // keys in a split, for up to 8 queries, for 32 and without tensor cores. More heads than a thread reads at a time.
  const std::vector<std::pair<Shape, Call>> others = {
      {{1, 1, 1, 9, 20, 16, 300}, {"33 layers", false, false, carve::kLayersAtOnce + 1, true, 6}},
      {{4, 4, 4, 1, 260, 16, 20}, {"9 layers", false, false, 9, false, 1}},
      {{4, 384, 12, 1, 260, 16, 20}, {"3 layers", false, false, 3, false, 1}},
      {{1, 2, 2, 2, 290, 33, 9}, {"33 layers", false, false, carve::kLayersAtOnce + 1, false, 1}},
      {{1, 40, 20, 1, 30, 16, 9}, {"40 heads", false, false, 1, false, 6}},
  };
  std::vector<Call> calls = kCalls;
  if (amount == "first") {
    for (Call& call : calls) call.inputs = 3;
    check_types(shapes[0], calls, 1);
    for (Call& call : calls) call.inputs = 1;
    return check_types(shapes[1], calls, 1);
  }
  if (amount == "few") {
    for (Call& call : calls) call.inputs = 1;
  }
  const unsigned seeds = amount == "seeds" ? 6 : 2;
  for (unsigned seed = amount == "few" ? 1 : 0; seed < seeds; ++seed) {
    for (const Shape& shape : shapes) check_types(shape, calls, seed);
    for (auto [shape, call] : others) {
      if (amount == "few") call.inputs = 1;
      check_types(shape, {call}, seed);
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
