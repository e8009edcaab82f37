// Scores by dot products: keys are read as they lie in memory, neither packed nor transposed. A tile is a few query
// rows times a few keys; each of its scores is a vector of partial sums, and one tree of shuffles adds up the lanes of
// all of them at once. The order of the additions of a score is the same in every tile.

constexpr int64_t kDotRows = 4;
// Keys of a block: its scores of one row fill a vector.
constexpr int64_t kDotKeys = kLanes;
// Keys of a tile: more pointers than this would not fit into the registers.
constexpr int64_t kMostDotKeys = 8;

// About as many sums as a vector has lanes, but 12 for 3 rows: 6 would not hide the latency.
constexpr int64_t dot_keys(int64_t rows) {
  if (rows == 3) return 4;
  return kLanes / rows < kMostDotKeys ? kLanes / rows : kMostDotKeys;
}

// Products in float32. A step of a key is two vectors.
template <typename T>
struct FloatProduct {
  using Element = T;
  using Operand = Vector;
  static constexpr int64_t kParts = 2;
  static constexpr int64_t kStep = 2 * kLanes;

  // Measured with AVX2. The fewer products there are for each tree, the sooner the larger tiles of a panel pay.
  static bool serves(int64_t rows, int64_t size) { return rows <= (size < 64 ? 2 : size < 128 ? 6 : 9); }

  template <int64_t kPart>
  static CARVE_INLINE Vector load_key(const T* from) {
    return load(from + kPart * kLanes);
  }

  template <int64_t kPart>
  static CARVE_INLINE Vector load_some_key(const T* from, int64_t count) {
    const int64_t rest = count - kPart * kLanes;
    if (rest >= kLanes) return load(from + kPart * kLanes);
    return rest > 0 ? load_some(from + kPart * kLanes, rest) : Vector{};
  }

  static int64_t element(int64_t part, int64_t lane) { return part * kLanes + lane; }

  static CARVE_INLINE Vector load_query(const float* from) { return load(from); }

  static void store_query(float value, int64_t lane, float* to) { to[lane] = value; }

  static CARVE_INLINE Vector add(Vector query, Vector key, Vector sum) { return fma(query, key, sum); }
};

// The even elements and then the odd ones: each half of a 32-bit lane is one instruction away from a float.
template <>
struct FloatProduct<Bfloat16> : FloatProduct<float> {
  using Element = Bfloat16;

  template <int64_t kPart>
  static CARVE_INLINE Vector load_key(const Bfloat16* from) {
    return kPart == 0 ? even_elements(load_pairs(from)) : odd_elements(load_pairs(from));
  }

  template <int64_t kPart>
  static CARVE_INLINE Vector load_some_key(const Bfloat16* from, int64_t count) {
    return kPart == 0 ? even_elements(load_some_pairs(from, count)) : odd_elements(load_some_pairs(from, count));
  }

  static int64_t element(int64_t part, int64_t lane) { return 2 * lane + part; }
};

int64_t dot_tiles(int64_t rows) { return (rows + kDotRows - 1) / kDotRows; }

int64_t dot_tile_rows(int64_t rows, int64_t tile) {
  const int64_t tiles = dot_tiles(rows);
  return rows / tiles + (tile < rows % tiles ? 1 : 0);
}

template <class Product>
int64_t dot_packed_floats(int64_t rows, int64_t size) {
  return rows * ((size + Product::kStep - 1) / Product::kStep) * Product::kParts * kLanes;
}

// Tile after tile, [step, part, row of the tile, vector], padded with zeros.
template <class Product>
void pack_dots(const float* query, int64_t rows, int64_t size, float* packed) {
  for (int64_t tile = 0; tile < dot_tiles(rows); ++tile) {
    const int64_t count = dot_tile_rows(rows, tile);
    for (int64_t start = 0; start < size; start += Product::kStep) {
      for (int64_t part = 0; part < Product::kParts; ++part) {
        for (int64_t row = 0; row < count; ++row) {
          for (int64_t lane = 0; lane < Product::kStep / Product::kParts; ++lane) {
            const int64_t element = start + Product::element(part, lane);
            Product::store_query(element < size ? query[row * size + element] : 0.0f, lane, packed);
          }
          packed += kLanes;
        }
      }
    }
    query += count * size;
  }
}

