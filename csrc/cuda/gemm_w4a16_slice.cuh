// Of gemm_w4a16 on tensor cores (gemm_w4a16.cuh): how a slice of 128 codes comes into shared
// memory, and how it is multiplied. All its kernels share these functions, and with them the order
// of the additions.
//
// Fragments. A block is 32 codes of k. Lane (g, t) = (lane / 4, lane % 4) has the word of codes 8t
// to 8t + 7 of row g of `w`, which ldmatrix hands out, and the 16 bytes of the same columns of
// token g. Code i of the word stands beside code i + 4: word >> 4i holds both in the low nibbles of
// its halves, and the numbers of `x` are brought into the same pairs. So a block is two products of
// 16: codes 0, 4, 1, 5 of all words, then 2, 6, 3, 7.
//
// Codes become T exactly: the nibble of code q, its sign bit inverted, is q + 8; as the last bits
// of 128 (bfloat16) or 1024 (float16), whose unit in the last place is 1, it makes the number 136 +
// q or 1032 + q, and the difference is exact. Two-bit codes are spread to nibbles first: q + 2.
#pragma once

#include "../ops.h"
#include "gemm_mma_slice.cuh"
#include "launch.cuh"
#include "plan_w4a16.h"
#include "ptx.cuh"

namespace fq::cuda {

struct W16Params {
  GemmW4A16 args;
  int32_t x_row_bytes, w_row_bytes;
  int32_t x_unit, w_unit;  // 16, 4 or 1: what divides the address of every row
  int32_t tokens, stages;  // of the plan
  int32_t slices, per_span, group;
  bool fine;        // a scale per block
  uint32_t offset;  // in both halves: 128 or 1024, and the sign bit of a code
  uint32_t minus;   // the number to add afterwards
};

// ---- from memory into a slice ------------------------------------------------------------------

// Chunk c of row r of `w`: ldmatrix reads one chunk of eight rows at once. Crumbs have half as
// many.
static __device__ __forceinline__ int w16_nibbles_at(int row, int chunk) {
  return row * 64 + ((chunk ^ (row >> 1 & 3)) * kChunk);
}

template <bool kWeights>
__device__ __forceinline__ void copy_chunk(uint8_t* to, const uint8_t* row, int byte, int row_bytes,
                                           bool here, int unit) {
  const int left = here ? row_bytes - byte : 0;
  const int valid = left < 0 ? 0 : left > kChunk ? kChunk : left;
  const uint8_t* const from = valid > 0 ? row + byte : row;
  if (unit != kChunk)
    copy_unaligned(to, from, valid, unit);
  else if constexpr (kWeights)
    copy_async_once(to, from, valid);
  else
    copy_async_kept(to, from, valid);
}

// The part of `thread` of `threads` in loading a slice of `rows` rows of w, their scales, and
// params.tokens tokens. What is outside becomes 0.
static __device__ __forceinline__ void load_w16_slice(uint8_t* to, const W16Params& params,
                                                      int slice, int64_t n0, int rows,
                                                      int64_t token0, int thread, int threads) {
  const GemmW4A16& args = params.args;
  const int chunks = args.bits == 2 ? 2 : 4;
#pragma unroll 1
  for (int i = thread; i < rows * chunks; i += threads) {
    const int row = args.bits == 2 ? i / 2 : i / 4, chunk = i & (chunks - 1);
    const bool here = n0 + row < args.n;
    copy_chunk<true>(to + (args.bits == 2 ? row * 32 + chunk * kChunk : w16_nibbles_at(row, chunk)),
                     args.w + (here ? n0 + row : 0) * params.w_row_bytes,
                     (slice * chunks + chunk) * kChunk, params.w_row_bytes, here, params.w_unit);
  }
  to += rows * kW16Slice / 2;
  const int scales = params.fine ? 4 : 1;
#pragma unroll 1
  for (int i = thread; i < rows * scales; i += threads) {
    const int row = params.fine ? i / 4 : i, k = slice * kW16Slice + (i & (scales - 1)) * kW16Block;
    const bool here = n0 + row < args.n && k < args.k;
    const int64_t at = here ? (n0 + row) * args.groups + k / params.group : 0;
    copy_async<4>(to + i * 4, args.w_scale + at, here ? 4 : 0);
  }
  to += rows * scales * 4;
  const uint8_t* const x = static_cast<const uint8_t*>(args.x);
#pragma unroll 1
  for (int i = thread; i < params.tokens * 16; i += threads) {
    const int token = i / 16, chunk = i % 16;
    const bool here = token0 + token < args.m;
    copy_chunk<false>(to + ((chunk / 4 * params.tokens + token) * 4 + chunk % 4) * kChunk,
                      x + (here ? token0 + token : 0) * params.x_row_bytes,
                      (slice * 16 + chunk) * kChunk, params.x_row_bytes, here, params.x_unit);
  }
}

// ---- from a slice to the tensor cores ----------------------------------------------------------

// Eight codes of two bits -> eight nibbles.
static __device__ __forceinline__ uint32_t spread_crumbs(uint32_t x) {
  x = (x | x << 8) & 0x00ff00ffu;
  x = (x | x << 4) & 0x0f0f0f0fu;
  return (x | x << 2) & 0x33333333u;
}

// A lane's words of 16 rows of `w` from row on: blocks 2 pair and 2 pair + 1, of rows g and g + 8.
static __device__ __forceinline__ void load_w16_words(uint32_t (&words)[4], const uint8_t* w,
                                                      int row, int pair, int bits, int lane) {
  if (bits != 2) {
    ldmatrix_x4(words, w + w16_nibbles_at(row + lane % 16, 2 * pair + lane / 16));
    return;
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int at = (row + i % 2 * 8 + lane / 4) * 32 + (2 * pair + i / 2) * 8 + lane % 4 * 2;
    words[i] = spread_crumbs(*reinterpret_cast<const uint16_t*>(w + at));
  }
}

// Codes i and i + 4 of a word.
template <Dtype kType>
__device__ __forceinline__ uint32_t widen_codes(uint32_t word, int i, const W16Params& params) {
  return add2<kType>((word >> (4 * i) & 0x000f000fu) ^ params.offset, params.minus);
}

// A warp's outputs: kDown x 16 rows of w, kTiles x 8 tokens, as mma_16816 has them.
template <int kDown, int kTiles>
using W16Sums = float[kDown][kTiles][4];

// totals += sums * scales of block `block`; sums = 0.
template <int kDown, int kTiles>
__device__ __forceinline__ void scale_sums(W16Sums<kDown, kTiles>& totals,
                                           W16Sums<kDown, kTiles>& sums, const float* scales,
                                           int row, bool fine, int block, int g) {
#pragma unroll
  for (int down = 0; down < kDown; ++down) {
    float scale[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int at = row + down * 16 + half * 8 + g;
      scale[half] = scales[fine ? at * 4 + block : at];
    }
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        totals[down][tile][i] = fma(sums[down][tile][i], scale[i / 2], totals[down][tile][i]);
        sums[down][tile][i] = 0.0f;
      }
  }
}

