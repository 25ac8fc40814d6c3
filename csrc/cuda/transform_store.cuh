// The transform's way out: a lane's numbers, groups of 8 consecutive channels of a row of Y (and 4
// of the last 16, if n2's 16s are odd), as codes or as numbers. In a group of 32 channels, lane t
// of the four lanes that share a row has channels 8 t to 8 t + 7; of the last 16, 4 t to 4 t + 3.
#pragma once

#include "row_quantize.cuh"

namespace fq::cuda {

// ---- without a right factor --------------------------------------------------------------------

// The product of a left factor and X leaves lane t with channels 2 t and 2 t + 1 of every 8, as a
// word. This exchanges word a of the lanes where `bit` of the lane is set for word b of the others.
static __device__ __forceinline__ void exchange(uint32_t& a, uint32_t& b, int bit, int lane) {
  const bool set = lane & bit;
  const uint32_t other = __shfl_xor_sync(kAllLanes, set ? a : b, bit);
  a = set ? other : a;
  b = set ? b : other;
}

// Words of two rows (s[c][0], s[c][2] and s[c][1], s[c][3]; c counts 16s) to the lanes that the top
// names: four lanes' four words are transposed.
template <int kColumns>
static __device__ __forceinline__ void gather_channels(uint32_t (&s)[kColumns][4], int lane) {
#pragma unroll
  for (int c = 0; c + 1 < kColumns; c += 2)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      exchange(s[c][half], s[c][half + 2], 1, lane);
      exchange(s[c + 1][half], s[c + 1][half + 2], 1, lane);
      exchange(s[c][half], s[c + 1][half], 2, lane);
      exchange(s[c][half + 2], s[c + 1][half + 2], 2, lane);
    }
  if constexpr (kColumns % 2 == 1) {
    const int from = (lane & ~3) + 2 * (lane & 1);
    const bool upper = lane & 2;
    uint32_t (&last)[4] = s[kColumns - 1];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint32_t a = __shfl_sync(kAllLanes, last[half], from);
      const uint32_t b = __shfl_sync(kAllLanes, last[half], from + 1);
      const uint32_t c = __shfl_sync(kAllLanes, last[half + 2], from);
      const uint32_t d = __shfl_sync(kAllLanes, last[half + 2], from + 1);
      last[half] = upper ? c : a;
      last[half + 2] = upper ? d : b;
    }
  }
}

// ---- where to ----------------------------------------------------------------------------------

// A lane's part of a row in memory, if the row is there.
struct RowOut {
  uint8_t* data;     // the lane's first channel of every 32
  uint8_t* last;     // the same of the last 16
  int columns;       // n2 less that channel: channel i of a group of 32 is there if
  int last_columns;  // 32 * group + i < columns
  bool wide;         // n2 is a multiple of 8, so that eight channels are there or none
};

// unit: bytes of two channels.
static __device__ __forceinline__ RowOut row_out(uint8_t* token, int row, int n2, int columns,
                                                 int unit, int lane) {
  const int t = lane % 4;
  uint8_t* const data = token + row * (n2 / 2 * unit);
  return {data + 4 * t * unit, data + ((columns - 16) / 2 + 2 * t) * unit, n2 - 8 * t,
          n2 - (columns - 16) - 4 * t, n2 % 8 == 0};
}

// ---- codes -------------------------------------------------------------------------------------

// How codes make words, in one expression for both widths: of numbers r (rounded_bits) of 8
// channels, word 0 is ((r1 a + r0) + (r3 a + r2) b) + c * word 1, and word 1 likewise of the other
// four. Bytes: a = 2^8, b = 2^16, c = 0; half bytes: a = 2^4, b = 2^8, c = 2^16, and word 0 is all.
struct CodePacker {
  uint32_t a, b, c;
};

static __device__ __forceinline__ CodePacker code_packer(bool bytes) {
  return bytes ? CodePacker{1u << 8, 1u << 16, 0} : CodePacker{1u << 4, 1u << 8, 1u << 16};
}

