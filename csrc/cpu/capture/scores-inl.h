// Scores by broadcast products: a panel of keys is transposed once and then multiplied by every query row.
// Each score is one chain of multiply-adds in the order of the elements, for any blocking of keys and rows.

constexpr int64_t kPanel = kPanelVectors * kLanes;
static_assert(kKeyTile % kPanel == 0 && kChunk % kKeyTile == 0);

// Prefetches keys in the order of memory: tiles touch 16 keys at once, which no hardware prefetcher follows.
// The prefetches are spread over the computation: sixteen at once would wait for the core's 16 line buffers.
class Prefetcher {
 public:
  static constexpr int64_t kLineBytes = 64;

  CARVE_INLINE Prefetcher(const void* key, int64_t size, int64_t stride)
      : row_(static_cast<const char*>(key)), size_(size), stride_(stride) {}

  template <int64_t kLines>
  CARVE_INLINE void fetch() {
#pragma GCC unroll 16
    for (int64_t line = 0; line < kLines; ++line) {
      __builtin_prefetch(row_ + offset_);
      offset_ += kLineBytes;
      const bool next = offset_ >= size_;
      offset_ = next ? 0 : offset_;
      row_ += next ? stride_ : 0;
    }
  }

 private:
  const char* row_;
  int64_t offset_ = 0;
  int64_t size_;    // bytes of a key
  int64_t stride_;  // bytes from key to key
};

int64_t tile_count(int64_t rows) { return (rows + kTileRows - 1) / kTileRows; }

// Rows of one tile. The sizes of the tiles differ by at most 1.
int64_t tile_rows(int64_t rows, int64_t tile) {
  const int64_t tiles = tile_count(rows);
  return rows / tiles + (tile < rows % tiles ? 1 : 0);
}

int64_t packed_floats(int64_t rows, int64_t size) { return rows * size; }

int64_t panel_floats(int64_t size) { return size * kPanel; }

// Tile after tile, [size, rows of the tile].
void pack_query(const float* query, int64_t rows, int64_t size, float* packed) {
  for (int64_t tile = 0; tile < tile_count(rows); ++tile) {
    const int64_t count = tile_rows(rows, tile);
    for (int64_t element = 0; element < size; ++element) {
      for (int64_t row = 0; row < count; ++row) *packed++ = query[row * size + element];
    }
    query += count * size;
  }
}

template <typename T>
CARVE_INLINE void transpose_keys(const T* const (&lines)[kLanes], int64_t start, int64_t count, float* panel) {
  Vector tile[kLanes];
#pragma GCC unroll 16
  for (int64_t lane = 0; lane < kLanes; ++lane) {
    tile[lane] = count == kLanes ? load(lines[lane] + start) : load_some(lines[lane] + start, count);
  }
  transpose(tile);
  for (int64_t element = 0; element < count; ++element) store(panel + (start + element) * kPanel, tile[element]);
}

template <typename T>
void pack_panel(const T* key, int64_t stride, int64_t keys, int64_t size, Prefetcher& prefetcher, float* panel) {
  for (int64_t vector = 0; vector < kPanelVectors; ++vector) {
    // Lanes after the last key repeat it; their scores are not used.
    const T* lines[kLanes];
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      const int64_t line = vector * kLanes + lane;
      lines[lane] = key + (line < keys ? line : keys - 1) * stride;
    }
    int64_t start = 0;
    for (; start + kLanes <= size; start += kLanes) {
      prefetcher.fetch<kLanes * kLanes * sizeof(T) / 64>();
      transpose_keys(lines, start, kLanes, panel + vector * kLanes);
    }
    if (start < size) transpose_keys(lines, start, size - start, panel + vector * kLanes);
  }
}

