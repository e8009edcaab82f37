// Gradients of a capture on odd sizes against sums in float64, with guard pages around every array and NaN in keys
// that no row sees; built with sanitizers, which abort on a read or write out of bounds. Every instruction set of the
// machine has to give the same result, with any number of threads.

#include <algorithm>
#include <cstdio>

#include "cpu/capture/kernels.h"
#include "cpu/simd/isa.h"
#include "native/capture_problem.h"

#ifdef CARVE_PLAIN_ALONE
// Faults are planted in the plain kernels: the others need not be compiled.
namespace carve {
const CaptureKernels& active_kernels() { return capture_kernels_plain(); }
}  // namespace carve
#endif

namespace {

struct Problem {
  Shape shape;
  View view;
  bool each;
  float softcap;
  bool has_sink;
};

struct Found {
  std::vector<double> query;
  std::vector<double> key;
  std::vector<double> sink;
};

// Arrays of one problem; T is float, or uint16_t for bfloat16.
template <typename T>
struct Arrays {
  explicit Arrays(const Problem& problem)
      : s(problem.shape),
        query(s.batch * s.heads * s.rows * s.size),
        key(s.batch * s.key_heads * s.keys * s.size),
        sink(s.heads),
        mask(s.batch * s.heads * s.rows * s.keys),
        positions(s.batch * s.rows),
        tokens(s.batch * s.tokens),
        maps(s.batch * (problem.each ? s.heads : 1) * s.rows * s.tokens),
        mass(s.batch * s.rows),
        entropy(s.batch * s.rows) {
    fill(query, s.batch * s.heads * s.rows * s.size, 1);
    fill(key, s.batch * s.key_heads * s.keys * s.size, 2);
    fill(sink, s.heads, 3);
    fill(maps, s.batch * (problem.each ? s.heads : 1) * s.rows * s.tokens, 4);
    fill(mass, s.batch * s.rows, 5);
    fill(entropy, s.batch * s.rows, 6);
    for (int64_t index = 0; index < s.batch * s.heads * s.rows * s.keys; ++index) mask[index] = index * 5 % 7 < 5;
    for (int64_t index = 0; index < s.batch * s.rows; ++index) positions[index] = s.keys - 1 - index % 5;
    for (int64_t index = 0; index < s.batch * s.tokens; ++index) {
      // Some are listed twice.
      tokens[index] = index % 5 == 4 ? tokens[index - 1] : static_cast<int32_t>(index * 7 % (s.keys + 3)) - 1;
    }
    // No row sees the second key, whatever it holds.
    for (int64_t line = 0; line < s.batch * s.heads * s.rows && s.keys > 1; ++line) mask[line * s.keys + 1] = 0;
    if (problem.view != View::kMask || s.keys < 2) return;
    for (int64_t head = 0; head < s.batch * s.key_heads; ++head) {
      for (int64_t element = 0; element < s.size; ++element) {
        key[(head * s.keys + 1) * s.size + element] = static_cast<T>(sizeof(T) == 4 ? NAN : 0x7fc0);
      }
    }
  }

  static double value(T bits) {
    if constexpr (sizeof(T) == sizeof(float)) {
      return bits;
    } else {
      const uint32_t wide = static_cast<uint32_t>(bits) << 16;
      float result;
      std::memcpy(&result, &wide, sizeof(result));
      return result;
    }
  }

