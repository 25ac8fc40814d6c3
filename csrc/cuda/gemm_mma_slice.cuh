// Of the hand-written GEMM (gemm_mma.cuh): its tiles, how slices come into shared memory, and how
// they become the operands of s8 tensor cores. tests/cuda/test_gemm_layout.py runs these functions
// for all lanes.
//
// Fragments. A product of an mma is a sum over 32 positions of k in any order, as long as both
// operands agree on it. So lane (g, t) = (lane / 4, lane % 4) simply reads the 16 bytes at 16 t of
// row g (all in one load, eight lanes on 128 consecutive bytes: no bank conflict), and its four
// words are the operands of the next products. What a word becomes depends on the codes:
//
//   nibbles   word -> low(word), high(word): the even codes and the odd codes, times 16
//   bytes     against bytes: words as they are; against nibbles: two words = 8 codes -> the four
//             even codes and the four odd codes (prmt), to stand against one word of nibbles
//
//   low(x) = (x << 4) & 0xf0f0f0f0, high(x) = x & 0xf0f0f0f0: the nibble in the upper half of its
//   byte is 16 times the code, sign included.
//
// The factors 16 are exact and are shifted out of the sums. They cost range: |sum| < 2^14 k for
// every pair of widths, so a sum over k < 2^17 codes fits; tiles whose Tile::kAnyK is set empty
// their sums into a second set before that.
//
// Unsigned codes of `a` get their top bit inverted: that is the code minus 8 or 128 as a signed
// number, and the epilogue subtracts (a_zero - 8 or 128) * w_colsum instead of a_zero * w_colsum.
// All of it is arithmetic modulo 2^32, so sums that wrap do so like everywhere else.
//
// Columns. Lane (g, t) ends up with columns 2t, 2t + 1 of each 8-column product. Four products j =
// 0..3 take their columns 2u + e from rows 8u + 2j + e of `w`, so that the lane holds 8 consecutive
// columns 8t + 2j + e of a group of 32: 16-byte stores and loads in the epilogue.
#pragma once

#include "launch.cuh"
#include "plan_gemm.h"
#include "ptx.cuh"

namespace fq::cuda {

constexpr int kSliceBytes = 64;  // of a row of `a`
constexpr int kChunk = 16;       // bytes of one copy
constexpr int kGroupColumns = 32;

template <int kBlockM_, int kBlockN_, int kStages_, int kWarpsM_, int kWarpsN_, int kWarpsK_>
struct MmaTile {
  static constexpr int kBlockM = kBlockM_, kBlockN = kBlockN_, kStages = kStages_;
  static constexpr int kWarpsM = kWarpsM_, kWarpsN = kWarpsN_, kWarpsK = kWarpsK_;
  static constexpr int kGroupThreads = kWarp * kWarpsM * kWarpsN;
  static constexpr int kThreads = kGroupThreads * kWarpsK;
  static constexpr int kRows = kBlockM / kWarpsM / 16;    // products of a warp, down
  static constexpr int kColumns = kBlockN / kWarpsN / 8;  // and across
  static constexpr int kParts = 2 * kRows;                // a lane's rows of the output
  static constexpr int kBlocksPerSm = kThreads > 128 ? 2 : kRows * kColumns > 16 ? 2 : 3;
  static constexpr bool kAnyK = kRows * kColumns <= 8;  // registers for a second set of sums
  static_assert(kBlockM % (16 * kWarpsM) == 0 && kBlockN % (kGroupColumns * kWarpsN) == 0);
};

// Those of kMma in plan_gemm.h.
using LargeTile = MmaTile<128, 128, 3, 2, 2, 1>;
using MediumTile = MmaTile<64, 64, 3, 1, 2, 2>;
using SmallTile = MmaTile<16, 32, 3, 1, 1, 8>;

// The codes: bits of `a` and `w` in memory.
template <int kABits, int kWBits>
struct MmaCodes {
  static constexpr int kA = kABits, kW = kWBits;
  static constexpr int kWBytes = kABits == 8 && kWBits == 4 ? 32 : 64;  // of a slice
  static constexpr int kWWords = kWBytes / 16;                          // of a lane
  static constexpr int kSteps = kABits == 4 ? 4 : 2;  // products over k in a slice
  static constexpr int kShift = (kABits == 4 ? 4 : 0) + (kWBits == 4 ? 4 : 0);
  static constexpr int kOffset = kABits == 4 ? 8 : 128;
  static constexpr int kCodes = kABits == 4 ? 128 : 64;  // of a slice
};

template <class Tile, class Codes>
constexpr int mma_shared_bytes() {
  constexpr int kSlice = Tile::kBlockM * kSliceBytes + Tile::kBlockN * Codes::kWBytes;
  constexpr int kRing = Tile::kWarpsK * Tile::kStages * kSlice;
  constexpr int kSums = Tile::kThreads * Tile::kParts * 8 * static_cast<int>(sizeof(int32_t));
  return kRing > kSums ? kRing : kSums;
}

// ---- from memory into a slice ------------------------------------------------------------------

// Where chunk c of row r lies in a slice. Rows of 64 bytes need no shuffling. Of rows of 32 bytes a
// half-warp reads 2j, 2j + 1, 2j + 8 and 2j + 9 at once: bit 3 of the row moves the latter two to
// the other half of the banks.
template <int kRowBytes>
__device__ __forceinline__ int slice_offset(int row, int byte) {
  if constexpr (kRowBytes == 64) return row * 64 + byte;
  return (row * 32 + byte) ^ ((row & 8) << 3);
}

// 16 bytes, of which the first `valid` exist, from an address that is not a multiple of 16.
static __device__ __forceinline__ void copy_unaligned(uint8_t* to, const uint8_t* from, int valid,
                                                      int unit) {
#pragma unroll 1
  for (int byte = 0; byte < kChunk; byte += 4) {
    const int left = valid - byte;
    const int here = left < 0 ? 0 : left > 4 ? 4 : left;
    if (unit == 4) {
      copy_async<4>(to + byte, from + byte, here);
    } else {
      uint32_t word = 0;
#pragma unroll 1
      for (int i = 0; i < here; ++i) word |= uint32_t{from[byte + i]} << (8 * i);
      *reinterpret_cast<uint32_t*>(to + byte) = word;
    }
  }
}

// One thread's part in the loading of kRows rows of a matrix, slice by slice; what lies outside of
// the matrix becomes 0.
template <int kRows, int kRowBytes, int kThreads>
struct Loader {
  static constexpr int kChunks = kRowBytes / kChunk, kRowsAtOnce = kThreads / kChunks;
  static constexpr int kCopies = kRows / kRowsAtOnce;
  static constexpr int kStep = kRowsAtOnce * kRowBytes;  // from one copy to the next, in a slice
  static_assert(kRows % kRowsAtOnce == 0);
  static_assert(kRowBytes == 64 || kRowsAtOnce % 16 == 0, "slice_offset(row) + kStep must hold");

