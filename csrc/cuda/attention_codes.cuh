// Packed keys and values as the right operands of m16n8k16 in bfloat16: attention_mma.cuh's codes,
// from shared memory to tensor cores.
//
//   codes up to 4 bits   (word >> shift) & mask | 0x4300: 128 + code, a bfloat16; one addition of
//                        -(128 + zero) gives code - zero for two codes. Exact, so nothing cancels
//                        as q . codes - zero * sum(q) would, and zero points cost nothing more.
//   codes of a byte      2^23 + code as float32, minus 2^23 + zero, packed to bfloat16: exact too.
//
// Lane (g, t) = (lane / 4, lane % 4). The order of k in a product is free, and so are the names of
// rows and columns. They are chosen such that a lane reads consecutive bytes:
//
//   keys     column g of product n is position 4 (g / 2) + 2 n + g % 2, so that lane t's scores are
//            of positions 4 t .. 4 t + 3, as are its rows of values; k is the lane's own words
//            (element_of_key), and the queries are laid out to match
//   values   column g of product j is element g * kDim / 8 + j
//
// Keys and values lie in the order of the lanes that read them (key_place, value_place), free of
// bank conflicts but for rows of 128 bytes and more. Rows of smaller head_dim leave bytes of their
// place unread, which become finite numbers that meet queries of 0 or make columns that nobody
// stores.
#pragma once

#include "attention.cuh"

namespace fq::cuda {

constexpr Dtype kBf16 = Dtype::kBFloat16;

// ---- places in shared memory --------------------------------------------------------------------

// Bytes of a key row of `pitch` bytes follow each other; rows in the order of their products.
static __device__ __forceinline__ int key_place(int row, int byte, int pitch) {
  const int slot = (row >> 1 & 1) * 8 + (row >> 2) * 2 + (row & 1);
  return slot * pitch + byte;
}

// 16 bytes of rows t, t + 4, t + 8, ... of four, side by side.
static __device__ __forceinline__ int value_place(int row, int byte, int pitch) {
  return ((((row & 3) * (pitch >> 4)) + (byte >> 4)) * 4 + (row >> 2)) * 16 + (byte & 15);
}

// Byte of a key row at which lane t's word i begins.
template <int kDim, int kField>
static __device__ __forceinline__ int key_byte(int t, int i) {
  constexpr int kBytes = kDim * kField / 32;  // of a lane
  if constexpr (kBytes <= 16) return t * kBytes + 4 * i;
  return i / 4 * 64 + t * 16 + i % 4 * 4;
}

// The element that stands in product s at lane t's place: 0, 1 in the first register, 2, 3 in the
// second.
template <int kDim, int kField>
static __device__ __forceinline__ int element_of_key(int t, int s, int place) {
  constexpr int kSteps = kField == 8 ? 1 : 8 / kField;  // products that a word serves
  const int j = 2 * (s % kSteps) + place / 2;
  const int in_word = kField == 8 ? place : j + 16 / kField * (place % 2);
  return key_byte<kDim, kField>(t, s / kSteps) * 8 / kField + in_word;
}

// ---- codes to bfloat16 --------------------------------------------------------------------------

constexpr uint32_t kMagic = 0x43004300u;       // 128, 128: the last place of 128 is 1
constexpr uint32_t kFloatMagic = 0x4b000000u;  // 2^23

template <int kField>
static __device__ __forceinline__ uint32_t less_zero(uint32_t word, int shift, uint32_t minus) {
  constexpr uint32_t kMask = kField == 4 ? 0x000f000fu : 0x00030003u;
  return add2<kBf16>(((word >> shift) & kMask) | kMagic, minus);
}

// -(128 + zero) as float32; its upper half is the bfloat16.
static __device__ __forceinline__ uint32_t minus_zero(uint32_t zero) {
  return bits_of(-128.0f - static_cast<float>(zero));
}

static __device__ __forceinline__ float byte_less_zero(uint32_t word, int byte, float offset) {
  return float_of(__byte_perm(word, kFloatMagic, 0x7440 + byte)) - offset;
}

// ---- one step -----------------------------------------------------------------------------------

template <int kWords>
static __device__ __forceinline__ void load_words(uint32_t (&words)[kWords], const uint8_t* from) {
  static_assert(kWords == 1 || kWords == 2 || kWords == 4, "one load");
  if constexpr (kWords == 4) {
    const uint4 v = *reinterpret_cast<const uint4*>(from);
    words[0] = v.x, words[1] = v.y, words[2] = v.z, words[3] = v.w;
  } else if constexpr (kWords == 2) {
    const uint2 v = *reinterpret_cast<const uint2*>(from);
    words[0] = v.x, words[1] = v.y;
  } else {
    words[0] = *reinterpret_cast<const uint32_t*>(from);
  }
}

// scores[n][i]: as ptx.cuh's c, for 16 rows of queries and the 8 positions of product n.
template <int kDim, int kField>
static __device__ __forceinline__ void multiply_keys(float (&scores)[2][4], const uint8_t* keys,
                                                     const uint8_t* zeros, const uint4* queries,
                                                     int lane) {
  constexpr int kWords = kDim * kField / 128, kAtOnce = kWords < 4 ? kWords : 4;
  constexpr int kPitch = kDim * kField / 8, kSteps = kField == 8 ? 1 : 8 / kField;
  const int g = lane / 4, t = lane % 4;
  uint32_t minus[2];
  float offset[2];
#pragma unroll
  for (int n = 0; n < 2; ++n) {
    const uint32_t zero = zeros[4 * (g / 2) + 2 * n + g % 2];
    const uint32_t upper = minus_zero(zero);
    minus[n] = __byte_perm(upper, upper, 0x3232);
    offset[n] = 8388608.0f + static_cast<float>(zero);
  }
#pragma unroll
  for (int first = 0; first < kWords; first += kAtOnce) {
    uint32_t words[2][kAtOnce];
#pragma unroll
    for (int n = 0; n < 2; ++n)
      load_words(words[n], keys + (n * 8 + g) * kPitch + key_byte<kDim, kField>(t, first));
#pragma unroll
    for (int s = 0; s < kAtOnce * kSteps; ++s) {
      const uint4 q = queries[(first * kSteps + s) * kWarp + lane];
      const uint32_t a[4] = {q.x, q.y, q.z, q.w};
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        const uint32_t word = words[n][s / kSteps];
        uint32_t b0, b1;
        if constexpr (kField == 8) {
          b0 = pack2<kBf16>(byte_less_zero(word, 0, offset[n]), byte_less_zero(word, 1, offset[n]));
          b1 = pack2<kBf16>(byte_less_zero(word, 2, offset[n]), byte_less_zero(word, 3, offset[n]));
        } else {
          const int shift = 2 * (s % kSteps) * kField;
          b0 = less_zero<kField>(word, shift, minus[n]);
          b1 = less_zero<kField>(word, shift + kField, minus[n]);
        }
        mma_16816<kBf16>(scores[n], a, b0, b1);
      }
    }
  }
}