  const Shape s;
  Guarded<T> query;
  Guarded<T> key;
  Guarded<float> sink;
  Guarded<uint8_t> mask;
  Guarded<int64_t> positions;
  Guarded<int32_t> tokens;
  Guarded<float> maps;
  Guarded<float> mass;
  Guarded<float> entropy;
};

constexpr double kScale = 0.3;
constexpr int64_t kWindow = 17;

template <typename T>
Found by_kernel(const Problem& problem, Arrays<T>& a, int64_t threads) {
  const Shape& s = problem.shape;
  carve::CaptureLayer layer{};
  layer.query = a.query.get();
  layer.query_strides[0] = s.heads * s.rows * s.size;
  layer.query_strides[1] = s.rows * s.size;
  layer.query_strides[2] = s.size;
  layer.query_strides[3] = 1;
  layer.key = a.key.get();
  layer.key_strides[0] = s.key_heads * s.keys * s.size;
  layer.key_strides[1] = s.keys * s.size;
  layer.key_strides[2] = s.size;
  layer.sink = problem.has_sink ? a.sink.get() : nullptr;
  carve::CaptureParams p{};
  p.layers = &layer;
  p.layer_count = 1;
  p.batch = s.batch;
  p.heads = s.heads;
  p.key_heads = s.key_heads;
  p.rows = s.rows;
  p.keys = s.keys;
  p.size = s.size;
  p.token_count = s.tokens;
  p.type = sizeof(T) == sizeof(float) ? carve::Float::kFloat32 : carve::Float::kBfloat16;
  p.tokens = {a.tokens.get(), false, {s.tokens, 1}};
  if (problem.view == View::kPositions) p.positions = {a.positions.get(), true, {s.rows, 1}};
  if (problem.view == View::kMask) {
    p.mask = a.mask.get();
    p.mask_strides[0] = s.heads * s.rows * s.keys;
    p.mask_strides[1] = s.rows * s.keys;
    p.mask_strides[2] = s.keys;
    p.mask_strides[3] = 1;
  }
  p.scale = static_cast<float>(kScale);
  p.softcap = problem.softcap;
  p.window = problem.view == View::kPositions ? kWindow : 0;
  p.each = problem.each;
  p.threads = threads;

  const int64_t queries = s.batch * s.heads * s.rows * s.size;
  const int64_t keys = s.batch * s.key_heads * s.keys * s.size;
  Guarded<float> to_query(queries), to_key(keys), to_sink(s.heads);
  std::fill_n(to_query.get(), queries, NAN);
  std::fill_n(to_key.get(), keys, NAN);
  std::fill_n(to_sink.get(), s.heads, NAN);
  const int64_t floats = carve::capture_backward_cpu_scratch(p);
  // A multiple of 64 bytes ends at the guard page, so its start is aligned.
  Guarded<float> scratch((floats + 15) / 16 * 16);
  std::fill_n(scratch.get(), floats, NAN);
  carve::capture_backward_cpu(p, {a.maps.get(), a.mass.get(), a.entropy.get(), to_query.get(), to_key.get(),
                                  problem.has_sink ? to_sink.get() : nullptr, scratch.get()});
  Found found;
  found.query.assign(to_query.get(), to_query.get() + queries);
  found.key.assign(to_key.get(), to_key.get() + keys);
  if (problem.has_sink) found.sink.assign(to_sink.get(), to_sink.get() + s.heads);
  return found;
}

template <typename T>
Found by_definition(const Problem& problem, Arrays<T>& a) {
  const Shape& s = problem.shape;
  Found found;
  found.query.assign(static_cast<size_t>(s.batch * s.heads * s.rows * s.size), 0.0);
  found.key.assign(static_cast<size_t>(s.batch * s.key_heads * s.keys * s.size), 0.0);
  if (problem.has_sink) found.sink.assign(static_cast<size_t>(s.heads), 0.0);
  const int64_t group = s.heads / s.key_heads;
  for (int64_t batch = 0; batch < s.batch; ++batch) {
    for (int64_t row = 0; row < s.rows; ++row) {
      const auto line_of = [&](int64_t head) { return (batch * s.heads + head) * s.rows + row; };
      const auto key_of = [&](int64_t head, int64_t key) {
        return ((batch * s.key_heads + head / group) * s.keys + key) * s.size;
      };
      const auto sees = [&](int64_t head, int64_t key) {
        if (problem.view == View::kMask) return a.mask[line_of(head) * s.keys + key] != 0;
        if (problem.view == View::kAll) return true;
        const int64_t last = a.positions[batch * s.rows + row];
        return key <= last && key > last - kWindow;
      };
      std::vector<std::vector<double>> shares(static_cast<size_t>(s.heads)), slopes(static_cast<size_t>(s.heads));
      std::vector<double> sinks(static_cast<size_t>(s.heads), 0.0);
      for (int64_t head = 0; head < s.heads; ++head) {
        auto& share = shares[static_cast<size_t>(head)];
        auto& slope = slopes[static_cast<size_t>(head)];
        share.assign(static_cast<size_t>(s.keys), 0.0);
        slope.assign(static_cast<size_t>(s.keys), 0.0);
        double total = problem.has_sink ? std::exp(static_cast<double>(a.sink[head])) : 0.0;
        for (int64_t key = 0; key < s.keys; ++key) {
          if (!sees(head, key)) continue;
          double product = 0.0;
          for (int64_t element = 0; element < s.size; ++element) {
            product += Arrays<T>::value(a.query[line_of(head) * s.size + element]) *
                       Arrays<T>::value(a.key[key_of(head, key) + element]);
          }
          const double tangent = problem.softcap == 0.0f ? 0.0 : std::tanh(product * kScale / problem.softcap);
          const double logit = problem.softcap == 0.0f ? product * kScale : tangent * problem.softcap;
          share[static_cast<size_t>(key)] = std::exp(logit);
          slope[static_cast<size_t>(key)] = kScale * (1.0 - tangent * tangent);
          total += std::exp(logit);
        }
        for (double& each : share) each = total == 0.0 ? 0.0 : each / total;
        if (problem.has_sink) sinks[static_cast<size_t>(head)] = std::exp(static_cast<double>(a.sink[head])) / total;
      }
      std::vector<double> means(static_cast<size_t>(s.tokens), 0.0);
      double mass = 0.0, spread = 0.0;
      int64_t used = 0;
      const auto token_of = [&](int64_t token) -> int64_t { return a.tokens[batch * s.tokens + token]; };
      const auto is_used = [&](int64_t token) { return token_of(token) >= 0 && token_of(token) < s.keys; };
      for (int64_t token = 0; token < s.tokens; ++token) {
        if (!is_used(token)) continue;
        ++used;
        for (const auto& share : shares) {
          const double probability = share[static_cast<size_t>(token_of(token))];
          means[static_cast<size_t>(token)] += probability / static_cast<double>(s.heads);
        }
        mass += means[static_cast<size_t>(token)];
      }
      for (double mean : means) spread -= mean > 0.0 ? mean / mass * std::log(mean / mass) : 0.0;
      const int64_t at = batch * s.rows + row;
      for (int64_t head = 0; head < s.heads; ++head) {
        std::vector<double> given(static_cast<size_t>(s.keys), 0.0);
        for (int64_t token = 0; token < s.tokens; ++token) {
          if (!is_used(token)) continue;
          double of_mean = a.mass[at];
          const double mean = means[static_cast<size_t>(token)];
          if (used > 1 && mean > 0.0) {
            of_mean -= a.entropy[at] * (std::log(mean / mass) + spread) / (mass * std::log(static_cast<double>(used)));
          }
          const double of_map = a.maps[(problem.each ? line_of(head) : at) * s.tokens + token];
          given[static_cast<size_t>(token_of(token))] +=
              (of_mean + (problem.each ? 0.0 : of_map)) / static_cast<double>(s.heads) + (problem.each ? of_map : 0.0);
        }
        const auto& share = shares[static_cast<size_t>(head)];
        double total = 0.0;
        for (size_t key = 0; key < share.size(); ++key) total += share[key] * given[key];
        if (problem.has_sink) found.sink[static_cast<size_t>(head)] -= sinks[static_cast<size_t>(head)] * total;
        for (int64_t key = 0; key < s.keys; ++key) {
          const auto index = static_cast<size_t>(key);
          const double product = share[index] * (given[index] - total) * slopes[static_cast<size_t>(head)][index];
          if (product == 0.0) continue;
          for (int64_t element = 0; element < s.size; ++element) {
            const int64_t query = line_of(head) * s.size + element, of_key = key_of(head, key) + element;
            found.query[static_cast<size_t>(query)] += product * Arrays<T>::value(a.key[of_key]);
            found.key[static_cast<size_t>(of_key)] += product * Arrays<T>::value(a.query[query]);
          }
        }
      }
    }
  }
  return found;
}

// The norm of the difference over the norm.
double distance(const std::vector<double>& found, const std::vector<double>& expected) {
  double difference = 0.0, size = 0.0;
  for (size_t index = 0; index < expected.size(); ++index) {
    difference += (found[index] - expected[index]) * (found[index] - expected[index]);
    size += expected[index] * expected[index];
  }
  return std::sqrt(difference) / (std::sqrt(size) + 1e-30);
}

// Not of NaN.
bool is_close(const Found& found, const Found& expected) {
  constexpr double kTolerance = 5e-6;
  return distance(found.query, expected.query) < kTolerance && distance(found.key, expected.key) < kTolerance &&
         distance(found.sink, expected.sink) < kTolerance;
}

template <typename T>
int check(const Problem& problem) {
  Arrays<T> arrays(problem);
  const Found expected = by_definition(problem, arrays);
  int failures = 0;
#ifdef CARVE_PLAIN_ALONE
  const int best = 0;
#else
  const int best = static_cast<int>(carve::best_isa());
#endif
  for (int isa = 0; isa <= best; ++isa) {
    carve::force_isa(isa);
    const Found found = by_kernel(problem, arrays, 1);
    const Found threaded = by_kernel(problem, arrays, 2);
    if (!is_close(found, expected)) ++failures;
    if (found.query != threaded.query || found.key != threaded.key || found.sink != threaded.sink) ++failures;
  }
  return failures;
}

}  // namespace