  const uint8_t* from;  // in its first row, of the next slice
  int left;             // bytes of a row from there on
  int rows;             // that exist, from its first one on
  int to;               // in a slice
  int row_bytes, unit;

  // matrix: the first of the rows, of which `count` exist; first: where the first slice begins.
  __device__ __forceinline__ Loader(const uint8_t* matrix, int count, int row_bytes_, int unit_,
                                    int first, int thread)
      : row_bytes(row_bytes_), unit(unit_) {
    const int row = thread / kChunks, byte = thread % kChunks * kChunk;
    from = matrix + static_cast<int64_t>(row) * row_bytes + (first + byte);
    left = row_bytes - first - byte;
    rows = count - row;
    to = slice_offset<kRowBytes>(row, byte);
  }

  // slice: where it goes; stride: bytes of a row from this slice to the next.
  __device__ __forceinline__ void load(uint8_t* slice, int stride) {
    if (unit == kChunk) {  // then row_bytes is a multiple of 16, and a chunk is there or not
#pragma unroll
      for (int i = 0; i < kCopies; ++i)
        copy_async<kChunk>(slice + to + i * kStep,
                           from + static_cast<int64_t>(row_bytes) * (i * kRowsAtOnce),
                           left > 0 && rows > i * kRowsAtOnce ? kChunk : 0);
    } else {
      const int valid = left < 0 ? 0 : left > kChunk ? kChunk : left;
#pragma unroll 1
      for (int i = 0; i < kCopies; ++i)
        copy_unaligned(slice + to + i * kStep,
                       from + static_cast<int64_t>(row_bytes) * (i * kRowsAtOnce),
                       rows > i * kRowsAtOnce ? valid : 0, unit);
    }
    from += stride;
    left -= stride;
  }
};

// ---- from a slice to the tensor cores ----------------------------------------------------------

template <int kWords>
__device__ __forceinline__ void load_words(uint32_t (&words)[kWords], const uint8_t* shared) {
  if constexpr (kWords == 4) {
    const uint4 loaded = *reinterpret_cast<const uint4*>(shared);
    words[0] = loaded.x, words[1] = loaded.y, words[2] = loaded.z, words[3] = loaded.w;
  } else {
    const uint2 loaded = *reinterpret_cast<const uint2*>(shared);
    words[0] = loaded.x, words[1] = loaded.y;
  }
}

static __device__ __forceinline__ uint32_t low_nibbles(uint32_t x) {
  return (x << 4) & 0xf0f0f0f0u;
}
static __device__ __forceinline__ uint32_t high_nibbles(uint32_t x) { return x & 0xf0f0f0f0u; }

// The two halves of k of one row, for product `step` of a slice.
template <class Codes>
__device__ __forceinline__ void a_halves(uint32_t* first, uint32_t* second,
                                         const uint32_t (&words)[4], int step, uint32_t flip) {
  if constexpr (Codes::kA == 4) {
    *first = low_nibbles(words[step]) ^ flip;
    *second = high_nibbles(words[step]) ^ flip;
  } else if constexpr (Codes::kW == 4) {
    *first = __byte_perm(words[2 * step], words[2 * step + 1], 0x6420) ^ flip;
    *second = __byte_perm(words[2 * step], words[2 * step + 1], 0x7531) ^ flip;
  } else {
    *first = words[2 * step] ^ flip;
    *second = words[2 * step + 1] ^ flip;
  }
}

template <class Codes>
__device__ __forceinline__ void w_halves(uint32_t* first, uint32_t* second,
                                         const uint32_t (&words)[Codes::kWWords], int step) {
  if constexpr (Codes::kW == 4) {
    *first = low_nibbles(words[step]);
    *second = high_nibbles(words[step]);
  } else {
    *first = words[2 * step];
    *second = words[2 * step + 1];
  }
}

// Where a lane finds its words in a slice, and which outputs it gets.
template <class Tile, class Codes>
struct Lane {
  int warp_m, warp_n, g, t;

