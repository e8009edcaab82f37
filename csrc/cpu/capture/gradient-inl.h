// Gradients of a chunk of keys: of the products of a row, and from them of the query and of the keys.
// Each sum is one chain of multiply-adds in the order of the keys, or of the rows, for any blocking of the others.

// Keys whose elements stay in the L1 while every row reads them.
constexpr int64_t kNearKeys = 64;

float weigh_row(const float* values, const float* given, int64_t keys) {
  Vector sums = {};
  for (int64_t key = 0; key < keys; key += kLanes) sums = fma(load(values + key), load(given + key), sums);
  return sum_lanes(sums);
}

void product_row(const ProductRow& row) {
  const Vector factor = splat(row.factor);
  const Vector total = splat(row.total);
  const Vector scale = splat(row.scale);
  for (int64_t key = 0; key < row.keys; key += kLanes) {
    const Vector probability = load(row.values + key) * factor;
    Vector value = probability * (load(row.given + key) - total) * scale;
    if (row.slopes != nullptr) value = value * load(row.slopes + key);
    // The slope of a hidden key may be NaN.
    store(row.values + key, probability == 0.0f ? Vector{} : value);
  }
}

// `count` elements of a vector, all of them where it is whole.
template <bool kWhole, typename T>
CARVE_INLINE Vector load_part(const T* from, int64_t count) {
  if constexpr (kWhole) return load(from);
  return load_some(from, count);
}

template <bool kWhole>
CARVE_INLINE void store_part(float* to, Vector value, int64_t count) {
  if constexpr (kWhole) {
    store(to, value);
  } else {
    float line[kLanes];
    store(line, value);
    __builtin_memcpy(to, line, static_cast<size_t>(count) * sizeof(float));
  }
}

// Some rows times `count` elements from `start` on, which are kVectors whole vectors or one that is not.
template <typename T, int64_t kRows, int64_t kVectors, bool kWhole>
void query_tile(const QueryGradient& g, int64_t begin, int64_t end, int64_t row, int64_t start, int64_t count) {
  const T* key = static_cast<const T*>(g.key) + start;
  const float* values = g.values + row * g.stride;
  float* out = g.out + row * g.size + start;
  Vector sums[kRows][kVectors];
#pragma GCC unroll 16
  for (int64_t of_tile = 0; of_tile < kRows; ++of_tile) {
#pragma GCC unroll 4
    for (int64_t vector = 0; vector < kVectors; ++vector) {
      const float* from = out + of_tile * g.size + vector * kLanes;
      sums[of_tile][vector] = begin == 0 ? Vector{} : load_part<kWhole>(from, count);
    }
  }
  for (int64_t index = begin; index < end; ++index) {
    const int64_t column = g.columns[index];
    const T* line = key + column * g.key_stride;
    Vector keys[kVectors];
#pragma GCC unroll 4
    for (int64_t vector = 0; vector < kVectors; ++vector) {
      keys[vector] = load_part<kWhole>(line + vector * kLanes, count);
    }
#pragma GCC unroll 16
    for (int64_t of_tile = 0; of_tile < kRows; ++of_tile) {
      const Vector value = splat(values[of_tile * g.stride + column]);
#pragma GCC unroll 4
      for (int64_t vector = 0; vector < kVectors; ++vector) {
        sums[of_tile][vector] = fma(value, keys[vector], sums[of_tile][vector]);
      }
    }
  }
#pragma GCC unroll 16
  for (int64_t of_tile = 0; of_tile < kRows; ++of_tile) {
#pragma GCC unroll 4
    for (int64_t vector = 0; vector < kVectors; ++vector) {
      store_part<kWhole>(out + of_tile * g.size + vector * kLanes, sums[of_tile][vector], count);
    }
  }
}

template <typename T, int64_t kRows = kTileRows>
CARVE_INLINE void query_rows(int64_t rows, const QueryGradient& g, int64_t begin, int64_t end, int64_t row) {
  if (rows == kRows) {
    int64_t start = 0;
    for (; start + kPanel <= g.size; start += kPanel) {
      query_tile<T, kRows, kPanelVectors, true>(g, begin, end, row, start, kPanel);
    }
    for (; start + kLanes <= g.size; start += kLanes) {
      query_tile<T, kRows, 1, true>(g, begin, end, row, start, kLanes);
    }
    if (start < g.size) query_tile<T, kRows, 1, false>(g, begin, end, row, start, g.size - start);
  } else if constexpr (kRows > 1) {
    query_rows<T, kRows - 1>(rows, g, begin, end, row);
  }
}

template <typename T>
void query_gradient(const QueryGradient& g) {
  for (int64_t begin = 0; begin < g.count; begin += kNearKeys) {
    const int64_t end = begin + kNearKeys < g.count ? begin + kNearKeys : g.count;
    for (int64_t tile = 0, row = 0; tile < tile_count(g.rows); row += tile_rows(g.rows, tile), ++tile) {
      query_rows<T>(tile_rows(g.rows, tile), g, begin, end, row);
    }
  }
}

template <int64_t kKeys, int64_t kVectors, bool kWhole>
void key_tile(const KeyGradient& g, int64_t key, int64_t start, int64_t count) {
  Vector sums[kKeys][kVectors] = {};
  const float* values = g.values + key;
  const float* query = g.query + start;
  for (int64_t row = 0; row < g.rows; ++row) {
    Vector line[kVectors];
#pragma GCC unroll 4
    for (int64_t vector = 0; vector < kVectors; ++vector) {
      line[vector] = load_part<kWhole>(query + vector * kLanes, count);
    }
#pragma GCC unroll 16
    for (int64_t of_tile = 0; of_tile < kKeys; ++of_tile) {
#pragma GCC unroll 4
      for (int64_t vector = 0; vector < kVectors; ++vector) {
        sums[of_tile][vector] = fma(splat(values[of_tile]), line[vector], sums[of_tile][vector]);
      }
    }
    values += g.stride;
    query += g.size;
  }
#pragma GCC unroll 16
  for (int64_t of_tile = 0; of_tile < kKeys; ++of_tile) {
#pragma GCC unroll 4
    for (int64_t vector = 0; vector < kVectors; ++vector) {
      float* to = g.out + (key + of_tile) * g.size + start + vector * kLanes;
      const Vector before = g.adds ? load_part<kWhole>(to, count) : Vector{};
      store_part<kWhole>(to, before + sums[of_tile][vector], count);
    }
  }
}

template <int64_t kKeys = kTileRows>
CARVE_INLINE void key_rows(int64_t keys, const KeyGradient& g, int64_t key) {
  if (keys == kKeys) {
    int64_t start = 0;
    for (; start + kPanel <= g.size; start += kPanel) key_tile<kKeys, kPanelVectors, true>(g, key, start, kPanel);
    for (; start + kLanes <= g.size; start += kLanes) key_tile<kKeys, 1, true>(g, key, start, kLanes);
    if (start < g.size) key_tile<kKeys, 1, false>(g, key, start, g.size - start);
  } else if constexpr (kKeys > 1) {
    key_rows<kKeys - 1>(keys, g, key);
  }
}

void key_gradient(const KeyGradient& g) {
  for (int64_t tile = 0, key = 0; tile < tile_count(g.keys); key += tile_rows(g.keys, tile), ++tile) {
    key_rows(tile_rows(g.keys, tile), g, key);
  }
}

constexpr GradientKernels kGradients = {
    weigh_row,
    product_row,
    {query_gradient<float>, query_gradient<Float16>, query_gradient<Bfloat16>},
    key_gradient,
};
