// Scores of bfloat16 by the matrix unit: the left tile is 16 keys read from the KV cache with its strides, and only the
// small query is packed. The product is [keys, rows] and is transposed by shuffles.

constexpr int64_t kTileKeys = 16;
constexpr int64_t kTileColumns = 16;
constexpr int64_t kStep = 32;  // elements of one tile row: 64 bytes
constexpr int64_t kTileFloats = kTileKeys * kTileColumns;
static_assert(kKeyTile == 4 * kTileKeys);

struct alignas(64) TileConfig {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

constexpr TileConfig kTileConfig;

int64_t step_count(int64_t size) { return (size + kStep - 1) / kStep; }

int64_t column_tiles(int64_t rows) { return (rows + kTileColumns - 1) / kTileColumns; }

int64_t tiles_packed_floats(int64_t rows, int64_t size) { return column_tiles(rows) * step_count(size) * kTileFloats; }

int64_t tiles_panel_floats(int64_t size) { return 4 * kTileFloats + kKeyTile * step_count(size) * kStep / 2; }

// [column tile, step, pair of elements, query row, 2], padded with zeros.
void tiles_pack(const float* query, int64_t rows, int64_t size, float* packed) {
  Bfloat16* to = reinterpret_cast<Bfloat16*>(packed);
  for (int64_t first = 0; first < rows; first += kTileColumns) {
    for (int64_t pair = 0; pair < step_count(size) * kStep; pair += 2) {
      for (int64_t row = first; row < first + kTileColumns; ++row) {
        for (int64_t element = pair; element < pair + 2; ++element) {
          const float value = row < rows && element < size ? query[row * size + element] : 0.0f;
          uint32_t bits;
          __builtin_memcpy(&bits, &value, sizeof(bits));
          *to++ = Bfloat16{static_cast<uint16_t>(bits >> 16)};
        }
      }
    }
  }
}

// Copies keys and pads each with zeros to whole steps: memory after a key may hold NaN.
void stage_keys(const Bfloat16* key, int64_t stride, int64_t keys, int64_t size, Bfloat16* staged) {
  const int64_t padded = step_count(size) * kStep;
  for (int64_t line = 0; line < kKeyTile; ++line) {
    const int64_t count = line < keys ? size : 0;
    __builtin_memcpy(staged + line * padded, key + line * stride, static_cast<size_t>(count) * sizeof(Bfloat16));
    __builtin_memset(staged + line * padded + count, 0, static_cast<size_t>(padded - count) * sizeof(Bfloat16));
  }
}

// 64 keys times 16 query rows. Four sums at a time: a product takes 52 cycles, and one can start every 16.
template <bool kFetch>
void multiply_tiles(const Bfloat16* key, int64_t stride, const Bfloat16* query, int64_t steps, Prefetcher& prefetcher,
                    float* products) {
  const int64_t bytes = stride * static_cast<int64_t>(sizeof(Bfloat16));
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t step = 0; step < steps; ++step) {
    _tile_loadd(7, query, 64);
    _tile_loadd(4, key, bytes);
    _tile_dpbf16ps(0, 4, 7);
    if constexpr (kFetch) prefetcher.fetch<kTileKeys>();
    _tile_loadd(5, key + kTileKeys * stride, bytes);
    _tile_dpbf16ps(1, 5, 7);
    if constexpr (kFetch) prefetcher.fetch<kTileKeys>();
    _tile_loadd(6, key + 2 * kTileKeys * stride, bytes);
    _tile_dpbf16ps(2, 6, 7);
    if constexpr (kFetch) prefetcher.fetch<kTileKeys>();
    _tile_loadd(4, key + 3 * kTileKeys * stride, bytes);
    _tile_dpbf16ps(3, 4, 7);
    if constexpr (kFetch) prefetcher.fetch<kTileKeys>();
    key += kStep;
    query += kStep * kTileColumns;
  }
  _tile_stored(0, products, 64);
  _tile_stored(1, products + kTileFloats, 64);
  _tile_stored(2, products + 2 * kTileFloats, 64);
  _tile_stored(3, products + 3 * kTileFloats, 64);
}

