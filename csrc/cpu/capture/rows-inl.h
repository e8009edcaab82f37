// Operations on the scores of a row: exponentials of a chunk, gather of the tokens, mean over the heads, column sums.

constexpr float kHidden = -INFINITY;

void hide(float* scores, int64_t begin, int64_t end) {
  for (int64_t key = begin; key < end; ++key) scores[key] = kHidden;
}

void hide_masked(float* scores, const uint8_t* mask, int64_t keys) {
  int64_t key = 0;
  for (; key + kLanes <= keys; key += kLanes) {
    store(scores + key, load_bytes(mask + key) != 0 ? load(scores + key) : splat(kHidden));
  }
  for (; key < keys; ++key) {
    if (mask[key] == 0) scores[key] = kHidden;
  }
}

// Turns scores into logits where this takes more than a positive factor.
void make_logits(float* scores, int64_t end, float scale, float softcap, float* slopes) {
  for (int64_t key = 0; key < end; key += kLanes) {
    Vector logit = load(scores + key) * scale;
    if (softcap != 0.0f) {
      const Vector capped = hyperbolic_tangent(logit / softcap);
      if (slopes != nullptr) store(slopes + key, 1.0f - capped * capped);
      logit = capped * softcap;
    }
    store(scores + key, logit);
  }
}

Peak softmax_row(const ChunkRow& row) {
  float* const scores = row.scores;
  // Whole vectors: the scores are padded, and the padding is hidden like invisible keys.
  const int64_t end = (row.keys + kLanes - 1) / kLanes * kLanes;
  const bool linear = row.softcap == 0.0f && row.scale > 0.0f;
  if (!linear) make_logits(scores, end, row.scale, row.softcap, row.slopes);
  hide(scores, 0, row.first);
  hide(scores, row.last, end);
  if (row.mask != nullptr) hide_masked(scores, row.mask, row.keys);

  Vector tops = splat(kHidden);
  for (int64_t key = 0; key < end; key += kLanes) tops = larger(load(scores + key), tops);
  const float peak = largest_lane(tops);
  const bool dead = peak == kHidden;
  const double factor = linear ? row.scale * kExactLog2E : kExactLog2E;
  const double exact = peak * factor;
  const float top = static_cast<float>(exact);
  const Vector factors = splat(static_cast<float>(factor));
  const Vector peaks = splat(dead ? 0.0f : peak);
  // The rounding error of a large maximum is added to the exponents.
  const Vector rest = splat(dead ? 0.0f : static_cast<float>(exact - top));
  Vector sums = {};
  for (int64_t key = 0; key < end; key += kLanes) {
    __builtin_prefetch(row.prefetch + key * static_cast<int64_t>(sizeof(float)));
    const Vector value = exponential2(fma(load(scores + key) - peaks, factors, rest));
    store(scores + key, value);
    sums += value;
  }
  return {top, sum_lanes(sums)};
}

void relate_tops(float* tops, int64_t count, float top) {
  constexpr float kHighest = 126.0f;
  for (int64_t start = 0; start < count; start += kLanes) {
    const int64_t lanes = count - start < kLanes ? count - start : kLanes;
    float line[kLanes] = {};
    for (int64_t lane = 0; lane < lanes; ++lane) line[lane] = tops[start + lane] - top;
    const Vector distance = load(line);
    store(line, exponential2(distance < kHighest ? distance : splat(kHighest)));
    for (int64_t lane = 0; lane < lanes; ++lane) tops[start + lane] = line[lane];
  }
}

void gather_run(const GatherRow& row, const KeyRun& run) {
  const float* scores = row.scores + run.key;
  const float* factors = row.factors + run.key / kChunk;
  float* sum = row.sum + run.token;
  int64_t index = 0;
  for (; index + kLanes <= run.count; index += kLanes) {
    Vector total = {};
    for (int64_t head = 0; head < row.heads; ++head) {
      const Vector value = load(scores + head * row.head_stride + index) * factors[head * row.factor_stride];
      if (row.each != nullptr) store(row.each + head * row.each_stride + run.token + index, value);
      total += value;
    }
    store(sum + index, total);
  }
  for (; index < run.count; ++index) {
    float total = 0.0f;
    for (int64_t head = 0; head < row.heads; ++head) {
      const float value = scores[head * row.head_stride + index] * factors[head * row.factor_stride];
      if (row.each != nullptr) row.each[head * row.each_stride + run.token + index] = value;
      total += value;
    }
    sum[index] = total;
  }
}

