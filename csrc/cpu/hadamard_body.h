// x (base (x) H_2^j) scale, for one instruction set. A body; needs row_body.h before it.
//
// A row is a matrix [m, power]: butterflies inside its rows, spans 1, 2, 4, ...; then base^T from
// the left, ascending i. One order of additions for every instruction set.

inline void butterflies(float* x, int64_t n, int64_t power) {
  for (int64_t span = 1; span < power; span *= 2)
    for (int64_t start = 0; start < n; start += 2 * span)
      for (int64_t j = start; j < start + span; ++j) {
        const float a = x[j], b = x[j + span];
        x[j] = a + b;
        x[j + span] = a - b;
      }
}

// work: 2 n + m m floats.
inline void hadamard_rows(const Hadamard& args, int64_t begin, int64_t end, float* work) {
  const int64_t n = args.n, m = args.m, power = args.power;
  float* const row = work;
  float* const mixed = row + n;
  float* const base = mixed + n;
  if (args.base) widen_row(args.base, args.base_dtype, 0, m * m, base);
  for (int64_t r = begin; r < end; ++r) {
    widen_row(args.x, args.dtype, r * n, n, row);
    butterflies(row, n, power);
    float* y = row;
    if (args.base) {
      y = mixed;
      for (int64_t j = 0; j < n; ++j) y[j] = 0.0f;
      for (int64_t out = 0; out < m; ++out)
        for (int64_t in = 0; in < m; ++in)
          for (int64_t j = 0; j < power; ++j)
            y[out * power + j] = fma(base[in * m + out], row[in * power + j], y[out * power + j]);
    }
    for (int64_t j = 0; j < n; ++j) y[j] = y[j] * args.scale;
    narrow_row(y, args.dtype, r * n, n, args.out);
  }
}
