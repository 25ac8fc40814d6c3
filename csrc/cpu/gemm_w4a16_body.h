// gemm_w4a16: out [m, n] = x [m, k] (codes [n, k] * w_scale [n, groups])^T (+ bias), x float32,
// bfloat16 or float16, codes of 2, 3 or 4 bits. A body: it is included into the anonymous namespace
// of one file per instruction set; needs gemm_tiles.h, lanes.h, scratch.h and row_body.h before it.
// All variants give the same bits.
//
// The lanes are 16 columns of the output. 128 rows of codes are unpacked to floats once per tile
// (8 KB, in the L1 cache) and multiplied into every row of the block:
//
//   part[r] = sum over 32 k, ascending:  part[r] = fma(x[r, k], code[k], part[r])
//   sum[r] = sum of the parts of a segment: k inside one group and one tile of 128
//   total[r] = fma(sum[r], w_scale[group], total[r])
//   out = round_T(total + bias)
//
// Error, with e = 2^-24 (float32's half ulp) and S = sum_k |x_k w_k|, w = code * scale:
//   |total - exact| <= (min(k / groups, 32) + 4 + segments) e S (1 + small),
// with at most groups + k / 128 + 1 segments; then one rounding of the bias addition and one to T.
// Bound: arithmetic (fma); for one row the unpacking.

constexpr int64_t kDepth = 128;  // k of one unpacked tile
constexpr int64_t kPart = 32;    // products summed up before they join a sum
static_assert(kTileColumns == kLanes, "the lanes are the columns of a tile");

inline Tiling tiling(const GemmW4A16& args) {
  return Tiling(args.m, args.n, args.k * static_cast<int64_t>(sizeof(float)));
}

// totals[r] += scale * sum over k in [0, count) of x[r, k] codes[k], for kRows rows. The sum is
// made of parts of kPart; several parts go side by side where the rows alone are too few to hide
// the latency of an addition. That changes no order: a part's own sum is the same, and parts join
// in turn.
template <int kRows, int kParts>
inline int64_t add_parts(const float* x, int64_t stride, const float* codes, int64_t first,
                         int64_t count, Floats* sums) {
  for (; first + kParts * kPart <= count; first += kParts * kPart) {
    Floats parts[kRows][kParts];
    for (int r = 0; r < kRows; ++r)
      for (int p = 0; p < kParts; ++p) parts[r][p] = Floats::splat(0.0f);
    for (int64_t k = first; k < first + kPart; ++k)
      for (int p = 0; p < kParts; ++p) {
        const Floats code = Floats::load(codes + (k + p * kPart) * kLanes);
        for (int r = 0; r < kRows; ++r)
          parts[r][p] = fma(Floats::splat(x[r * stride + k + p * kPart]), code, parts[r][p]);
      }
    for (int r = 0; r < kRows; ++r)
      for (int p = 0; p < kParts; ++p) sums[r] = sums[r] + parts[r][p];
  }
  return first;
}

template <int kRows>
inline void add_segment(const float* x, int64_t stride, const float* codes, int64_t count,
                        Floats scale, float* totals) {
  Floats sums[kRows];
  for (int r = 0; r < kRows; ++r) sums[r] = Floats::splat(0.0f);
  int64_t done = 0;
  if (kRows <= 2) done = add_parts<kRows, 4>(x, stride, codes, done, count, sums);
  done = add_parts<kRows, 1>(x, stride, codes, done, count, sums);
  if (done < count) {
    Floats rest[kRows];
    for (int r = 0; r < kRows; ++r) rest[r] = Floats::splat(0.0f);
    for (int64_t k = done; k < count; ++k)
      for (int r = 0; r < kRows; ++r)
        rest[r] = fma(Floats::splat(x[r * stride + k]), Floats::load(codes + k * kLanes), rest[r]);
    for (int r = 0; r < kRows; ++r) sums[r] = sums[r] + rest[r];
  }
  for (int r = 0; r < kRows; ++r)
    fma(sums[r], scale, Floats::load(totals + r * kLanes)).store(totals + r * kLanes);
}

