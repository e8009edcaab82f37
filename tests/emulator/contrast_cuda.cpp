// Compares the CUDA kernels of contrast in the emulator with the CPU kernels, on odd sizes, with guard pages around
// every array and in several orders of threads; built with sanitizers, which see every thread of a kernel as a thread.

#include <cmath>
#include <cstdio>
#include <string>
#include <vector>

#include "carve.h"
#include "cuda/device.cuh"
#include "native/capture_problem.h"

namespace {

struct Problem {
  int64_t layers, steps;
  std::vector<carve::ViewShape> views;
};

constexpr size_t kLongChunks = 5;

struct Options {
  carve::Normalize normalize;
  double lam;  // below 0: the mean
  int64_t general_steps;
  bool has_padding;  // the strides of a layer and a step are larger than the maps
  bool has_zeros;    // of task and general, which make divisors of 0
  bool has_nan;
};

using carve::Normalize;

// The first has two blocks of tokens and several chunks of maps.
const std::vector<Problem> kProblems = {
    {2, 5, {{17, 16, 14, 40}, {3, 3, 4, 4}}},
    {1, 1, {{1, 1, 1, 1}}},
    {3, 2, {{7, 11, 61, 52}}},
    // Two tiles in a row, the second with fewer pixels: with and without vectors, and where rows shrink. The pixels are
    // whole vectors in all, so that those of the first view are aligned.
    {1, 3, {{5, 4, 3, 1036}, {3, 3, 4, 1037}, {1, 1100, 2, 1034}}},
    // No vectors behind a view of an odd number of pixels; an axis that shrinks, and both; the same size.
    {2, 2, {{1, 1, 3, 3}, {4, 9, 20, 16}, {2, 50, 9, 7}, {31, 7, 5, 40}, {24, 24, 24, 24}, {9, 16, 1, 1}}},
    // A chunk of more maps than a thread has in flight; more than eight chunks, of several layers each.
    {3, 100, {{3, 5, 7, 9}}},
    {36, 2, {{2, 3, 5, 8}}},
    // More blocks of tokens than read their general maps whole.
    {2, 1, {{50, 47, 40, 43}}},
    // More rows of a tile than threads reach at once.
    {1, 1, {{4, 6, 512, 516}}},
    // More views than one launch takes.
    {1, 2, std::vector<carve::ViewShape>(33, {1, 2, 2, 3})},
};

const std::vector<Options> kOptions = {
    {Normalize::kNone, -1.0, 0, true, false, false},    {Normalize::kMinmax, 0.0, 1, false, true, false},
    {Normalize::kNone, 1e-4, 0, false, false, true},    {Normalize::kSum, -1.0, 1, true, false, false},
    {Normalize::kMax, 1e-8, 0, false, false, false},    {Normalize::kMinmax, -1.0, 0, true, false, false},
    {Normalize::kSum, 1e-4, 0, false, false, true},     {Normalize::kNone, 0.0, 1, true, true, false},
    {Normalize::kMax, -1.0, 1, false, false, true},     {Normalize::kMinmax, 1e-4, 1, false, false, true},
};

// Maps [rows, tokens], contiguous, and with a stride of rows and NaN between them; the first of two has a bright spot.
struct Maps {
  int64_t rows, tokens, stride;
  Guarded<float> strided, dense;

