// 2^x, tanh and ln of vectors by the polynomials of Cephes, accurate to about 1 ulp.

CARVE_INLINE void store(float* to, Vector value) { __builtin_memcpy(to, &value, sizeof(value)); }

CARVE_INLINE Vector larger(Vector a, Vector b) { return a > b ? a : b; }

constexpr double kExactLog2E = 1.44269504088896341;
constexpr float kLog2E = static_cast<float>(kExactLog2E);

// 2^x for x up to 127; 0 far below. NaN stays NaN: the second operand of `larger` is what an unordered pair gives.
CARVE_INLINE Vector exponential2(Vector x) {
  constexpr float kLowest = -160.0f;
  const Vector bounded = larger(splat(kLowest), x);
  const Vector whole = nearest(bounded);
  const Vector rest = bounded - whole;
  Vector series = splat(1.535336188319500e-4f);
  series = fma(series, rest, splat(1.339887440266574e-3f));
  series = fma(series, rest, splat(9.618437357674640e-3f));
  series = fma(series, rest, splat(5.550332471162809e-2f));
  series = fma(series, rest, splat(2.402264791363012e-1f));
  series = fma(series, rest, splat(6.931472028550421e-1f));
  series = fma(series, rest, splat(1.0f));
  return raise(series, whole);
}

CARVE_INLINE Vector hyperbolic_tangent(Vector x) {
  constexpr float kSmall = 0.625f;
  const Bits sign = (Bits)x & INT32_MIN;
  const Vector size = (Vector)((Bits)x ^ sign);
  const Vector square = x * x;
  Vector series = splat(-5.70498872745e-3f);
  series = fma(series, square, splat(2.06390887954e-2f));
  series = fma(series, square, splat(-5.37397155531e-2f));
  series = fma(series, square, splat(1.33314422036e-1f));
  series = fma(series, square, splat(-3.33332819422e-1f));
  const Vector small = fma(series * square, x, x);
  const Vector decay = exponential2(size * (-2.0f * kLog2E));
  const Vector large = (Vector)((Bits)((1.0f - decay) / (1.0f + decay)) | sign);
  return size < kSmall ? small : large;
}

// ln x for normal positive x.
CARVE_INLINE Vector logarithm(Vector x) {
  constexpr float kSqrtHalf = 0.707106781186547524f;
  constexpr float kLn2High = 0.693359375f;
  constexpr float kLn2Low = -2.12194440e-4f;
  const Bits raised = ((Bits)x >> 23) - 126;
  const Vector mantissa = (Vector)(((Bits)x & 0x007fffff) | 0x3f000000);
  const Bits low = mantissa < kSqrtHalf;
  // A comparison gives -1 in the lanes where it holds.
  const Vector power = __builtin_convertvector(raised + low, Vector);
  const Vector rest = (low ? mantissa + mantissa : mantissa) - 1.0f;
  const Vector square = rest * rest;
  Vector series = splat(7.0376836292e-2f);
  series = fma(series, rest, splat(-1.1514610310e-1f));
  series = fma(series, rest, splat(1.1676998740e-1f));
  series = fma(series, rest, splat(-1.2420140846e-1f));
  series = fma(series, rest, splat(1.4249322787e-1f));
  series = fma(series, rest, splat(-1.6668057665e-1f));
  series = fma(series, rest, splat(2.0000714765e-1f));
  series = fma(series, rest, splat(-2.4999993993e-1f));
  series = fma(series, rest, splat(3.3333331174e-1f));
  const Vector curve = fma(series * rest, square, fma(power, splat(kLn2Low), square * -0.5f));
  return fma(power, splat(kLn2High), rest + curve);
}