template <int64_t kRows>
void multiply_tile(const float* panel, const float* query, int64_t size, float* scores, int64_t stride) {
  Vector sums[kRows][kPanelVectors] = {};
  for (int64_t element = 0; element < size; ++element) {
    Vector keys[kPanelVectors];
#pragma GCC unroll 4
    for (int64_t vector = 0; vector < kPanelVectors; ++vector) keys[vector] = load(panel + vector * kLanes);
#pragma GCC unroll 16
    for (int64_t row = 0; row < kRows; ++row) {
#pragma GCC unroll 4
      for (int64_t vector = 0; vector < kPanelVectors; ++vector) {
        sums[row][vector] = fma(splat(query[row]), keys[vector], sums[row][vector]);
      }
    }
    panel += kPanel;
    query += kRows;
  }
#pragma GCC unroll 16
  for (int64_t row = 0; row < kRows; ++row) {
#pragma GCC unroll 4
    for (int64_t vector = 0; vector < kPanelVectors; ++vector) {
      store(scores + row * stride + vector * kLanes, sums[row][vector]);
    }
  }
}

template <int64_t kRows = kTileRows>
CARVE_INLINE void multiply(int64_t rows, const float* panel, const float* query, int64_t size, float* scores,
                           int64_t stride) {
  if (rows == kRows) {
    multiply_tile<kRows>(panel, query, size, scores, stride);
  } else if constexpr (kRows > 1) {
    multiply<kRows - 1>(rows, panel, query, size, scores, stride);
  }
}

// A single row: keys are read in the order of memory and only the sums are transposed, 64 shuffles for 16 keys.
template <typename T>
void score_single(const ScoreBlock& block) {
  const T* key = static_cast<const T*>(block.key);
  const float* query = static_cast<const float*>(block.query);
  const int64_t whole = block.size / kLanes * kLanes;
  const int64_t bytes = block.size * static_cast<int64_t>(sizeof(T));
  // Memory would be idle during the shuffles unless the next 16 keys are already being loaded.
  Prefetcher prefetcher(key + kLanes * block.key_stride, bytes, block.key_stride * static_cast<int64_t>(sizeof(T)));
  for (int64_t start = 0; start < block.keys; start += kLanes) {
    Vector sums[kLanes] = {};
#pragma GCC unroll 16
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      for (int64_t fetched = 0; fetched < bytes; fetched += Prefetcher::kLineBytes) prefetcher.fetch<1>();
      const T* line = key + (start + lane < block.keys ? start + lane : block.keys - 1) * block.key_stride;
      for (int64_t element = 0; element < whole; element += kLanes) {
        sums[lane] = fma(load(line + element), load(query + element), sums[lane]);
      }
      if (whole < block.size) {
        const int64_t rest = block.size - whole;
        sums[lane] = fma(load_some(line + whole, rest), load_some(query + whole, rest), sums[lane]);
      }
    }
    transpose(sums);
    Vector total = sums[0];
    for (int64_t lane = 1; lane < kLanes; ++lane) total += sums[lane];
    store(block.scores + start, total);
  }
}

template <typename T>
void score_keys(const ScoreBlock& block) {
  if (block.rows == 1) return score_single<T>(block);
  const T* key = static_cast<const T*>(block.key);
  constexpr int64_t kBytes = sizeof(T);
  Prefetcher prefetcher(key + kPanel * block.key_stride, block.size * kBytes, block.key_stride * kBytes);
  for (int64_t start = 0; start < block.keys; start += kPanel) {
    const int64_t keys = block.keys - start < kPanel ? block.keys - start : kPanel;
    pack_panel(key + start * block.key_stride, block.key_stride, keys, block.size, prefetcher, block.panel);
    const float* query = static_cast<const float*>(block.query);
    float* scores = block.scores + start;
    for (int64_t tile = 0; tile < tile_count(block.rows); ++tile) {
      const int64_t rows = tile_rows(block.rows, tile);
      multiply(rows, block.panel, query, block.size, scores, block.stride);
      query += rows * block.size;
      scores += rows * block.stride;
    }
  }
}

template <typename T>
constexpr ScoreKernels score_kernels() {
  return {packed_floats, panel_floats, pack_query, score_keys<T>};
}
