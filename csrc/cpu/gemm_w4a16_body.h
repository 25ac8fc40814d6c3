// gemm_w4a16 by vector multiply-adds, for any x and any groups. A body: it is included into the
// anonymous namespace of one file per instruction set; needs gemm_w4a16.h, lanes.h, quads.h,
// scratch.h, row_body.h and kRegisters before it.
//
// The lanes are 16 columns of the output. A line of each is unpacked to floats (in the L1 cache)
// and multiplied into every row of the tile; one row alone takes its products while they are
// unpacked. Bound: arithmetic; for one row the unpacking.

constexpr int kMostRows = kRegisters >= 32 ? 8 : 2;

// Four bytes each of 16 columns.
#if defined(__AVX512F__)

struct Words {
  __m512i v;
};
inline void load_words(const uint8_t* const* columns, int64_t offset, Words (&words)[4]) {
  __m512i quads[4];
  load_quads(columns, offset, quads);
  for (int j = 0; j < 4; ++j) words[j].v = quads[j];
}
// Code i of every column.
template <int kWidth>
inline Floats field(Words words, int i) {
  const __m512 values =
      kWidth == 4 ? _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1)
                  : _mm512_setr_ps(0, 1, -2, -1, 0, 1, -2, -1, 0, 1, -2, -1, 0, 1, -2, -1);
  return {_mm512_permutexvar_ps(_mm512_srli_epi32(words.v, kWidth * i), values)};
}

#elif defined(__AVX2__)

struct Words {
  __m256i lo, hi;
};
inline void load_words(const uint8_t* const* columns, int64_t offset, Words (&words)[4]) {
  __m256i lo[4], hi[4];
  load_quads(columns, offset, lo);
  load_quads(columns + 8, offset, hi);
  for (int j = 0; j < 4; ++j) words[j] = {lo[j], hi[j]};
}
template <int kWidth>
inline Floats field(Words words, int i) {
  const auto half = [&](__m256i w) {
    const __m256i top = _mm256_slli_epi32(w, 32 - kWidth * (i + 1));
    return _mm256_cvtepi32_ps(_mm256_srai_epi32(top, 32 - kWidth));
  };
  return {half(words.lo), half(words.hi)};
}

#else

struct Words {
  uint32_t v[kLanes];
};
inline void load_words(const uint8_t* const* columns, int64_t offset, Words (&words)[4]) {
  for (int j = 0; j < 4; ++j)
    for (int l = 0; l < kLanes; ++l) {
      const uint8_t* const b = columns[l] + offset + j * 4;
      words[j].v[l] = b[0] | uint32_t{b[1]} << 8 | uint32_t{b[2]} << 16 | uint32_t{b[3]} << 24;
    }
}
template <int kWidth>
inline Floats field(const Words& words, int i) {
  constexpr int kSign = 1 << (kWidth - 1);
  Floats out;
  for (int l = 0; l < kLanes; ++l) {
    const int code = static_cast<int>(words.v[l] >> (kWidth * i)) & (2 * kSign - 1);
    out.v[l] = static_cast<float>((code ^ kSign) - kSign);
  }
  return out;
}

#endif

// `count` codes of 16 columns from code `first` on, as floats: out[i * 16 + lane]. `bytes` are in a
// column. Returns how many codes before the first one were unpacked too; there is room for these
// and for the rest of 16 bytes.
template <int kWidth>
inline int64_t unpack(const uint8_t* const* columns, int64_t bytes, int64_t first, int64_t count,
                      float* out) {
  constexpr int64_t kPerByte = 8 / kWidth, kPerWord = 32 / kWidth;
  const int64_t begin = first / kPerByte, end = ceil_div(first + count, kPerByte);
  for (int64_t b = begin; b < end; b += 16) {
    Words words[4];
    if (b + 16 <= bytes) {
      load_words(columns, b, words);
    } else {
      uint8_t last[kLanes][16] = {};
      const uint8_t* at[kLanes];
      for (int l = 0; l < kLanes; ++l) {
        __builtin_memcpy(last[l], columns[l] + b, static_cast<std::size_t>(bytes - b));
        at[l] = last[l];
      }
      load_words(at, 0, words);
    }
    for (int j = 0; j < 4; ++j)
      for (int i = 0; i < kPerWord; ++i, out += kLanes) field<kWidth>(words[j], i).store(out);
  }
  return first - begin * kPerByte;
}