// sums[j][i] += weights (a left operand of ptx.cuh: positions 4t, 4t + 1, then 4t + 2, 4t + 3)
// times values.
template <int kDim, int kField>
static __device__ __forceinline__ void add_values(float (&sums)[kDim / 8][4], const uint8_t* values,
                                                  const uint8_t* zeros,
                                                  const uint32_t (&weights)[4], int lane) {
  constexpr int kBytes = kDim * kField / 64;  // of a lane and row
  constexpr int kWords = kBytes < 4 ? 1 : kBytes / 4, kAtOnce = kWords < 4 ? kWords : 4;
  constexpr int kPitch = kDim * kField / 8;
  const int g = lane / 4, t = lane % 4;
  const uint32_t four = *reinterpret_cast<const uint32_t*>(zeros + 4 * t);
  uint32_t upper[4];
  float offset[4];
#pragma unroll
  for (int r = 0; r < 4; ++r) {
    const uint32_t zero = four >> (8 * r) & 255;
    upper[r] = minus_zero(zero);
    offset[r] = 8388608.0f + static_cast<float>(zero);
  }
  const uint32_t minus[2] = {__byte_perm(upper[0], upper[1], 0x7632),
                             __byte_perm(upper[2], upper[3], 0x7632)};
#pragma unroll
  for (int first = 0; first < kWords; first += kAtOnce) {
    uint32_t rows[4][kAtOnce];
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      const uint8_t* const from = values + value_place(4 * t + r, g * kBytes + 4 * first, kPitch);
      if constexpr (kBytes == 2)
        rows[r][0] = *reinterpret_cast<const uint16_t*>(from);
      else
        load_words(rows[r], from);
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      if constexpr (kField == 8) {
#pragma unroll
        for (int byte = 0; byte < 4; ++byte) {
          float v[4];
#pragma unroll
          for (int r = 0; r < 4; ++r) v[r] = byte_less_zero(rows[r][i], byte, offset[r]);
          mma_16816<kBf16>(sums[(first + i) * 4 + byte], weights, pack2<kBf16>(v[0], v[1]),
                           pack2<kBf16>(v[2], v[3]));
        }
      } else {
#pragma unroll
        for (int half = 0; half < (kBytes == 2 ? 1 : 2); ++half) {
          const uint32_t selector = half == 0 ? 0x5410 : 0x7632;
          const uint32_t first_two = __byte_perm(rows[0][i], rows[1][i], selector);
          const uint32_t last_two = __byte_perm(rows[2][i], rows[3][i], selector);
#pragma unroll
          for (int j = 0; j < 16 / kField; ++j)
            mma_16816<kBf16>(sums[((first + i) * 2 + half) * (16 / kField) + j], weights,
                             less_zero<kField>(first_two, j * kField, minus[0]),
                             less_zero<kField>(last_two, j * kField, minus[1]));
        }
      }
    }
  }
}

}  // namespace fq::cuda