// One part of a step: every key times every row. The fewer of the two stay in registers.
template <class Product, int64_t kRows, int64_t kKeys, int64_t kPart, bool kWhole>
CARVE_INLINE void add_products(const typename Product::Element* const* lines, int64_t start, int64_t count,
                               const float* query, Vector* sums) {
  using Operand = typename Product::Operand;
  const auto load_key = [=](int64_t key) CARVE_INLINE_LAMBDA -> Operand {
    if constexpr (kWhole) return Product::template load_key<kPart>(lines[key] + start);
    return Product::template load_some_key<kPart>(lines[key] + start, count);
  };
  query += kPart * kRows * kLanes;
  if constexpr (kRows >= kKeys) {
    Operand keys[kKeys];
#pragma GCC unroll 8
    for (int64_t key = 0; key < kKeys; ++key) keys[key] = load_key(key);
#pragma GCC unroll 4
    for (int64_t row = 0; row < kRows; ++row) {
      Operand factor = Product::load_query(query + row * kLanes);
      keep(factor);
#pragma GCC unroll 8
      for (int64_t key = 0; key < kKeys; ++key) {
        sums[row * kKeys + key] = Product::add(factor, keys[key], sums[row * kKeys + key]);
      }
    }
  } else {
    Operand factors[kRows];
#pragma GCC unroll 4
    for (int64_t row = 0; row < kRows; ++row) factors[row] = Product::load_query(query + row * kLanes);
#pragma GCC unroll 8
    for (int64_t key = 0; key < kKeys; ++key) {
      const Operand line = load_key(key);
#pragma GCC unroll 4
      for (int64_t row = 0; row < kRows; ++row) {
        sums[row * kKeys + key] = Product::add(factors[row], line, sums[row * kKeys + key]);
      }
    }
  }
}

// The sums [kRows, kKeys] of a tile. The tiles of the first rows prefetch the next block of keys for all rows.
template <class Product, int64_t kRows, int64_t kKeys, bool kFetch>
CARVE_INLINE void multiply_lines(const typename Product::Element* const* lines, int64_t size, const float* query,
                                 Prefetcher& prefetcher, Vector* sums) {
  using Element = typename Product::Element;
#pragma GCC unroll 16
  for (int64_t sum = 0; sum < kRows * kKeys; ++sum) sums[sum] = Vector{};
  int64_t start = 0;
  for (; start + Product::kStep <= size; start += Product::kStep) {
    if constexpr (kFetch) prefetcher.fetch<kKeys * Product::kStep * sizeof(Element) / Prefetcher::kLineBytes>();
    add_products<Product, kRows, kKeys, 0, true>(lines, start, 0, query, sums);
    if constexpr (Product::kParts == 2) add_products<Product, kRows, kKeys, 1, true>(lines, start, 0, query, sums);
    query += Product::kParts * kRows * kLanes;
  }
  if (start < size) {
    add_products<Product, kRows, kKeys, 0, false>(lines, start, size - start, query, sums);
    if constexpr (Product::kParts == 2) {
      add_products<Product, kRows, kKeys, 1, false>(lines, start, size - start, query, sums);
    }
  }
}