static __device__ __forceinline__ uint32_t pack_four(const RowCoder& coder, const CodePacker& pack,
                                                     float x0, float x1, float x2, float x3) {
  const uint32_t low = rounded_bits(coder, x1) * pack.a + rounded_bits(coder, x0);
  const uint32_t high = rounded_bits(coder, x3) * pack.a + rounded_bits(coder, x2);
  return high * pack.b + low;
}

// y: the sums of row g of a row tile (half = 0) or of row g + 8 (half = 1).
template <int kColumns>
static __device__ __forceinline__ void store_codes(const RowCoder& coder, const CodePacker& pack,
                                                   bool bytes, const float (&y)[2 * kColumns][4],
                                                   int half, const RowOut& out, bool valid) {
  constexpr int kGroups = kColumns / 2;
  uint32_t words[kGroups][2], last = 0;
#pragma unroll
  for (int group = 0; group < kGroups; ++group) {
    const int n = 4 * group, i = 2 * half;
    const uint32_t lower =
        pack_four(coder, pack, y[n][i], y[n][i + 1], y[n + 1][i], y[n + 1][i + 1]);
    const uint32_t upper =
        pack_four(coder, pack, y[n + 2][i], y[n + 2][i + 1], y[n + 3][i], y[n + 3][i + 1]);
    words[group][0] = (upper * pack.c + lower + coder.offset) ^ coder.flip;
    words[group][1] = (upper + coder.offset) ^ coder.flip;
  }
  if constexpr (kColumns % 2 == 1) {
    const int n = 2 * kColumns - 2, i = 2 * half;
    last = (pack_four(coder, pack, y[n][i], y[n][i + 1], y[n + 1][i], y[n + 1][i + 1]) +
            coder.offset) ^
           coder.flip;
  }
  if (!valid) return;
  if (bytes) {
#pragma unroll
    for (int group = 0; group < kGroups; ++group) {
      uint8_t* const place = out.data + 32 * group;
      if (out.wide) {
        if (32 * group < out.columns) store_words<8>(place, words[group]);
      } else {
        if (32 * group < out.columns) store_words<4>(place, words[group]);
        if (32 * group + 4 < out.columns) store_words<4>(place + 4, words[group] + 1);
      }
    }
    if (kColumns % 2 == 1 && out.last_columns > 0) store_words<4>(out.last, &last);
  } else {
#pragma unroll
    for (int group = 0; group < kGroups; ++group) {
      uint8_t* const place = out.data + 16 * group;
      const uint32_t upper = words[group][0] >> 16;
      if (out.wide) {
        if (32 * group < out.columns) store_words<4>(place, words[group]);
      } else {
        if (32 * group < out.columns) store_words<2>(place, words[group]);
        if (32 * group + 4 < out.columns) store_words<2>(place + 2, &upper);
      }
    }
    if (kColumns % 2 == 1 && out.last_columns > 0) store_words<2>(out.last, &last);
  }
}

// ---- numbers -----------------------------------------------------------------------------------

// As float32, or as T.
template <Dtype kType, int kColumns>
static __device__ __forceinline__ void store_numbers(bool float32,
                                                     const float (&y)[2 * kColumns][4], int half,
                                                     const RowOut& out) {
  const int i = 2 * half;
#pragma unroll
  for (int n = 0; n < 2 * kColumns; n += 2) {
    const bool whole = n / 4 < kColumns / 2;
    const int channel = whole ? n / 4 * 32 + n % 4 * 2 : 0;
    if (channel >= (whole ? out.columns : out.last_columns)) continue;
    uint8_t* const place = whole ? out.data : out.last;
    if (float32) {
      const uint32_t words[4] = {bits_of(y[n][i]), bits_of(y[n][i + 1]), bits_of(y[n + 1][i]),
                                 bits_of(y[n + 1][i + 1])};
      store_words<16>(place + 4 * channel, words);
    } else {
      const uint32_t words[2] = {pack2<kType>(y[n][i], y[n][i + 1]),
                                 pack2<kType>(y[n + 1][i], y[n + 1][i + 1])};
      store_words<8>(place + 2 * channel, words);
    }
  }
}

}  // namespace fq::cuda
