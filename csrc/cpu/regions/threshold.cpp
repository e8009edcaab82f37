#include "cpu/regions/threshold.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <mutex>
#include <type_traits>
#include <utility>
#include <vector>

#include "cpu/parallel.h"
#include "cpu/simd/wide.h"

namespace carve {
namespace {

// Values compared in parallel: too many to be unrolled, since an unrolled loop is not vectorized.
constexpr int64_t kLanes = 64;
constexpr int64_t kBins = 1 << 11;
// Neighbouring pixels often fall into the same bin: with one table each increment would wait for the previous one.
constexpr int64_t kTables = 4;
constexpr int64_t kBlock = 256;
// Fewer candidates are sorted directly.
constexpr int64_t kFewCandidates = 1 << 12;

template <class T>
constexpr T kInfinity = std::numeric_limits<T>::infinity();

template <class T>
CARVE_INLINE Range<T> scan_range(const T* values, int64_t count) {
  T low[kLanes];
  T high[kLanes];
  T spoilt[kLanes];  // sums of value * 0: 0 for finite values, NaN for others
  for (int64_t lane = 0; lane < kLanes; ++lane) low[lane] = high[lane] = values[0], spoilt[lane] = 0;
  int64_t index = 0;
  for (; index + kLanes <= count; index += kLanes) {
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      const T value = values[index + lane];
      low[lane] = value < low[lane] ? value : low[lane];
      high[lane] = value > high[lane] ? value : high[lane];
      spoilt[lane] += value * T(0);
    }
  }
  for (; index < count; ++index) {
    low[0] = std::min(low[0], values[index]);
    high[0] = std::max(high[0], values[index]);
    spoilt[0] += values[index] * T(0);
  }
  Range<T> range{low[0], high[0], spoilt[0] == T(0)};
  for (int64_t lane = 1; lane < kLanes; ++lane) {
    range.low = std::min(range.low, low[lane]);
    range.high = std::max(range.high, high[lane]);
    range.is_finite &= spoilt[lane] == T(0);
  }
  return range;
}

template <class T>
using Bits = std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>;

// An integer for each value that sorts like the value.
template <class T>
CARVE_INLINE Bits<T> key_of(T value) {
  constexpr Bits<T> kTop = Bits<T>(1) << (8 * sizeof(T) - 1);
  value += T(0);  // -0 becomes 0: they are equal, so they need the same key
  Bits<T> bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits ^ ((bits & kTop) ? ~Bits<T>(0) : kTop);
}

// Bins of equal width between the least and the greatest key of a range.
template <class T>
struct Bins {
  Bits<T> low;
  int shift = 0;

  explicit Bins(const Range<T>& range) : low(key_of(range.low)) {
    while ((key_of(range.high) - low) >> shift >= kBins) ++shift;
  }
  CARVE_INLINE int32_t operator()(T value) const { return static_cast<int32_t>((key_of(value) - low) >> shift); }
};

using Counts = std::vector<uint32_t>;

template <class T>
CARVE_INLINE void count_bins(const T* values, int64_t count, const Bins<T>& bins, uint32_t* tables) {
  int32_t indices[kBlock];
  for (int64_t start = 0; start < count; start += kBlock) {
    const int64_t size = count - start < kBlock ? count - start : kBlock;
    for (int64_t index = 0; index < size; ++index) indices[index] = bins(values[start + index]);
    for (int64_t index = 0; index < size; ++index) ++tables[(index % kTables) * kBins + indices[index]];
  }
}

template <class T>
Counts count_all(Isa isa, const T* values, int64_t count, const Bins<T>& bins) {
  Counts total(kBins, 0);
  std::mutex guard;
  parallel_for(count, kPixelsPerPart, [&](int64_t begin, int64_t end) {
    Counts tables(kTables * kBins, 0);
    run_wide(isa, [&]() CARVE_INLINE_LAMBDA { count_bins(values + begin, end - begin, bins, tables.data()); });
    const std::lock_guard<std::mutex> lock(guard);
    for (int64_t index = 0; index < kTables * kBins; ++index) total[index % kBins] += tables[index];
  });
  return total;
}

// The values in one bin, `size` of them, and the least value above it.
template <class T>
struct Candidates {
  std::vector<T> values;
  T next;
};

// Appends the values in a bin; count <= kLanes.
template <class T>
CARVE_INLINE void gather_few(const T* values, int64_t count, const Bins<T>& bins, int32_t bin,
                                    std::vector<T>& found) {
  const size_t size = found.size();
  found.resize(size + kLanes);
  T* end = found.data() + size;
  for (int64_t index = 0; index < count; ++index) {
    *end = values[index];
    end += bins(values[index]) == bin;
  }
  found.resize(static_cast<size_t>(end - found.data()));
}

template <class T>
CARVE_INLINE void gather_bin(const T* values, int64_t count, const Bins<T>& bins, int32_t bin,
                                    Candidates<T>& found) {
  T least[kLanes];
  for (T& lane : least) lane = found.next;
  int64_t index = 0;
  for (; index + kLanes <= count; index += kLanes) {
    int32_t hits = 0;
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      const T value = values[index + lane];
      const int32_t own_bin = bins(value);
      hits |= own_bin == bin;
      const T above = own_bin > bin ? value : kInfinity<T>;
      least[lane] = above < least[lane] ? above : least[lane];
    }
    if (hits) gather_few(values + index, kLanes, bins, bin, found.values);
  }
  gather_few(values + index, count - index, bins, bin, found.values);
  for (; index < count; ++index) {
    if (bins(values[index]) > bin) least[0] = std::min(least[0], values[index]);
  }
  for (T lane : least) found.next = std::min(found.next, lane);
}

