// Codes of a KV cache as floats, code - zero, which is exact. A body; needs ../ops.h and lanes.h
// before it.
//
// A code is read as the lowest bits of the float 2^23 + code, from which 2^23 + zero is taken.

inline int code_width(int bits) { return bits == 2 ? 2 : bits <= 4 ? 4 : 8; }

constexpr uint32_t kCodeBase = 0x4b000000;  // 2^23 as a float

// The fields of sixteen words, lowest first: out[i * stride + lane].
template <int kWidth, int kFields>
inline __attribute__((always_inline)) void unpack_fields(Bits words, Floats base, int64_t stride,
                                                         float* out) {
  unrolled<kFields>([&](auto field) {
    constexpr int i = decltype(field)::value;
    const Bits code = words.right<kWidth * i>() & Bits::splat((1u << kWidth) - 1);
    (Floats::of(code | Bits::splat(kCodeBase)) - base).store(out + i * stride);
  });
}

constexpr int64_t kWordBytes = 4;
constexpr int64_t kWordGroup = 8;  // words of a row that are transposed at a time

// words[w][lane] = word w of rows[lane] + first; returns how many, at most kWordGroup. The last one
// may be partial: it is filled up with zeros, and no byte from `bytes` on is read.
inline int64_t transpose_words(const uint8_t* const* rows, int64_t first, int64_t bytes,
                               uint32_t (*words)[kLanes]) {
  static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "code 0 is in the lowest bits");
  const int64_t left = bytes - first;
  if (left >= kWordGroup * kWordBytes) {
#if defined(__AVX512F__)
    __m512i x[kWordGroup], y[kWordGroup];  // rows r and r + 8, then pairs, fours and eights of rows
    const auto half = [&](int row) {
      return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(rows[row] + first));
    };
    for (int r = 0; r < 8; ++r)
      x[r] = _mm512_inserti64x4(_mm512_castsi256_si512(half(r)), half(r + 8), 1);
    for (int r = 0; r < 8; r += 2) {
      y[r] = _mm512_unpacklo_epi32(x[r], x[r + 1]);
      y[r + 1] = _mm512_unpackhi_epi32(x[r], x[r + 1]);
    }
    for (int r = 0; r < 8; r += 4) {
      x[r] = _mm512_unpacklo_epi64(y[r], y[r + 2]);
      x[r + 1] = _mm512_unpackhi_epi64(y[r], y[r + 2]);
      x[r + 2] = _mm512_unpacklo_epi64(y[r + 1], y[r + 3]);
      x[r + 3] = _mm512_unpackhi_epi64(y[r + 1], y[r + 3]);
    }
    const __m512i low = _mm512_setr_epi64(0, 1, 8, 9, 4, 5, 12, 13);
    const __m512i high = _mm512_setr_epi64(2, 3, 10, 11, 6, 7, 14, 15);
    for (int w = 0; w < 4; ++w) {
      _mm512_store_si512(words[w], _mm512_permutex2var_epi64(x[w], low, x[w + 4]));
      _mm512_store_si512(words[w + 4], _mm512_permutex2var_epi64(x[w], high, x[w + 4]));
    }
#else
    for (int lane = 0; lane < kLanes; ++lane)
      for (int64_t w = 0; w < kWordGroup; ++w)
        __builtin_memcpy(&words[w][lane], rows[lane] + first + w * kWordBytes, kWordBytes);
#endif
    return kWordGroup;
  }
  const int64_t count = (left + kWordBytes - 1) / kWordBytes;
  for (int lane = 0; lane < kLanes; ++lane) {
    uint32_t row[kWordGroup] = {};
    __builtin_memcpy(row, rows[lane] + first, static_cast<std::size_t>(left));
    for (int64_t w = 0; w < count; ++w) words[w][lane] = row[w];
  }
  return count;
}

// Keys of 16 positions, transposed so that these are the lanes: out[i * 16 + lane] = code i of
// rows[lane] - zero[lane]. bytes: of a row. out has room for whole 32-bit words of codes, and what
// is past the last code is finite.
template <int kWidth>
inline void unpack_keys(const uint8_t* const* rows, int64_t bytes, Bits zero, float* out) {
  alignas(64) uint32_t words[kWordGroup][kLanes];
  const Floats base = Floats::of(zero | Bits::splat(kCodeBase));
  for (int64_t first = 0; first < bytes; first += kWordGroup * kWordBytes) {
    const int64_t count = transpose_words(rows, first, bytes, words);
    for (int64_t w = 0; w < count; ++w, out += 32 / kWidth * kLanes)
      unpack_fields<kWidth, 32 / kWidth>(Bits::load(words[w]), base, kLanes, out);
  }
}

// One row of values in the order of the bytes' fields: out[i * plane + b] = field i of byte b -
// zero. plane: bytes in whole lanes; what is past the last byte is finite.
template <int kWidth>
inline void unpack_value(const uint8_t* row, int64_t bytes, int64_t plane, uint32_t zero,
                         float* out) {
  const Floats base = Floats::of(Bits::splat(zero | kCodeBase));
  for (int64_t b = 0; b < bytes; b += kLanes, out += kLanes) {
    uint8_t last[kLanes] = {};
    const bool whole = b + kLanes <= bytes;
    if (!whole) __builtin_memcpy(last, row + b, static_cast<std::size_t>(bytes - b));
    unpack_fields<kWidth, 8 / kWidth>(Bits::widen(whole ? row + b : last), base, plane, out);
  }
}
