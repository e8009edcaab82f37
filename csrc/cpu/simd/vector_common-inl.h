// Operations that AVX-512 has instructions for and other vectors compose; included after `load`.

template <typename T>
CARVE_INLINE Vector load_some(const T* from, int64_t count) {
  T line[kLanes] = {};
  for (int64_t lane = 0; lane < count; ++lane) line[lane] = from[lane];
  return load(line);
}

// value * 2^power for values about 1; 0 below the normal numbers.
CARVE_INLINE Vector raise(Vector value, Vector power) {
  const Vector result = (Vector)((Bits)value + (__builtin_convertvector(power, Bits) << 23));
  return power < -125.0f ? Vector{} : result;
}