template <class T>
Candidates<T> gather(Isa isa, const T* values, int64_t count, const Bins<T>& bins, int32_t bin, size_t size, T next) {
  Candidates<T> all{{}, next};
  std::mutex guard;
  parallel_for(count, kPixelsPerPart, [&](int64_t begin, int64_t end) {
    Candidates<T> part{{}, next};
    part.values.reserve(size + kLanes);
    run_wide(isa, [&]() CARVE_INLINE_LAMBDA { gather_bin(values + begin, end - begin, bins, bin, part); });
    const std::lock_guard<std::mutex> lock(guard);
    if (all.values.empty()) {
      all.values.swap(part.values);
    } else {
      all.values.insert(all.values.end(), part.values.begin(), part.values.end());
    }
    all.next = std::min(all.next, part.next);
  });
  return all;
}

// The value at a rank in sorted order and its successor, or `next` if it has none.
template <class T>
std::pair<T, T> select(std::vector<T>& values, int64_t rank, T next) {
  const auto target = values.begin() + rank;
  std::nth_element(values.begin(), target, values.end());
  const auto after = std::min_element(target + 1, values.end());
  return {*target, after == values.end() ? next : *after};
}

// As above. Each round keeps the values in the bin of the rank and removes 11 bits from the width of their keys: at
// most three rounds for float, six for double.
template <class T>
std::pair<T, T> select_pair(Isa isa, const T* values, int64_t count, Range<T> range, int64_t rank) {
  Candidates<T> candidates{{}, range.high};
  while (true) {
    if (range.low == range.high) return {range.low, rank + 1 < count ? range.low : candidates.next};
    if (count <= kFewCandidates) {
      if (candidates.values.empty()) candidates.values.assign(values, values + count);
      return select(candidates.values, rank, candidates.next);
    }
    const Bins<T> bins(range);
    const Counts counts = count_all(isa, values, count, bins);
    int32_t bin = 0;
    for (; rank >= counts[bin]; ++bin) rank -= counts[bin];
    candidates = gather(isa, values, count, bins, bin, counts[bin], candidates.next);
    values = candidates.values.data();
    count = static_cast<int64_t>(candidates.values.size());
    range = find_range(isa, values, count);
  }
}

}  // namespace

template <class T>
Range<T> find_range(Isa isa, const T* values, int64_t count) {
  Range<T> range{values[0], values[0], true};
  std::mutex guard;
  parallel_for(count, kPixelsPerPart, [&](int64_t begin, int64_t end) {
    Range<T> part;
    run_wide(isa, [&]() CARVE_INLINE_LAMBDA { part = scan_range(values + begin, end - begin); });
    const std::lock_guard<std::mutex> lock(guard);
    range.low = std::min(range.low, part.low);
    range.high = std::max(range.high, part.high);
    range.is_finite &= part.is_finite;
  });
  return range;
}

template <class T>
T find_threshold(Isa isa, const T* values, int64_t count, const Range<T>& range, double keep) {
  const double position = static_cast<double>(count - 1) * (100.0 * (1.0 - keep) / 100.0);
  const int64_t rank = std::min(static_cast<int64_t>(position), count - 1);
  const double fraction = position - static_cast<double>(rank);
  const auto [below, above] = select_pair(isa, values, count, range, rank);
  // NumPy rounds the fraction and its complement to T and interpolates from the nearer end.
  const T distance = above - below;
  return fraction >= 0.5 ? above - distance * static_cast<T>(1.0 - fraction)
                         : below + distance * static_cast<T>(fraction);
}

template Range<float> find_range(Isa, const float*, int64_t);
template Range<double> find_range(Isa, const double*, int64_t);
template float find_threshold(Isa, const float*, int64_t, const Range<float>&, double);
template double find_threshold(Isa, const double*, int64_t, const Range<double>&, double);

}  // namespace carve