void gather_row(const GatherRow& row) {
  for (int64_t index = 0; index < row.run_count; ++index) gather_run(row, row.runs[index]);
}

// The mean of up to kChunk tokens, padded with zeros to a whole vector.
void mean_chunk(const MeanRow& row, int64_t start, int64_t count, float (&mean)[kChunk]) {
  const Vector heads = splat(row.heads);
  for (int64_t token = 0; token < count; token += kLanes) {
    Vector total = {};
    for (int64_t group = 0; group < row.sum_count; ++group) {
      const float* from = row.sums + group * row.sum_stride + start + token;
      total += count - token < kLanes ? load_some(from, count - token) : load(from);
    }
    store(mean + token, total / heads);
  }
}

float compute_entropy(const float* mean, int64_t tokens, float mass) {
  constexpr float kSmallest = 1.17549435e-38f;
  double entropy = 0.0;
  for (int64_t start = 0; start < tokens; start += kChunk) {
    const int64_t count = tokens - start < kChunk ? tokens - start : kChunk;
    Vector sums = {};
    for (int64_t token = 0; token < count; token += kLanes) {
      const float* from = mean + start + token;
      const Vector value = count - token < kLanes ? load_some(from, count - token) : load(from);
      const Vector share = value / mass;
      const Vector term = share * logarithm(share);
      sums -= share < kSmallest ? splat(0.0f) : term;
    }
    entropy += sum_lanes(sums);
  }
  return static_cast<float>(entropy);
}

Summary mean_row(const MeanRow& row) {
  double mass = 0.0;
  for (int64_t start = 0; start < row.tokens; start += kChunk) {
    const int64_t count = row.tokens - start < kChunk ? row.tokens - start : kChunk;
    float mean[kChunk];
    mean_chunk(row, start, count, mean);
    Vector sums = {};
    for (int64_t token = 0; token < count; token += kLanes) sums += load(mean + token);
    mass += sum_lanes(sums);
    __builtin_memcpy(row.mean + start, mean, static_cast<size_t>(count) * sizeof(float));
  }
  const float total = static_cast<float>(mass);
  if (row.used < 2 || total == 0.0f) return {total, 0.0f};
  return {total, compute_entropy(row.mean, row.tokens, total) / __builtin_logf(static_cast<float>(row.used))};
}

void add_columns(const ColumnRow& row) {
  // Whole vectors: the scores are padded, and what is not visible in them is hidden.
  const int64_t begin = row.first / kLanes * kLanes;
  const int64_t end = (row.last + kLanes - 1) / kLanes * kLanes;
  const bool linear = row.softcap == 0.0f && row.scale > 0.0f;
  if (!linear) make_logits(row.scores + begin, end - begin, row.scale, row.softcap, nullptr);
  hide(row.scores, begin, row.first);
  hide(row.scores, row.last, end);
  if (row.mask != nullptr) hide_masked(row.scores + row.first, row.mask + row.first, row.last - row.first);
  const Vector factors = splat(static_cast<float>(linear ? row.scale * kExactLog2E : kExactLog2E));
  const Vector peaks = splat(row.peak);
  const Vector rests = splat(row.rest);
  const Vector hidden = splat(kHidden);
  for (int64_t key = begin; key < end; key += kLanes) {
    const Vector score = load(row.scores + key);
    const Vector value = exponential2(fma(score - peaks, factors, rests));
    // Also where the log-sum-exp of a row that sees nothing is NaN.
    store(row.sums + key, load(row.sums + key) + (score == hidden ? Vector{} : value));
  }
}
