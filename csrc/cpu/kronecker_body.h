// vec(P1^T X P2), with or without a quantizer behind it, for one instruction set. A body; before it
// come lanes.h, row_body.h and the constant kTileRows: how many Floats of sums fit the registers.
//
// Both products are C = A B with B's rows padded to whole Floats:
//   S [n1, n2] = round_T(left [n1, n1] X [n1, n2]),   Y [n1, n2] = S right [n2, n2].
// The terms of an element join its sum in parts of 32, ascending: even = fma over the even k of a
// part, ascending from 0, odd likewise, sum = sum + (even + odd). So no tile changes a bit, and the
// matrix unit of AMX, whose order this is, gives the same: kronecker_amx.cpp.

constexpr int64_t kPart = 32;

// kRows rows of C, kVectors Floats wide: the sums stay in registers.
template <int kRows, int kVectors>
inline __attribute__((always_inline)) void product_tile(const float* a, int64_t a_stride,
                                                        const float* b, int64_t depth, int64_t n,
                                                        float* c) {
  Floats sum[kRows][kVectors];
  for (int r = 0; r < kRows; ++r)
    for (int v = 0; v < kVectors; ++v) sum[r][v] = zeros();
  for (int64_t first = 0; first < depth; first += kPart) {
    const int64_t stop = first + kPart < depth ? first + kPart : depth;
    Floats even[kRows][kVectors], odd[kRows][kVectors];
    for (int r = 0; r < kRows; ++r)
      for (int v = 0; v < kVectors; ++v) even[r][v] = odd[r][v] = zeros();
    const auto term = [&](int64_t k, auto& sums) __attribute__((always_inline)) {
      for (int v = 0; v < kVectors; ++v) {
        const Floats column = Floats::load(b + k * n + v * kLanes);
        for (int r = 0; r < kRows; ++r)
          sums[r][v] = fma(Floats::splat(a[r * a_stride + k]), column, sums[r][v]);
      }
    };
    int64_t k = first;
    for (; k + 2 <= stop; k += 2) {
      term(k, even);
      term(k + 1, odd);
    }
    if (k < stop) term(k, even);
    for (int r = 0; r < kRows; ++r)
      for (int v = 0; v < kVectors; ++v) sum[r][v] = sum[r][v] + (even[r][v] + odd[r][v]);
  }
  for (int r = 0; r < kRows; ++r)
    for (int v = 0; v < kVectors; ++v) sum[r][v].store(c + r * n + v * kLanes);
}

template <int kRows, int kVectors>
inline void product_rows(const float* a, int64_t a_stride, const float* b, int64_t depth, int64_t n,
                         float* c) {
  int64_t j = 0;
  for (; j + kVectors * kLanes <= n; j += kVectors * kLanes)
    product_tile<kRows, kVectors>(a, a_stride, b + j, depth, n, c + j);
  for (; j < n; j += kLanes) product_tile<kRows, 1>(a, a_stride, b + j, depth, n, c + j);
}

// C [m, n] = A [m, depth] B [depth, n]; n is whole Floats, and the stride of B and C.
inline void product(const float* a, int64_t a_stride, const float* b, int64_t m, int64_t depth,
                    int64_t n, float* c) {
  int64_t i = 0;
  for (; i + kTileRows <= m; i += kTileRows)
    product_rows<kTileRows, 1>(a + i * a_stride, a_stride, b, depth, n, c + i * n);
  for (; i < m; ++i) product_rows<1, kTileRows>(a + i * a_stride, a_stride, b, depth, n, c + i * n);
}

inline void copy_padded(const float* x, int64_t rows, int64_t columns, float* out) {
  const int64_t stride = whole_lanes(columns);
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < columns; ++j) out[i * stride + j] = x[i * columns + j];
    for (int64_t j = columns; j < stride; ++j) out[i * stride + j] = 0.0f;
  }
}

// What a Workspace needs.
inline int64_t work_floats(const Transform& t) {
  const int64_t factors =
      (t.left ? whole_lanes(t.n1 * t.n1) : 0) + (t.right ? t.n2 * whole_lanes(t.n2) : 0);
  return whole_lanes(t.n1 * t.n2) + 2 * t.n1 * whole_lanes(t.n2) + factors;
}