  Maps(int64_t rows, int64_t tokens, int64_t stride, int seed, const Options& options)
      : rows(rows), tokens(tokens), stride(stride), strided((rows - 1) * stride + tokens), dense(rows * tokens) {
    const int64_t count = (rows - 1) * stride + tokens;
    fill(strided, count, seed);
    for (int64_t index = 0; index < count; ++index) {
      const int64_t row = index / stride, token = index % stride;
      float& value = strided[index];
      value = token < tokens ? 1e-3f * (1.1f + value) : NAN;
      if (options.has_zeros && token % 3 == 0) value = 0.0f;
      if (options.has_nan && seed == 1 && index == tokens / 2) value = NAN;
      if (seed == 1 && token >= tokens / 3 && token <= tokens / 2) value *= 9.0f;
      if (token < tokens) dense[row * tokens + token] = value;
    }
  }
};

// Differences are relative; what normalizing subtracts is near the largest value of the result, which is 1.
bool agree(const Guarded<float>& found, const Guarded<float>& wanted, int64_t count, Normalize normalize) {
  const float offset = normalize == Normalize::kMinmax ? 2.0f : 0.0f;
  for (int64_t index = 0; index < count; ++index) {
    const float one = found.get()[index], other = wanted.get()[index];
    if (std::isnan(one) && std::isnan(other)) continue;
    if (!(std::abs(one - other) <= 4e-6f * (std::abs(other) + offset))) return false;
  }
  return true;
}

bool run(const Problem& problem, const Options& options) {
  carve::ContrastParams p{};
  p.layers = problem.layers;
  p.steps = problem.steps;
  p.general_steps = options.general_steps == 1 ? 1 : problem.steps;
  p.views = problem.views.data();
  p.view_count = static_cast<int64_t>(problem.views.size());
  p.normalize = options.normalize;
  p.lam_is_mean = options.lam < 0.0;
  p.lam = p.lam_is_mean ? 0.0 : options.lam;
  int64_t pixels = 0;
  for (const carve::ViewShape& view : problem.views) {
    p.tokens += view.grid_h * view.grid_w;
    pixels += view.height * view.width;
  }
  const int64_t stride = p.tokens + (options.has_padding ? 5 : 0);
  const Maps task(p.layers * p.steps, p.tokens, stride, 1, options);
  const Maps general(p.layers * p.general_steps, p.tokens, stride, 2, options);
  Guarded<double> by_layer(p.layers), by_step(p.steps);
  for (int64_t layer = 0; layer < p.layers; ++layer) by_layer[layer] = 1.0 + 0.25 * static_cast<double>(layer);
  for (int64_t step = 0; step < p.steps; ++step) by_step[step] = 0.5 + static_cast<double>(step % 7);
  p.layer_weights = by_layer.get();
  p.step_weights = by_step.get();

  Guarded<float> wanted(pixels), found(pixels);
  for (int64_t index = 0; index < pixels; ++index) found[index] = -1.25e4f;
  carve::ContrastParams on_cpu = p;
  on_cpu.task = task.dense.get();
  on_cpu.general = general.dense.get();
  on_cpu.out = wanted.get();
  carve::contrast_cpu(on_cpu);

  p.task = task.strided.get();
  p.general = general.strided.get();
  p.out = found.get();
  const int64_t bytes = carve::contrast_cuda_scratch(p);
  // Whole vectors, so that the scratch that ends at a page without access is aligned.
  Guarded<float> scratch((bytes + 15) / 16 * 4);
  for (int64_t index = 0; index < bytes / 4; ++index) scratch[index] = NAN;
  carve::ContrastDevice device{};
  device.task_strides[0] = p.steps * stride, device.task_strides[1] = stride;
  device.general_strides[0] = p.general_steps * stride, device.general_strides[1] = stride;
  device.scratch = scratch.get();
  device.scratch_bytes = bytes;
  carve::contrast_cuda(p, device);
  return agree(found, wanted, pixels, p.normalize);
}

}  // namespace

int main(int argc, char** argv) {
  // By default a third of the options of each problem; "all" runs all, in every order. "few" is for ThreadSanitizer,
  // where a thread of a kernel costs a third of a millisecond.
  const std::string amount = argc > 1 ? argv[1] : "";
  const bool few = amount == "few", all = amount == "all";
  int runs = 0;
  for (size_t number = 0; number < kProblems.size(); ++number) {
    for (size_t option = 0; option < kOptions.size(); ++option) {
      const bool is_few = (number == 0 && option < 2) || (number == kLongChunks && option == 0);
      if (few ? !is_few : !all && (number + option) % 3 != 0) continue;
      for (size_t turn = 0; turn < (all ? 3 : 1); ++turn) {
        const int order = few ? 2 : static_cast<int>((number + option / 3 + turn) % 3);
        emulator_configure(order, order == 0 ? 1 : 3, 1 + runs, 0);
        if (!run(kProblems[number], kOptions[option])) {
          std::printf("wrong: problem %d, options %d, order %d\n", int(number), int(option), order);
          return 1;
        }
        ++runs;
      }
    }
  }
  std::printf("%d runs are right\n", runs);
  return 0;
}