int main() {
  // CARVE_GRADIENT_SCORES divides all but the small ones into waves of rows, and of batches.
  const std::vector<Shape> shapes = {
      {1, 1, 1, 1, 1, 32, 1},  {1, 2, 1, 3, 0, 32, 4},   {2, 6, 2, 5, 77, 40, 19}, {1, 14, 2, 2, 1100, 24, 301},
      {1, 3, 3, 17, 513, 9, 0}, {1, 14, 2, 9, 65, 33, 66}, {5, 4, 4, 3, 31, 80, 30}, {1, 7, 1, 2, 600, 17, 500},
      {0, 2, 1, 3, 9, 32, 4},  {1, 2, 1, 0, 9, 32, 4},   {3, 8, 2, 1, 64, 96, 51}, {1, 2, 2, 1, 130, 7, 13},
  };
  int failures = 0;
  for (const Shape& shape : shapes) {
    for (View view : {View::kAll, View::kMask, View::kPositions}) {
      for (bool each : {false, true}) {
        const Problem problem{shape, view, each, view == View::kMask ? 1.5f : 0.0f, view != View::kAll};
        const int found = check<float>(problem) + check<uint16_t>(problem);
        if (found != 0) {
          std::printf("keys %lld size %lld view %d each %d\n", static_cast<long long>(shape.keys),
                      static_cast<long long>(shape.size), static_cast<int>(view), each);
        }
        failures += found;
      }
    }
  }
  std::printf("%d failures\n", failures);
  return failures == 0 ? 0 : 1;
}