// The scores of a block of keys for the rows of a tile.
template <class Product, int64_t kRows, bool kFetch>
void score_tile(const typename Product::Element* const* lines, int64_t size, const float* query,
                Prefetcher& prefetcher, float* scores, int64_t stride) {
  constexpr int64_t kKeys = dot_keys(kRows);
  if constexpr (kRows == 1) {
    Vector sums[kLanes];
#pragma GCC unroll 2
    for (int64_t first = 0; first < kDotKeys; first += kKeys) {
      multiply_lines<Product, 1, kKeys, kFetch>(lines + first, size, query, prefetcher, sums + first);
    }
    store(scores, sum_each(sums));
  } else {
    // Rows whose sums fill a vector; a third row is alone and is added twice.
    constexpr int64_t kTreeRows = kLanes / kKeys;
    for (int64_t first = 0; first < kDotKeys; first += kKeys) {
      Vector sums[(kRows + kTreeRows - 1) / kTreeRows * kLanes];
      multiply_lines<Product, kRows, kKeys, kFetch>(lines + first, size, query, prefetcher, sums);
#pragma GCC unroll 8
      for (int64_t sum = kRows * kKeys; sum < static_cast<int64_t>(sizeof(sums) / sizeof(Vector)); ++sum) {
        sums[sum] = sums[sum - kKeys];
      }
#pragma GCC unroll 2
      for (int64_t row = 0; row < kRows; row += kTreeRows) {
        float line[kLanes];
        store(line, sum_each(sums + row * kKeys));
        const int64_t count = kRows - row < kTreeRows ? kRows - row : kTreeRows;
        for (int64_t of_tree = 0; of_tree < count; ++of_tree) {
          __builtin_memcpy(scores + (row + of_tree) * stride + first, line + of_tree * kKeys, kKeys * sizeof(float));
        }
      }
    }
  }
}

template <class Product, bool kFetch, int64_t kRows = kDotRows>
CARVE_INLINE void score_rows(int64_t rows, const typename Product::Element* const* lines, int64_t size,
                             const float* query, Prefetcher& prefetcher, float* scores, int64_t stride) {
  if (rows == kRows) {
    score_tile<Product, kRows, kFetch>(lines, size, query, prefetcher, scores, stride);
  } else if constexpr (kRows > 1) {
    score_rows<Product, kFetch, kRows - 1>(rows, lines, size, query, prefetcher, scores, stride);
  }
}

template <class Product>
void score_dots(const ScoreBlock& block) {
  using Element = typename Product::Element;
  const Element* key = static_cast<const Element*>(block.key);
  constexpr int64_t kBytes = sizeof(Element);
  Prefetcher prefetcher(key + kDotKeys * block.key_stride, block.size * kBytes, block.key_stride * kBytes);
  for (int64_t start = 0; start < block.keys; start += kDotKeys) {
    // Lanes after the last key repeat it; their scores are not used.
    const Element* lines[kDotKeys];
    for (int64_t lane = 0; lane < kDotKeys; ++lane) {
      lines[lane] = key + (start + lane < block.keys ? start + lane : block.keys - 1) * block.key_stride;
    }
    const float* query = static_cast<const float*>(block.query);
    float* scores = block.scores + start;
    for (int64_t tile = 0; tile < dot_tiles(block.rows); ++tile) {
      const int64_t rows = dot_tile_rows(block.rows, tile);
      tile == 0 ? score_rows<Product, true>(rows, lines, block.size, query, prefetcher, scores, block.stride)
                : score_rows<Product, false>(rows, lines, block.size, query, prefetcher, scores, block.stride);
      query += dot_packed_floats<Product>(rows, block.size);
      scores += rows * block.stride;
    }
  }
}

// Dot products for as many rows as the product serves better than a panel, which more of them share.
template <class Product>
struct DotScores {
  using Element = typename Product::Element;

  // Enough for fewer rows as well, which the last unit of a plan may have.
  static int64_t packed(int64_t rows, int64_t size) {
    const int64_t dots = dot_packed_floats<Product>(rows, size);
    const int64_t panel = packed_floats(rows, size);
    return dots > panel ? dots : panel;
  }

  static void pack(const float* query, int64_t rows, int64_t size, float* packed) {
    Product::serves(rows, size) ? pack_dots<Product>(query, rows, size, packed) : pack_query(query, rows, size, packed);
  }

  static void scores(const ScoreBlock& block) {
    Product::serves(block.rows, block.size) ? score_dots<Product>(block) : score_keys<Element>(block);
  }
};

template <class Product>
constexpr ScoreKernels dot_kernels() {
  using Scores = DotScores<Product>;
  return {Scores::packed, panel_floats, Scores::pack, Scores::scores};
}
