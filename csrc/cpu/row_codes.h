// Codes of rows of numbers. A body: it is included into the anonymous namespace of one file per
// instruction set; before it come ../ops.h, lanes.h and row_body.h.

// out[j] = code of y[j], one a byte; the scale is no NaN.
inline void row_codes(const float* y, int64_t k, float scale, const Range& range, float lo,
                      float hi, int32_t zero, uint8_t* out) {
  int64_t j = 0;
  static_cast<void>(range);
#if defined(__FMA__)
  // With i = 1 / s, q = fma(fma(-(x i), s, x), i, x i) has the code of x / s for every x, and a
  // division takes longer than all the rest; see docs/numerics.md. The lowest byte of q + 1.5 2^23
  // is q rounded, as in clamp_round.
  constexpr float kLeast = 7.888609052210118e-31f, kMost = 1.2676506002282294e30f;  // 2^+-100
  const float inverse = 1.0f / scale;
  if (scale >= kLeast && scale <= kMost && is_finite((range.max - range.min) * inverse)) {
    const Floats i = Floats::splat(inverse), s = Floats::splat(-scale);
    const Floats low = Floats::splat(lo), high = Floats::splat(hi);
    const Bits offset = Bits::splat(static_cast<uint32_t>(zero));
    for (; j + kLanes <= k; j += kLanes) {
      const Floats x = Floats::load(y + j), near = x * i;
      const Floats quotient = fma(fma(near, s, x), i, near);
      const Floats bounded = smaller(larger(quotient, low), high);
      ((bounded + Floats::splat(12582912.0f)).bits() + offset).store_bytes(out + j);
    }
  }
#endif
  for (; j < k; ++j) out[j] = static_cast<uint8_t>(code(y[j], scale, lo, hi, zero));
}

// Codes of one row, in the grid's layout. bytes: room for k + 1 codes.
inline ScaleZero quantize_row(const float* y, int64_t k, const float* clip, const Grid& grid,
                              uint8_t* codes, uint8_t* bytes) {
  const Range range = range_of(y, k);
  const float clip_max = clip ? clip[0] : 1.0f, clip_min = clip ? clip[1] : 1.0f;
  ScaleZero row;
  if (grid.symmetric)
    row = {symmetric_scale(range.max, range.min, clip_max, clip_min, grid.bits), 0};
  else
    row = asymmetric_scale(range.max, range.min, clip_max, clip_min, grid.bits);

  const int64_t size = row_bytes(grid, k);
  const bool nibbles = grid.bits <= 4 && grid.layout == Layout::kPacked;
  if (!is_finite(row.scale)) {
    for (int64_t j = 0; j < size; ++j) codes[j] = 0;
    return row;
  }
  const int32_t lowest = grid.symmetric ? qmin(grid.bits, grid.narrow) : -row.zero;
  const int32_t highest = grid.symmetric ? qmax(grid.bits) : levels(grid.bits) - row.zero;
  const float lo = static_cast<float>(lowest), hi = static_cast<float>(highest);
  uint8_t* const out = nibbles ? bytes : codes;
  row_codes(y, k, row.scale, range, lo, hi, row.zero, out);
  if (nibbles) {
    bytes[k] = 0;  // the partner of the last code, if k is odd
    for (int64_t j = 0; j < size; ++j) {
      uint16_t pair;  // little endian: the even code is the low byte
      __builtin_memcpy(&pair, bytes + 2 * j, 2);
      codes[j] = static_cast<uint8_t>((pair & 15) | ((pair >> 4) & 0xf0));
    }
  }
  return row;
}
