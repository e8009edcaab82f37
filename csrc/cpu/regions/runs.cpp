#include "cpu/regions/runs.h"

#include <algorithm>
#include <cstring>
#include <limits>

#include "cpu/parallel.h"
#include "cpu/simd/wide.h"

namespace carve {
namespace {

constexpr int64_t kLanes = 64;  // too many to be unrolled: an unrolled loop is not vectorized
constexpr int64_t kPixelsPerStrip = 1 << 15;
constexpr int64_t kWord = 8;
// Added to a double below 2^51 it rounds to an integer like rint() and leaves it in the low bits.
constexpr double kMagic = 6755399441055744.0;  // 1.5 * 2^52

// 1 at each pixel that differs from its left neighbour, and at `width` if the last pixel is in.
template <class T>
CARVE_INLINE void mark_edges(const T* __restrict values, int64_t width, T threshold,
                                    uint8_t* __restrict edges) {
  edges[0] = values[0] >= threshold;
  for (int64_t x = 1; x < width; ++x) edges[x] = (values[x] >= threshold) != (values[x - 1] >= threshold);
  edges[width] = values[width - 1] >= threshold;
}

template <class T>
CARVE_INLINE int64_t sum_fixed(const T* values, int64_t count, const FixedPoint& fixed) {
  // Unsigned: the sum of kMagic's bits may overflow; it is subtracted at the end.
  uint64_t sum = 0;
  uint64_t magic_bits = 0;
  std::memcpy(&magic_bits, &kMagic, sizeof(magic_bits));
  for (int64_t index = 0; index < count; ++index) {
    const double shifted = static_cast<double>(values[index]) / fixed.peak * fixed.one + kMagic;
    uint64_t bits;
    std::memcpy(&bits, &shifted, sizeof(bits));
    sum += bits;
  }
  return static_cast<int64_t>(sum - magic_bits * static_cast<uint64_t>(count));
}

template <class T>
CARVE_INLINE double find_peak(const T* values, int64_t count) {
  T lanes[kLanes];
  for (T& lane : lanes) lane = values[0];
  int64_t index = 0;
  for (; index + kLanes <= count; index += kLanes) {
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      lanes[lane] = values[index + lane] > lanes[lane] ? values[index + lane] : lanes[lane];
    }
  }
  for (; index < count; ++index) lanes[0] = values[index] > lanes[0] ? values[index] : lanes[0];
  T peak = lanes[0];
  for (T lane : lanes) peak = lane > peak ? lane : peak;
  return static_cast<double>(peak);
}

template <class T>
class RowScanner {
 public:
  RowScanner(int64_t width, T threshold, Score score, const FixedPoint& fixed)
      : width_(width), threshold_(threshold), score_(score), fixed_(fixed),
        edges_(static_cast<size_t>((width + kWord) / kWord * kWord), 0) {}

  CARVE_INLINE void scan(const T* values, int32_t row, std::vector<PixelRun>& runs) {
    mark_edges(values, width_, threshold_, edges_.data());
    int32_t begin = -1;
    for (size_t start = 0; start < edges_.size(); start += kWord) {
      uint64_t word;
      std::memcpy(&word, edges_.data() + start, kWord);
      // Most words are 0; in the others the lowest byte is the leftmost pixel.
      for (; word != 0; word &= word - 1) {
        const int32_t x = static_cast<int32_t>(start) + __builtin_ctzll(word) / 8;
        if (begin >= 0) runs.push_back(measure(values, row, begin, x));
        begin = begin >= 0 ? -1 : x;
      }
    }
  }

 private:
  CARVE_INLINE PixelRun measure(const T* values, int32_t row, int32_t begin, int32_t end) const {
    PixelRun run{row, begin, end, 0, 0.0};
    if (score_ == Score::kMax) {
      run.peak = find_peak(values + begin, end - begin);
    } else {
      run.sum = sum_fixed(values + begin, end - begin, fixed_);
    }
    return run;
  }

  int64_t width_;
  T threshold_;
  Score score_;
  FixedPoint fixed_;
  std::vector<uint8_t> edges_;
};

}  // namespace

template <class T>
std::vector<PixelRun> find_runs(Isa isa, const T* values, int64_t height, int64_t width, T threshold, Score score,
                                const FixedPoint& fixed) {
  const int64_t strip_rows = kPixelsPerStrip / width + 1;
  std::vector<std::vector<PixelRun>> strips(static_cast<size_t>((height + strip_rows - 1) / strip_rows));
  parallel_for(static_cast<int64_t>(strips.size()), kPixelsPerPart / kPixelsPerStrip, [&](int64_t begin, int64_t end) {
    RowScanner<T> scanner(width, threshold, score, fixed);
    run_wide(isa, [&]() CARVE_INLINE_LAMBDA {
      for (int64_t strip = begin; strip < end; ++strip) {
        const int64_t bottom = std::min((strip + 1) * strip_rows, height);
        for (int64_t row = strip * strip_rows; row < bottom; ++row) {
          scanner.scan(values + row * width, static_cast<int32_t>(row), strips[strip]);
        }
      }
    });
  });
  std::vector<PixelRun> runs;
  for (const std::vector<PixelRun>& strip : strips) runs.insert(runs.end(), strip.begin(), strip.end());
  return runs;
}

template std::vector<PixelRun> find_runs(Isa, const float*, int64_t, int64_t, float, Score, const FixedPoint&);
template std::vector<PixelRun> find_runs(Isa, const double*, int64_t, int64_t, double, Score, const FixedPoint&);

}  // namespace carve
