#include "regions_threshold.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <mutex>
#include <utility>
#include <vector>

#include "parallel.h"
#include "wide.h"

namespace carve {
namespace {

constexpr int64_t kLanes = 16;
constexpr int64_t kValuesPerPart = 1 << 16;
constexpr int64_t kBins = 2048;
// Neighbours in a picture fall into the same bin: with one table each increment would wait for the one before.
constexpr int64_t kTables = 4;
constexpr int64_t kBlock = 256;
// Fewer candidates, or those that are left after so many rounds, are put in order outright.
constexpr int64_t kFewCandidates = 1 << 12;
constexpr int kRounds = 4;

template <class T>
constexpr T kInfinity = std::numeric_limits<T>::infinity();

template <class T>
CARVE_INLINE inline Range<T> scan_range(const T* values, int64_t count) {
  T low[kLanes];
  T high[kLanes];
  T spoilt[kLanes];  // times 0 is 0 for finite values and NaN for others
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

// Equal steps over a range. Rounding never turns the order of two values round, so that bins are in order.
template <class T>
struct Bins {
  T low;
  T scale;

  explicit Bins(const Range<T>& range) : low(range.low), scale(T(kBins - 1) / (range.high - range.low)) {}

  // Not where the range is a single value, too wide or too narrow for T.
  bool are_usable() const { return scale > T(0) && scale < kInfinity<T>; }
  CARVE_INLINE int32_t operator()(T value) const { return static_cast<int32_t>((value - low) * scale); }
};

using Counts = std::vector<uint32_t>;

template <class T>
CARVE_INLINE inline void count_bins(const T* values, int64_t count, const Bins<T>& bins, uint32_t* tables) {
  int32_t places[kBlock];
  for (int64_t start = 0; start < count; start += kBlock) {
    const int64_t size = count - start < kBlock ? count - start : kBlock;
    for (int64_t index = 0; index < size; ++index) places[index] = bins(values[start + index]);
    for (int64_t index = 0; index < size; ++index) ++tables[(index % kTables) * kBins + places[index]];
  }
}

template <class T>
Counts count_all(Isa isa, const T* values, int64_t count, const Bins<T>& bins) {
  Counts total(kBins, 0);
  std::mutex guard;
  parallel_for(count, kValuesPerPart, [&](int64_t begin, int64_t end) {
    Counts tables(kTables * kBins, 0);
    run_wide(isa, [&]() CARVE_INLINE { count_bins(values + begin, end - begin, bins, tables.data()); });
    const std::lock_guard<std::mutex> lock(guard);
    for (int64_t place = 0; place < kTables * kBins; ++place) total[place % kBins] += tables[place];
  });
  return total;
}

// The values in one bin, and the least value above it.
template <class T>
struct Candidates {
  std::vector<T> values;
  T next;
};

template <class T>
CARVE_INLINE inline void gather_bin(const T* values, int64_t count, const Bins<T>& bins, int32_t bin,
                                    std::vector<T>& found, T& next) {
  T least[kLanes];
  for (T& lane : least) lane = next;
  for (int64_t start = 0; start < count; start += kBlock) {
    const int64_t size = count - start < kBlock ? count - start : kBlock;
    int32_t hits[kLanes] = {};
    int64_t index = 0;
    for (; index + kLanes <= size; index += kLanes) {
      for (int64_t lane = 0; lane < kLanes; ++lane) {
        const T value = values[start + index + lane];
        const int32_t place = bins(value);
        hits[lane] |= place == bin;
        const T above = place > bin ? value : kInfinity<T>;
        least[lane] = above < least[lane] ? above : least[lane];
      }
    }
    int32_t hit = 0;
    for (int32_t lane : hits) hit |= lane;
    if (!hit && index == size) continue;
    for (index = hit ? 0 : index; index < size; ++index) {
      const T value = values[start + index];
      const int32_t place = bins(value);
      if (place == bin) found.push_back(value);
      if (place > bin && value < least[0]) least[0] = value;
    }
  }
  for (T lane : least) next = lane < next ? lane : next;
}

template <class T>
Candidates<T> gather(Isa isa, const T* values, int64_t count, const Bins<T>& bins, int32_t bin, T next) {
  Candidates<T> all{{}, next};
  std::mutex guard;
  parallel_for(count, kValuesPerPart, [&](int64_t begin, int64_t end) {
    Candidates<T> part{{}, next};
    run_wide(isa, [&]() CARVE_INLINE { gather_bin(values + begin, end - begin, bins, bin, part.values, part.next); });
    const std::lock_guard<std::mutex> lock(guard);
    all.values.insert(all.values.end(), part.values.begin(), part.values.end());
    all.next = std::min(all.next, part.next);
  });
  return all;
}

// The value at a place in sorted order and the one after it, or `next` where there is none.
template <class T>
std::pair<T, T> select(std::vector<T>& values, int64_t rank, T next) {
  const auto place = values.begin() + rank;
  std::nth_element(values.begin(), place, values.end());
  const auto after = std::min_element(place + 1, values.end());
  return {*place, after == values.end() ? next : *after};
}

// As above. Each round keeps the values in the bin that holds the rank, until few are left.
template <class T>
std::pair<T, T> select_pair(Isa isa, const T* values, int64_t count, Range<T> range, int64_t rank) {
  Candidates<T> candidates{{}, range.high};
  for (int round = 0;; ++round) {
    if (range.low == range.high) return {range.low, rank + 1 < count ? range.low : candidates.next};
    const Bins<T> bins(range);
    if (count <= kFewCandidates || round == kRounds || !bins.are_usable()) {
      if (candidates.values.empty()) candidates.values.assign(values, values + count);
      return select(candidates.values, rank, candidates.next);
    }
    const Counts counts = count_all(isa, values, count, bins);
    int32_t bin = 0;
    for (; rank >= counts[bin]; ++bin) rank -= counts[bin];
    candidates = gather(isa, values, count, bins, bin, candidates.next);
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
  parallel_for(count, kValuesPerPart, [&](int64_t begin, int64_t end) {
    Range<T> part;
    run_wide(isa, [&]() CARVE_INLINE { part = scan_range(values + begin, end - begin); });
    const std::lock_guard<std::mutex> lock(guard);
    range.low = std::min(range.low, part.low);
    range.high = std::max(range.high, part.high);
    range.is_finite &= part.is_finite;
  });
  return range;
}

template <class T>
T find_threshold(Isa isa, const T* values, int64_t count, const Range<T>& range, double keep) {
  const double place = static_cast<double>(count - 1) * (100.0 * (1.0 - keep) / 100.0);
  const int64_t rank = std::min(static_cast<int64_t>(place), count - 1);
  const double share = place - static_cast<double>(rank);
  const auto [below, above] = select_pair(isa, values, count, range, rank);
  // NumPy rounds the share and its complement to T, and goes from the nearer end.
  const T distance = above - below;
  return share >= 0.5 ? above - distance * static_cast<T>(1.0 - share) : below + distance * static_cast<T>(share);
}

template Range<float> find_range(Isa, const float*, int64_t);
template Range<double> find_range(Isa, const double*, int64_t);
template float find_threshold(Isa, const float*, int64_t, const Range<float>&, double);
template double find_threshold(Isa, const double*, int64_t, const Range<double>&, double);

}  // namespace carve