// sums[r] += the parts of one line of `count` codes, for kRows rows.
template <int kWidth, int kRows>
inline void add_line(const float* x, int64_t stride, const float* codes, int64_t count,
                     float* sums) {
  constexpr int64_t kFields = 16 / kWidth;
  for (int64_t j = 0; j < kFields && j < count; ++j) {
    const int64_t words = (count - j - 1) / kFields + 1;
    Floats chains[kRows][2];
    for (int r = 0; r < kRows; ++r) chains[r][0] = chains[r][1] = Floats::splat(0.0f);
    const auto add = [&](int64_t word, int odd) __attribute__((always_inline)) {
      const int64_t k = word * kFields + j;
      const Floats code = Floats::load(codes + k * kLanes);
      for (int r = 0; r < kRows; ++r)
        chains[r][odd] = fma(Floats::splat(x[r * stride + k]), code, chains[r][odd]);
    };
    for (int64_t word = 0; word + 2 <= words; word += 2) {
      add(word, 0);
      add(word + 1, 1);
    }
    if (words % 2) add(words - 1, 0);
    for (int r = 0; r < kRows; ++r) {
      float* const sum = sums + r * kTileColumns;
      (Floats::load(sum) + (chains[r][0] + chains[r][1])).store(sum);
    }
  }
}

template <int kWidth>
inline void add_line_to_rows(const float* x, int64_t stride, int64_t rows, const float* codes,
                             int64_t count, float* sums) {
  int64_t r = 0;
  for (; r + kMostRows <= rows; r += kMostRows)
    add_line<kWidth, kMostRows>(x + r * stride, stride, codes, count, sums + r * kTileColumns);
  for (; r + 2 <= rows; r += 2)
    add_line<kWidth, 2>(x + r * stride, stride, codes, count, sums + r * kTileColumns);
  for (; r < rows; ++r)
    add_line<kWidth, 1>(x + r * stride, stride, codes, count, sums + r * kTileColumns);
}

// The same for one row and a whole line, from the packed codes.
template <int kWidth>
inline void add_packed_line(const float* x, const uint8_t* const* columns, int64_t offset,
                            float* sums) {
  constexpr int kFields = 16 / kWidth;
  Floats chains[kFields][2];
  for (int j = 0; j < kFields; ++j) chains[j][0] = chains[j][1] = Floats::splat(0.0f);
  for (int64_t b = 0; b < kLineBytes; b += 16) {
    Words words[4];
    load_words(columns, offset + b, words);
    for (int i = 0; i < 4; ++i, x += 2 * kFields)
      for (int j = 0; j < kFields; ++j)
        for (int odd = 0; odd < 2; ++odd)
          chains[j][odd] = fma(Floats::splat(x[odd * kFields + j]),
                               field<kWidth>(words[i], odd * kFields + j), chains[j][odd]);
  }
  Floats sum = Floats::load(sums);
  for (int j = 0; j < kFields; ++j) sum = sum + (chains[j][0] + chains[j][1]);
  sum.store(sums);
}