  // Of the lane's row 8 part + g of its warp.
  __device__ __forceinline__ int a_words(int part) const {
    return slice_offset<kSliceBytes>(row(part), t * kChunk);
  }
  // Of product n, whose column g is row 8 (g / 2) + 2 (n % 4) + g % 2 of a group.
  __device__ __forceinline__ int w_words(int n) const {
    const int in_group = g / 2 * 8 + n % 4 * 2 + g % 2;
    return slice_offset<Codes::kWBytes>(group(n / 4) + in_group, t * 4 * Codes::kWWords);
  }
  __device__ __forceinline__ int row(int part) const {
    return warp_m * Tile::kRows * 16 + part * 8 + g;
  }
  // The first of the 8 columns it gets of products 4 i to 4 i + 3.
  __device__ __forceinline__ int column(int i) const { return group(i) + t * 8; }

 private:
  __device__ __forceinline__ int group(int i) const {
    return warp_n * Tile::kColumns * 8 + i * kGroupColumns;
  }
};

// sums += the products of one slice.
template <class Tile, class Codes>
__device__ __forceinline__ void multiply_slice(int32_t (&sums)[Tile::kRows][Tile::kColumns][4],
                                               const Lane<Tile, Codes>& lane, const uint8_t* a,
                                               const uint8_t* w, uint32_t flip) {
  uint32_t w_words[Tile::kColumns][Codes::kWWords], a_words[Tile::kParts][4];
#pragma unroll
  for (int n = 0; n < Tile::kColumns; ++n) load_words(w_words[n], w + lane.w_words(n));
#pragma unroll
  for (int part = 0; part < Tile::kParts; ++part) load_words(a_words[part], a + lane.a_words(part));
#pragma unroll
  for (int step = 0; step < Codes::kSteps; ++step) {
    uint32_t b[Tile::kColumns][2];
#pragma unroll
    for (int n = 0; n < Tile::kColumns; ++n) w_halves<Codes>(&b[n][0], &b[n][1], w_words[n], step);
#pragma unroll
    for (int m = 0; m < Tile::kRows; ++m) {
      uint32_t fragment[4];
      a_halves<Codes>(&fragment[0], &fragment[2], a_words[2 * m], step, flip);
      a_halves<Codes>(&fragment[1], &fragment[3], a_words[2 * m + 1], step, flip);
#pragma unroll
      for (int n = 0; n < Tile::kColumns; ++n) mma_16832_s8(sums[m][n], fragment, b[n][0], b[n][1]);
    }
  }
}

// totals += sums without the factors of the nibbles; sums = 0. Modulo 2^32.
template <int kShift, int kRows, int kColumns>
__device__ __forceinline__ void empty_sums(uint32_t (&totals)[kRows][kColumns][4],
                                           int32_t (&sums)[kRows][kColumns][4]) {
#pragma unroll
  for (int m = 0; m < kRows; ++m)
#pragma unroll
    for (int n = 0; n < kColumns; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        totals[m][n][i] += static_cast<uint32_t>(sums[m][n][i] >> kShift);
        sums[m][n][i] = 0;
      }
}

}  // namespace fq::cuda