// Transposes tiles of up to 8 rows: two keys share a vector, 24 shuffles instead of 64.
void transpose_half_tiles(const float* products, int64_t rows, float* scores, int64_t stride) {
  for (int64_t block = 0; block < 4; ++block) {
    const float* from = products + block * kTileFloats;
    __m512 keys[8];
#pragma GCC unroll 8
    for (int64_t key = 0; key < 8; ++key) {
      const float* low = from + (key < 4 ? key : key + 4) * kTileColumns;
      keys[key] = _mm512_insertf32x8(_mm512_castps256_ps512(_mm256_loadu_ps(low)),
                                     _mm256_loadu_ps(low + 4 * kTileColumns), 1);
    }
    __m512 quads[8];
#pragma GCC unroll 2
    for (int64_t group = 0; group < 8; group += 4) {
      const __m512 low = _mm512_unpacklo_ps(keys[group], keys[group + 1]);
      const __m512 high = _mm512_unpackhi_ps(keys[group], keys[group + 1]);
      const __m512 next_low = _mm512_unpacklo_ps(keys[group + 2], keys[group + 3]);
      const __m512 next_high = _mm512_unpackhi_ps(keys[group + 2], keys[group + 3]);
      quads[group] = _mm512_shuffle_ps(low, next_low, 0x44);
      quads[group + 1] = _mm512_shuffle_ps(low, next_low, 0xee);
      quads[group + 2] = _mm512_shuffle_ps(high, next_high, 0x44);
      quads[group + 3] = _mm512_shuffle_ps(high, next_high, 0xee);
    }
    Vector lines[8];
#pragma GCC unroll 4
    for (int64_t row = 0; row < 4; ++row) {
      lines[row] = _mm512_shuffle_f32x4(quads[row], quads[row + 4], 0x88);
      lines[row + 4] = _mm512_shuffle_f32x4(quads[row], quads[row + 4], 0xdd);
    }
    for (int64_t row = 0; row < rows; ++row) store(scores + row * stride + block * kTileKeys, lines[row]);
  }
}

void transpose_tiles(const float* products, int64_t rows, float* scores, int64_t stride) {
  for (int64_t block = 0; block < 4; ++block) {
    Vector tile[kLanes];
#pragma GCC unroll 16
    for (int64_t key = 0; key < kTileKeys; ++key) tile[key] = load(products + block * kTileFloats + key * kTileColumns);
    transpose(tile);
    for (int64_t row = 0; row < rows; ++row) store(scores + row * stride + block * kTileKeys, tile[row]);
  }
}

void tiles_score(const ScoreBlock& block) {
  const Bfloat16* key = static_cast<const Bfloat16*>(block.key);
  const int64_t steps = step_count(block.size);
  float* products = block.panel;
  Bfloat16* staged = reinterpret_cast<Bfloat16*>(block.panel + 4 * kTileFloats);
  constexpr int64_t kBytes = sizeof(Bfloat16);
  Prefetcher prefetcher(key + kKeyTile * block.key_stride, block.size * kBytes, block.key_stride * kBytes);
  _tile_loadconfig(&kTileConfig);
  for (int64_t start = 0; start < block.keys; start += kKeyTile) {
    const int64_t keys = block.keys - start < kKeyTile ? block.keys - start : kKeyTile;
    const Bfloat16* from = key + start * block.key_stride;
    int64_t stride = block.key_stride;
    if (keys < kKeyTile || block.size % kStep != 0) {
      stage_keys(from, stride, keys, block.size, staged);
      from = staged;
      stride = steps * kStep;
    }
    const Bfloat16* query = static_cast<const Bfloat16*>(block.query);
    for (int64_t row = 0; row < block.rows; row += kTileColumns) {
      const int64_t rows = block.rows - row < kTileColumns ? block.rows - row : kTileColumns;
      // The first column tile prefetches the next keys into the L1 for all of them.
      row == 0 ? multiply_tiles<true>(from, stride, query, steps, prefetcher, products)
               : multiply_tiles<false>(from, stride, query, steps, prefetcher, products);
      float* scores = block.scores + row * block.stride + start;
      rows > 8 ? transpose_tiles(products, rows, scores, block.stride)
               : transpose_half_tiles(products, rows, scores, block.stride);
      query += steps * kStep * kTileColumns;
    }
  }
  _tile_release();
}