// totals += one slice of `rows` rows of w, of which the warp has those from `row` on, and the token
// tiles from `first_tile` on, of which `tiles` are there.
template <Dtype kType, int kDown, int kTiles>
__device__ __forceinline__ void multiply_w16(W16Sums<kDown, kTiles>& totals, const uint8_t* slice,
                                             const W16Params& params, int rows, int row,
                                             int first_tile, int tiles, int lane) {
  const uint8_t* const scales = slice + rows * kW16Slice / 2;
  const uint8_t* const x = scales + rows * (params.fine ? 16 : 4);
  const int g = lane / 4, t = lane % 4;
  W16Sums<kDown, kTiles> sums = {};
#pragma unroll 1
  for (int pair = 0; pair < 2; ++pair) {
    uint32_t words[kDown][4];
#pragma unroll
    for (int down = 0; down < kDown; ++down)
      load_w16_words(words[down], slice, row + down * 16, pair, params.args.bits, lane);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      uint32_t codes[kDown][2][4];
#pragma unroll
      for (int down = 0; down < kDown; ++down)
#pragma unroll
        for (int i = 0; i < 8; ++i)  // of product i / 4, register i % 4
          codes[down][i / 4][i % 4] =
              widen_codes<kType>(words[down][2 * half + i % 2], i / 4 * 2 + i % 4 / 2, params);
      const int block = 2 * pair + half;
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        if (tile >= tiles) break;
        const int token = (first_tile + tile) * 8 + g;
        uint32_t v[4];
        load_words(v, x + ((block * params.tokens + token) * 4 + t) * kChunk);
#pragma unroll
        for (int product = 0; product < 2; ++product) {
          const uint32_t first = __byte_perm(v[product], v[product + 2], 0x5410);
          const uint32_t second = __byte_perm(v[product], v[product + 2], 0x7632);
#pragma unroll
          for (int down = 0; down < kDown; ++down)
            mma_16816<kType>(sums[down][tile], codes[down][product], first, second);
        }
      }
      if (params.fine)
        scale_sums<kDown, kTiles>(totals, sums, reinterpret_cast<const float*>(scales), row, true,
                                  block, g);
    }
  }
  if (!params.fine)
    scale_sums<kDown, kTiles>(totals, sums, reinterpret_cast<const float*>(scales), row, false, 0,
                              g);
}

}  // namespace fq::cuda