// One tile of totals. x: its rows, as floats. codes, sums: working memory.
template <int kWidth>
inline void multiply_tile(const GemmW4A16& args, const Tile& tile, const float* x, float* codes,
                          float* sums, float* totals) {
  constexpr int64_t kPerByte = 8 / kWidth, kLine = kLineBytes * kPerByte;
  const int64_t k = args.k, group_size = group_of(args), bytes = packed_bytes(k, args.bits);
  int64_t column[kTileColumns];  // past the last column: that one again, unused
  const uint8_t* columns[kTileColumns];
  for (int c = 0; c < kTileColumns; ++c) {
    column[c] = tile.column + (c < tile.columns ? c : tile.columns - 1);
    columns[c] = args.w + column[c] * bytes;
  }
  for (int64_t i = 0; i < tile.rows * kTileColumns; ++i) totals[i] = 0.0f;
  for (int64_t first = 0; first < k;) {
    const int64_t group = first / group_size, left = (group + 1) * group_size - first;
    const int64_t segment = left < kSegment ? left : kSegment;
    for (int64_t i = 0; i < tile.rows * kTileColumns; ++i) sums[i] = 0.0f;
    for (int64_t k0 = first; k0 < first + segment; k0 += kLine) {
      const int64_t count = first + segment - k0 < kLine ? first + segment - k0 : kLine;
      const bool whole = tile.rows == 1 && count == kLine && k0 % kPerByte == 0;
      for (int c = 0; c < tile.columns; c += kLanes) {
        if (whole) {
          add_packed_line<kWidth>(x + k0, columns + c, k0 / kPerByte, sums + c);
        } else {
          const int64_t skip = unpack<kWidth>(columns + c, bytes, k0, count, codes);
          add_line_to_rows<kWidth>(x + k0, k, tile.rows, codes + skip * kLanes, count, sums + c);
        }
      }
    }
    float scale[kTileColumns];
    for (int c = 0; c < kTileColumns; ++c) scale[c] = args.w_scale[column[c] * args.groups + group];
    for (int64_t r = 0; r < tile.rows * kTileColumns; r += kTileColumns)
      for (int c = 0; c < kTileColumns; c += kLanes)
        fma(Floats::load(sums + r + c), Floats::load(scale + c), Floats::load(totals + r + c))
            .store(totals + r + c);
    first += segment;
  }
}

inline void gemm_w4a16_body(const GemmW4A16& args, int64_t begin, int64_t end) {
  const Tiling tiles = tiling(args);
  const bool copy = args.dtype != Dtype::kFloat32;
  const int64_t most = args.m < tiles.block_rows ? args.m : tiles.block_rows;
  constexpr int64_t kRoom = (kLineBytes + 2 * 16) * 4 * kLanes;  // a line of 2-bit codes, and more
  float* const codes = static_cast<float*>(
      scratch((kRoom + most * (2 * kTileColumns + (copy ? args.k : 0))) * int64_t{sizeof(float)}));
  float* const sums = codes + kRoom;                    // [most, kTileColumns]
  float* const totals = sums + most * kTileColumns;     // [most, kTileColumns]
  float* const widened = totals + most * kTileColumns;  // [most, k], unless float32

  int64_t prepared_row = -1;
  for (int64_t t = begin; t < end; ++t) {
    const Tile tile = tiles.at(t);
    if (copy && tile.row != prepared_row)
      widen_row(args.x, args.dtype, tile.row * args.k, tile.rows * args.k, widened);
    prepared_row = tile.row;
    const float* const x = copy ? widened : static_cast<const float*>(args.x) + tile.row * args.k;
    if (width_of(args) == 4)
      multiply_tile<4>(args, tile, x, codes, sums, totals);
    else
      multiply_tile<2>(args, tile, x, codes, sums, totals);

    float bias[kTileColumns] = {};
    if (args.bias) widen_row(args.bias, args.bias_dtype, tile.column, tile.columns, bias);
    for (int64_t r = 0; r < tile.rows; ++r) {
      float* const out = totals + r * kTileColumns;
      if (args.bias)
        for (int c = 0; c < kTileColumns; c += kLanes)
          (Floats::load(out + c) + Floats::load(bias + c)).store(out + c);
      narrow_row(out, args.dtype, (tile.row + r) * args.n + tile.column, tile.columns, args.out);
    }
  }
}