inline void add_segment_to_rows(const float* x, int64_t stride, int64_t rows, const float* codes,
                                int64_t count, Floats scale, float* totals) {
  int64_t r = 0;
  for (; r + 8 <= rows; r += 8)
    add_segment<8>(x + r * stride, stride, codes, count, scale, totals + r * kLanes);
  for (; r + 2 <= rows; r += 2)
    add_segment<2>(x + r * stride, stride, codes, count, scale, totals + r * kLanes);
  for (; r < rows; ++r)
    add_segment<1>(x + r * stride, stride, codes, count, scale, totals + r * kLanes);
}

inline void gemm_w4a16_body(const GemmW4A16& args, int64_t begin, int64_t end) {
  const Tiling tiles = tiling(args);
  const int64_t k = args.k, group_size = args.groups > 0 ? k / args.groups : k;
  const int width = args.bits == 2 ? 2 : 4, per_byte = 8 / width;
  const int64_t w_bytes = packed_bytes(k, args.bits);
  const uint32_t flip = args.bits == 2 ? 0xaaaaaaaau : 0x88888888u;
  const Floats sign = Floats::splat(static_cast<float>(1 << (width - 1)));
  const bool copy = args.dtype != Dtype::kFloat32;

  float* const codes = static_cast<float*>(scratch(
      ((kDepth + tiles.block_rows) * kLanes + (copy ? tiles.block_rows * k : 0)) * int64_t{4}));
  float* const totals = codes + kDepth * kLanes;              // [block_rows, 16]
  float* const widened = totals + tiles.block_rows * kLanes;  // [block_rows, k], unless float32

  int64_t prepared_row = -1;
  for (int64_t t = begin; t < end; ++t) {
    const Tile tile = tiles.at(t);
    if (copy && tile.row != prepared_row)
      widen_row(args.x, args.dtype, tile.row * k, tile.rows * k, widened);
    prepared_row = tile.row;
    const float* const x = copy ? widened : static_cast<const float*>(args.x) + tile.row * k;

    int64_t column[kLanes];  // past the last column: that one again, unused
    for (int l = 0; l < kLanes; ++l)
      column[l] = tile.column + (l < tile.columns ? l : tile.columns - 1);
    for (int64_t i = 0; i < tile.rows * kLanes; ++i) totals[i] = 0.0f;

    for (int64_t k0 = 0; k0 < k; k0 += kDepth) {
      const int64_t depth = k - k0 < kDepth ? k - k0 : kDepth;
      const uint8_t* rows[kLanes];
      for (int l = 0; l < kLanes; ++l) rows[l] = args.w + column[l] * w_bytes + k0 / per_byte;
      unpack_transposed(rows, ceil_div(depth, per_byte), width, flip, sign, codes);
      for (int64_t first = k0; first < k0 + depth;) {
        const int64_t group = first / group_size, stop = (group + 1) * group_size;
        const int64_t count = (stop < k0 + depth ? stop : k0 + depth) - first;
        float scale[kLanes];
        for (int l = 0; l < kLanes; ++l) scale[l] = args.w_scale[column[l] * args.groups + group];
        add_segment_to_rows(x + first, k, tile.rows, codes + (first - k0) * kLanes, count,
                            Floats::load(scale), totals);
        first += count;
      }
    }

    float bias[kLanes] = {};
    if (args.bias) widen_row(args.bias, args.bias_dtype, tile.column, tile.columns, bias);
    for (int64_t r = 0; r < tile.rows; ++r) {
      float out[kLanes];
      Floats::load(totals + r * kLanes).store(out);
      if (args.bias) (Floats::load(out) + Floats::load(bias)).store(out);
      narrow_row(out, args.dtype, (tile.row + r) * args.n + tile.column, tile.columns, args.out);
    }
  }
}
