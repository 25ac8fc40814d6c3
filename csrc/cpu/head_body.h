// The output head for one instruction set. A body; before it come lanes.h and scratch.h. See
// head.h.

constexpr int64_t kStep = 2 * kLanes;  // bfloat16 numbers: a cache line

inline Floats even_of(Bits pairs) { return Floats::of(pairs.left<16>()); }
inline Floats odd_of(Bits pairs) { return Floats::of(pairs & Bits::splat(0xffff0000u)); }

// out[r, column + c] for kRows rows and kColumns columns. x: float32 [kRows, steps, 2, kLanes], the
// even and the odd numbers of every step. ends: the last, incomplete steps of the columns.
template <int kRows, int kColumns>
inline void head_tile(const Head& args, const float* x, int64_t row, int64_t column,
                      const uint16_t (*ends)[kStep]) {
  const int64_t whole = args.k / kStep, steps = (args.k + kStep - 1) / kStep;
  const uint16_t* const w = args.w + column * args.k;
  Floats even[kRows][kColumns], odd[kRows][kColumns];
  for (int r = 0; r < kRows; ++r)
    for (int c = 0; c < kColumns; ++c) even[r][c] = odd[r][c] = zeros();
  const auto add = [&](int64_t s, auto line) __attribute__((always_inline)) {
    for (int c = 0; c < kColumns; ++c) {
      const Bits pairs = Bits::load(line(c));
      const Floats w_even = even_of(pairs), w_odd = odd_of(pairs);
      for (int r = 0; r < kRows; ++r) {
        const float* const at = x + (r * steps + s) * kStep;
        even[r][c] = fma(Floats::load(at), w_even, even[r][c]);
        odd[r][c] = fma(Floats::load(at + kLanes), w_odd, odd[r][c]);
      }
    }
  };
  // Whole groups of columns ahead, about 8 KB.
  const int64_t group = kColumns * args.k, ahead = (4096 + group - 1) / group * group;
  for (int64_t s = 0; s < whole; ++s) {
    for (int c = 0; c < kColumns; ++c) __builtin_prefetch(w + c * args.k + s * kStep + ahead, 0, 2);
    add(s, [&](int c) { return w + c * args.k + s * kStep; });
  }
  if (whole < steps) add(whole, [&](int c) { return ends[c]; });
  for (int r = 0; r < kRows; ++r)
    for (int c = 0; c < kColumns; ++c) {
      float sum = (even[r][c] + odd[r][c]).sum();
      if (args.bias) sum = sum + bf16_to_float(args.bias[column + c]);
      args.out[(row + r) * args.n + column + c] = float_to_bf16(sum);
    }
}

template <int kRows>
inline void head_rows(const Head& args, const float* x, int64_t row, int64_t begin, int64_t end) {
  constexpr int kColumns = kRows == 1 ? 4 : 2;  // sums in registers: enough to hide an fma
  const int64_t rest = args.k % kStep;
  uint16_t ends[kColumns][kStep] = {};
  const auto tile = [&](auto columns, int64_t c) {
    constexpr int kCount = decltype(columns)::value;
    for (int i = 0; i < kCount && rest > 0; ++i)
      __builtin_memcpy(ends[i], args.w + (c + i + 1) * args.k - rest,
                       static_cast<std::size_t>(rest * 2));
    head_tile<kRows, kCount>(args, x, row, c, ends);
  };
  int64_t c = begin;
  for (; c + kColumns <= end; c += kColumns) tile(Constant<kColumns>(), c);
  for (; c < end; ++c) tile(Constant<1>(), c);
}

inline void head_body(const Head& args, int64_t begin, int64_t end) {
  const int64_t steps = (args.k + kStep - 1) / kStep, size = steps * kStep;
  float* const x = static_cast<float*>(scratch(args.rows * size * 4));
  for (int64_t r = 0; r < args.rows; ++r)
    for (int64_t k = 0; k < size; ++k) {
      const float value = k < args.k ? bf16_to_float(args.x[r * args.k + k]) : 0.0f;
      x[r * size + k / kStep * kStep + k % 2 * kLanes + k % kStep / 2] = value;
    }
  // All rows of a unit before the next one: its weights are in the nearest caches then.
  for (int64_t first = begin * kHeadColumns; begin < end; ++begin, first += kHeadColumns) {
    const int64_t last = first + kHeadColumns < args.n ? first + kHeadColumns : args.n;
    for (int64_t row = 0; row < args.rows;) {
      const int64_t left = args.rows - row, count = left >= 4 ? 4 : left >= 2 ? 2 : 1;
      (count == 4   ? &head_rows<4>
       : count == 2 ? &head_rows<2>
                    : &head_rows<1>)(args, x + row * size, row, first, last);
      row += count;
    }
  }
}