// The factors, widened once per call, and room for one row.
struct Workspace {
  float *left, *right, *row, *x, *s;

  Workspace(const Transform& t, Dtype dtype, float* work) {
    const int64_t matrix = t.n1 * whole_lanes(t.n2);
    row = work;
    x = row + whole_lanes(t.n1 * t.n2);
    s = x + matrix;
    left = s + matrix;
    right = left + (t.left ? whole_lanes(t.n1 * t.n1) : 0);
    if (t.left) {
      widen_row(t.left, t.left_dtype, 0, t.n1 * t.n1, left);
      round_row(left, dtype, t.n1 * t.n1);
    }
    if (t.right) {
      for (int64_t i = 0; i < t.n2; ++i) {
        float* const out = right + i * whole_lanes(t.n2);
        widen_row(t.right, t.right_dtype, i * t.n2, t.n2, out);
        round_row(out, dtype, t.n2);
        for (int64_t j = t.n2; j < whole_lanes(t.n2); ++j) out[j] = 0.0f;
      }
    }
  }
};

// Transforms w.row in place, up to the last product, which stays float32.
inline void transform_row(const Transform& t, Dtype dtype, const Workspace& w) {
  const int64_t k = t.n1 * t.n2, n = whole_lanes(t.n2);
  if (t.channel_scale) {
    for (int64_t j = 0; j < k; ++j) w.row[j] = w.row[j] * t.channel_scale[j];
    round_row(w.row, dtype, k);
  }
  if (!t.left && !t.right) return;
  float* current = w.row;
  float* next = w.s;
  if (n != t.n2) {
    copy_padded(w.row, t.n1, t.n2, w.x);
    current = w.x;
  }
  if (t.left) {
    product(w.left, t.n1, current, t.n1, t.n1, n, next);
    round_row(next, dtype, t.n1 * n);
    current = next;
    next = w.x;
  }
  if (t.right) {
    product(current, n, w.right, t.n1, t.n2, n, next);
    current = next;
  }
  for (int64_t i = 0; i < t.n1; ++i)
    for (int64_t j = 0; j < t.n2; ++j) w.row[i * t.n2 + j] = current[i * n + j];
}

inline void kronecker_rows(const Kronecker& args, int64_t begin, int64_t end, float* work) {
  const Workspace w(args.transform, args.dtype, work);
  for (int64_t i = begin; i < end; ++i) {
    widen_row(args.x, args.dtype, i * args.k, args.k, w.row);
    transform_row(args.transform, args.dtype, w);
    narrow_row(w.row, args.out_dtype, i * args.k, args.k, args.out);
  }
}

// Codes of row i from its transform. bytes: see quantize_row. squares: sum of v^2, if rms.
inline void quantize_transformed(const KroneckerQuantize& args, int64_t i, const float* y,
                                 float squares, uint8_t* bytes) {
  const int64_t size = row_bytes(args.grid, args.k);
  const ScaleZero found =
      quantize_row(y, args.k, args.clip, args.grid, args.codes + i * size, bytes);
  args.scale[i] =
      args.rms ? found.scale * rms_reciprocal(squares, args.k, args.rms_eps) : found.scale;
  if (args.zero) args.zero[i] = found.zero;
}

inline void kronecker_quantize_rows(const KroneckerQuantize& args, int64_t begin, int64_t end,
                                    float* work) {
  const Workspace w(args.transform, args.dtype, work);
  uint8_t* const bytes = reinterpret_cast<uint8_t*>(w.s);  // free once the row is transformed
  const int64_t k = args.k;
  for (int64_t i = begin; i < end; ++i) {
    widen_row(args.x, args.dtype, i * k, k, w.row);
    if (args.gate) {
      float* const gate = w.x;  // likewise not in use yet
      widen_row(args.gate, args.dtype, i * k, k, gate);
      for (int64_t j = 0; j < k; ++j) w.row[j] = silu(gate[j]) * w.row[j];
      round_row(w.row, args.dtype, k);
    }
    const float squares = args.rms ? sum_of_squares(w.row, k) : 0.0f;
    transform_row(args.transform, args.dtype, w);
    quantize_transformed(args, i, w.row, squares, bytes);
  }
}
