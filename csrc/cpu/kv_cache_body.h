// kv_quantize_append and kv_dequantize: rows of a KV cache, quantized per token and head on the
// asymmetric grid of contract.h. A body: it is included into the anonymous namespace of one file
// per instruction set; needs lanes.h, scratch.h, row_body.h and row_codes.h before it. All variants
// give the same bits.
//
//   append: y = x P (float32, P rounded to T, i ascending, fma), then scale, zero and codes of y
//           codes [batch_heads, capacity, packed_bytes(head_dim, bits)], even index in the low bits
//
// Bound: the transform, 2 head_dim^2 operations a row; 4 rows share every load of P.

constexpr int kRowGroup = 4;

// y [kRowGroup, width] = x [kRowGroup, d] matrix [d, width]; width is d rounded up to whole lanes.
inline void transform_rows(const float* x, const float* matrix, int64_t d, int64_t width,
                           float* y) {
  for (int64_t column = 0; column < width; column += kLanes) {
    Floats sums[kRowGroup];
    for (int r = 0; r < kRowGroup; ++r) sums[r] = Floats::splat(0.0f);
    for (int64_t i = 0; i < d; ++i) {
      const Floats p = Floats::load(matrix + i * width + column);
      for (int r = 0; r < kRowGroup; ++r)
        sums[r] = fma(Floats::splat(x[r * width + i]), p, sums[r]);
    }
    for (int r = 0; r < kRowGroup; ++r) sums[r].store(y + r * width + column);
  }
}

inline void pack_row(const uint8_t* codes, int64_t d, int bits, uint8_t* out) {
  if (bits == 2)  // codes has room for, and zeros in, whole lanes
    for (int64_t b = 0; b < packed_bytes(d, 2); ++b)
      out[b] = static_cast<uint8_t>(codes[4 * b] | codes[4 * b + 1] << 2 | codes[4 * b + 2] << 4 |
                                    codes[4 * b + 3] << 6);
  else if (bits <= 4)
    for (int64_t b = 0; b < packed_bytes(d, 4); ++b)
      out[b] = pack_nibbles(codes[2 * b], codes[2 * b + 1]);
  else
    for (int64_t b = 0; b < d; ++b) out[b] = codes[b];
}

// Quantizes y [d] into position `slot` of the cache. codes is working space, whole lanes of d.
inline void append_row(const KvQuantizeAppend& args, const float* y, uint8_t* codes, int64_t slot) {
  const int64_t d = args.head_dim, width = whole_lanes(d);
  const float clip_max = args.clip ? args.clip[0] : 1.0f,
              clip_min = args.clip ? args.clip[1] : 1.0f;
  const Range range = range_of(y, d);
  const ScaleZero grid = asymmetric_scale(range.max, range.min, clip_max, clip_min, args.bits);
  args.scale[slot] = grid.scale;
  args.zero[slot] = static_cast<uint8_t>(grid.zero);

  for (int64_t i = d; i < width; ++i) codes[i] = 0;
  if (is_finite(grid.scale)) {
    const float lo = static_cast<float>(-grid.zero);
    const float hi = static_cast<float>(levels(args.bits) - grid.zero);
    row_codes(y, d, grid.scale, range, lo, hi, grid.zero, codes);
  } else {
    for (int64_t i = 0; i < d; ++i) codes[i] = 0;
  }
  pack_row(codes, d, args.bits, args.codes + slot * packed_bytes(d, args.bits));
}

inline void kv_quantize_append_body(const KvQuantizeAppend& args, int64_t begin, int64_t end) {
  const int64_t d = args.head_dim, width = whole_lanes(d);
  const int64_t matrix_size = args.transform ? d * width : 0;
  float* const matrix = static_cast<float*>(
      scratch((matrix_size + (2 * kRowGroup + 1) * width) * static_cast<int64_t>(sizeof(float))));
  float* const x = matrix + matrix_size;                                     // [kRowGroup, width]
  float* const y = x + kRowGroup * width;                                    // [kRowGroup, width]
  uint8_t* const codes = reinterpret_cast<uint8_t*>(y + kRowGroup * width);  // [width]

  if (args.transform)
    for (int64_t i = 0; i < d; ++i) {
      float* const row = matrix + i * width;
      widen_row(args.transform, args.transform_dtype, i * d, d, row);
      round_row(row, args.dtype, d);
      for (int64_t j = d; j < width; ++j) row[j] = 0.0f;
    }

  for (int64_t first = begin; first < end; first += kRowGroup) {
    const int64_t rows = end - first < kRowGroup ? end - first : kRowGroup;
    for (int64_t r = 0; r < kRowGroup; ++r)  // past the last row: that one again, unused
      widen_row(args.x, args.dtype, (first + (r < rows ? r : rows - 1)) * d, d, x + r * width);
    if (args.transform) transform_rows(x, matrix, d, width, y);
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t head = (first + r) / args.t, position = args.start + (first + r) % args.t;
      append_row(args, (args.transform ? y : x) + r * width, codes,
                 head * args.capacity + position);
    }
  }
}

template <int kWidth>
inline void dequantize_row(const uint8_t* bytes, int64_t d, int32_t zero, float scale, float* out) {
  constexpr int kPerByte = 8 / kWidth, kMask = (1 << kWidth) - 1;
  const int64_t whole = d / kPerByte;
  for (int64_t b = 0; b < whole; ++b)
    for (int i = 0; i < kPerByte; ++i)
      out[b * kPerByte + i] = value((bytes[b] >> (kWidth * i)) & kMask, zero, scale);
  for (int64_t i = whole * kPerByte; i < d; ++i)
    out[i] = value((bytes[whole] >> (kWidth * (i - whole * kPerByte))) & kMask, zero, scale);
}

inline void kv_dequantize_body(const KvDequantize& args, int64_t begin, int64_t end) {
  const int64_t d = args.head_dim, row_bytes = packed_bytes(d, args.bits);
  float* const values = static_cast<float*>(scratch(d * static_cast<int64_t>(sizeof(float))));
  for (int64_t row = begin; row < end; ++row) {
    const int64_t slot = row / args.length * args.capacity + row % args.length;
    const uint8_t* const bytes = args.codes + slot * row_bytes;
    const int32_t zero = args.zero[slot];
    if (args.bits == 2)
      dequantize_row<2>(bytes, d, zero, args.scale[slot], values);
    else if (args.bits <= 4)
      dequantize_row<4>(bytes, d, zero, args.scale[slot], values);
    else
      dequantize_row<8>(bytes, d, zero, args.scale[slot], values);
    narrow_row(values, args.out_dtype, row * d, d, args.out);
  }
}
