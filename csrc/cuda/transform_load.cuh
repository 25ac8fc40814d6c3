// The transform's way in: tokens and factors from global memory to shared memory.
//
// A token's X [n1, n2] lies in a slot of the ring, `pitch` bytes a row, with zeros around it up to
// whole 16s. Its row tiles (16 rows) are dealt out to the warps that share the token; a warp copies
// its row tiles, and is the only one to touch them until all meet. So what comes before the
// products (gate, sum of squares, channel scale) needs no barrier of its own, and the sum of
// squares has one order of additions, whatever the number of warps: a lane's chunks of a row tile,
// in turn; then lanes; then row tiles.
//
// The gate is not copied to shared memory, which has no room for it where it is long. It is fetched
// into L2 together with the token's copies, and read from there when these are done.
//
// A factor's fragments, operands of m16n8k16, lie as lanes want them: 16 bytes a lane.
#pragma once

#include "launch.cuh"
#include "ptx.cuh"
#include "transform.h"

namespace fq::cuda {

// ---- tokens ------------------------------------------------------------------------------------

struct TokenShape {
  int n1, n2, row_tiles, pitch;
};

// The warps that share a token, and this one's place among them.
struct TokenWarps {
  int member, count, lane;
};

// How a lane walks over the chunks lane, lane + 32, ... of consecutive rows. Computed by the host.
struct ChunkWalk {
  int32_t per_row, inverse;  // i / per_row = i * inverse / 2^16 for i < 32
  int32_t row_step, column_step;
};

inline ChunkWalk chunk_walk(int32_t per_row) {
  return {per_row, (65536 + per_row - 1) / per_row, kWarp / per_row, kWarp % per_row};
}

struct ChunkPlace {
  int row, column;

  __device__ __forceinline__ ChunkPlace(const ChunkWalk& walk, int lane) {
    row = lane * walk.inverse >> 16;
    column = lane - row * walk.per_row;
  }
  __device__ __forceinline__ void next(const ChunkWalk& walk) {
    row += walk.row_step;
    column += walk.column_step;
    if (column >= walk.per_row) {
      column -= walk.per_row;
      ++row;
    }
  }
};

static __device__ __forceinline__ int rows_of_tile(const TokenShape& shape, int tile) {
  const int rows = shape.n1 - 16 * tile;
  return rows < 16 ? rows : 16;
}

// Starts this warp's copies, kChunk bytes each. gate: of the same token, or null.
template <int kChunk>
static __device__ __forceinline__ void copy_token(const uint8_t* x, const uint8_t* gate,
                                                  const TokenShape& shape, const ChunkWalk& walk,
                                                  TokenWarps warps, uint8_t* slot) {
  const ChunkPlace start(walk, warps.lane);
  const int step = walk.row_step * shape.pitch + walk.column_step * kChunk;
  const int wrap = shape.pitch - walk.per_row * kChunk;
  for (int tile = warps.member; tile < shape.row_tiles; tile += warps.count) {
    const int chunks = rows_of_tile(shape, tile) * walk.per_row;
    const uint8_t* from = x + 32 * tile * shape.n2 + warps.lane * kChunk;
    uint8_t* to = slot + (16 * tile + start.row) * shape.pitch + start.column * kChunk;
    int column = start.column;
#pragma unroll 2
    for (int chunk = warps.lane; chunk < chunks; chunk += kWarp) {
      copy_async<kChunk>(to, from);
      from += kWarp * kChunk;
      to += step;
      column += walk.column_step;
      if (column >= walk.per_row) {
        column -= walk.per_row;
        to += wrap;
      }
    }
    if (gate)
      for (int byte = 128 * warps.lane; byte < chunks * kChunk; byte += 128 * kWarp)
        prefetch_l2(gate + 32 * tile * shape.n2 + byte);
  }
}

// Zeros around X, which no copy touches.
static __device__ __forceinline__ void clear_margins(const TokenShape& shape, int column_tiles,
                                                     TokenWarps warps, uint8_t* slot) {
  for (int tile = warps.member; tile < shape.row_tiles; tile += warps.count)
    for (int row = 16 * tile; row < 16 * tile + 16; ++row)
      for (int pair = (row < shape.n1 ? shape.n2 / 2 : 0) + warps.lane; pair < 8 * column_tiles;
           pair += kWarp)
        *reinterpret_cast<uint32_t*>(slot + row * shape.pitch + 4 * pair) = 0;
}

// g / (1 + exp(-g)) within some units in the last place of float32: it is rounded to 16 bits next.
static __device__ __forceinline__ float fast_silu(float g) {
  return g * fast_reciprocal(1.0f + fast_exp2(g * -1.44269504088896341f));
}

// Eight 16-bit numbers; zeros for the last four if only four are there.
static __device__ __forceinline__ uint4 load_eight(const uint8_t* global, bool wide, bool four) {
  if (wide) return load_streaming(reinterpret_cast<const uint4*>(global));
  const uint2 first = load_streaming(reinterpret_cast<const uint2*>(global));
  uint2 second = make_uint2(0, 0);
  if (!four) second = load_streaming(reinterpret_cast<const uint2*>(global + 8));
  return make_uint4(first.x, first.y, second.x, second.y);
}

// What happens to a token before the products: v = round_T(silu(gate) * x); the sum of v^2 per row
// tile; u = round_T(v * channel_scale), in place of x. Each is optional.
struct Preparation {
  const uint8_t* gate;
  bool squares;
  const float* channel_scale;
};

// Chunks here are 8 numbers of a row, the last of which may be 4 and 4 zeros. All of this warp's
// copies and margins are there.
template <Dtype kType>
static __device__ __forceinline__ void prepare_token(const Preparation& wanted,
                                                     const TokenShape& shape, const ChunkWalk& walk,
                                                     TokenWarps warps, uint8_t* slot,
                                                     float* squares) {
  const bool wide = shape.n2 % 8 == 0;
  for (int tile = warps.member; tile < shape.row_tiles; tile += warps.count) {
    const int rows = rows_of_tile(shape, tile);
    float sum = 0.0f;
#pragma unroll 2
    for (ChunkPlace place(walk, warps.lane); place.row < rows; place.next(walk)) {
      const int row = 16 * tile + place.row;
      const int first = row * shape.n2 + 8 * place.column;
      const bool four = 8 * place.column + 4 >= shape.n2;
      uint4* const chunk = reinterpret_cast<uint4*>(slot + row * shape.pitch) + place.column;
      const uint4 x = *chunk;
      uint32_t v[4] = {x.x, x.y, x.z, x.w};
      float numbers[8];
#pragma unroll
      for (int i = 0; i < 4; ++i) widen2<kType>(v[i], numbers[2 * i], numbers[2 * i + 1]);
      if (wanted.gate) {
        const uint4 g = load_eight(wanted.gate + 2 * first, wide, four);
        const uint32_t gates[4] = {g.x, g.y, g.z, g.w};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          float low, high;
          widen2<kType>(gates[i], low, high);
          v[i] =
              pack2<kType>(fast_silu(low) * numbers[2 * i], fast_silu(high) * numbers[2 * i + 1]);
          widen2<kType>(v[i], numbers[2 * i], numbers[2 * i + 1]);
        }
      }
      if (wanted.squares)
#pragma unroll
        for (int i = 0; i < 8; ++i) sum = fma(numbers[i], numbers[i], sum);
      if (wanted.channel_scale) {
#pragma unroll
        for (int i = 0; i < 8; i += 4) {
          if (i == 4 && four) break;  // channel_scale may end here, and zeros stay zeros
          const float4 c = *reinterpret_cast<const float4*>(wanted.channel_scale + first + i);
          v[i / 2] = pack2<kType>(numbers[i] * c.x, numbers[i + 1] * c.y);
          v[i / 2 + 1] = pack2<kType>(numbers[i + 2] * c.z, numbers[i + 3] * c.w);
        }
      }
      if (wanted.gate || wanted.channel_scale) *chunk = make_uint4(v[0], v[1], v[2], v[3]);
    }
    sum = warp_sum(sum);
    if (warps.lane == 0) squares[tile] = sum;
  }
}

// The sums of squares alone, by tensor cores: of the products X^T X, whose operands are one and the
// same, the diagonal.
template <Dtype kType, int kColumns>
static __device__ __forceinline__ void square_token(const TokenShape& shape, TokenWarps warps,
                                                    const uint8_t* slot, float* squares) {
  const int lane = warps.lane, g = lane / 4, t = lane % 4;
#pragma unroll 1
  for (int tile = warps.member; tile < shape.row_tiles; tile += warps.count) {
    const uint8_t* const x = slot + (16 * tile + (lane & 15)) * shape.pitch + (lane >> 4) * 16;
    float sum[4][4] = {};  // of 8 channels each; four, so that products need not wait for others
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      uint32_t b[4];
      ldmatrix_x4_trans(b, x + 32 * c);
      const uint32_t a[4] = {b[0], b[2], b[1], b[3]};
      mma_16816<kType>(sum[c % 2 * 2], a, b[0], b[1]);
      mma_16816<kType>(sum[c % 2 * 2 + 1], a, b[2], b[3]);
    }
    // Rows 0..7 of the first product and 8..15 of the second: column = row where 2 t + e = g.
    const float even = (sum[0][0] + sum[1][2]) + (sum[2][0] + sum[3][2]);
    const float odd = (sum[0][1] + sum[1][3]) + (sum[2][1] + sum[3][3]);
    const float total = warp_sum(g == 2 * t ? even : g == 2 * t + 1 ? odd : 0.0f);
    if (lane == 0) squares[tile] = total;
  }
}

// ---- factors -----------------------------------------------------------------------------------

// A factor [n, n], rounded to T wherever it is read.
struct Factor {
  const void* data;
  Dtype dtype;
  int n;
  bool vectors;  // float32, and pairs in a row are aligned
};

template <Dtype kType>
static __device__ __forceinline__ uint32_t factor_pair(const Factor& f, int row, int column) {
  if (row >= f.n || column >= f.n) return 0;
  const float2 v =
      *reinterpret_cast<const float2*>(static_cast<const float*>(f.data) + row * f.n + column);
  return pack2<kType>(v.x, v.y);
}

// Operand A of the first product: P1^T at a row tile and 16 rows of X. Needs `vectors`.
template <Dtype kType>
static __device__ __forceinline__ uint4 left_fragment(const Factor& left, int tile, int step,
                                                      int lane) {
  const int row = 16 * tile + lane / 4, column = 16 * step + lane % 4 * 2;
  return make_uint4(
      factor_pair<kType>(left, row, column), factor_pair<kType>(left, row + 8, column),
      factor_pair<kType>(left, row, column + 8), factor_pair<kType>(left, row + 8, column + 8));
}

// Fragments of P1^T at row tiles first_tile .. first_tile + tiles, to shared memory:
// [tile][step][lane].
template <Dtype kType>
static __device__ __forceinline__ void keep_left(const Factor& left, int first_tile, int tiles,
                                                 int steps, uint8_t* shared) {
  if (left.vectors) {
    const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, warps = blockDim.x / kWarp;
    int tile = 0, step = warp;
#pragma unroll 2
    for (int i = warp; i < tiles * steps; i += warps, step += warps) {
      while (step >= steps) {
        step -= steps;
        ++tile;
      }
      reinterpret_cast<uint4*>(shared + i * kFragmentBytes)[lane] =
          left_fragment<kType>(left, first_tile + tile, step, lane);
    }
    return;
  }
#pragma unroll 1
  for (int i = threadIdx.x; i < tiles * steps * 256; i += blockDim.x) {
    const int fragment = i / 256, lane = i / 8 % 32, word = i / 2 % 4;
    const int row = 16 * (first_tile + fragment / steps) + lane / 4 + word % 2 * 8;
    const int column = 16 * (fragment % steps) + lane % 4 * 2 + word / 2 * 8 + i % 2;
    const bool inside = row < left.n && column < left.n;
    const float v = inside ? load(left.data, left.dtype, row * left.n + column) : 0.0f;
    reinterpret_cast<uint16_t*>(shared)[i] = static_cast<uint16_t>(pack2<kType>(v, 0.0f));
  }
}

// Operands B of the second product: 16 rows of P2, which are one slice, at pairs of its columns'
// 8s. Columns are permuted, so that a lane's sums are consecutive channels: lane (g, t) = (lane /
// 4, lane % 4) has channels 8 t + 2 j + e of every 32, j = 0..3 the 8s, e = 0, 1 its sums of each.
// Of the last 16, if their number is odd: 4 t + 2 j + e, j = 0, 1.
//
// A unit is what a thread moves at once: rows 2 t, 2 t + 1, 2 t + 8, 2 t + 9 and two columns, which
// make 8 bytes of two lanes. A slice has 32 * kColumns of them.
struct RightUnit {
  float2 rows[4];
};

// The column of a unit, and its numbers: columns in P2 only, but rows below it are zeros. whole: no
// row of the slice is. Needs `vectors`.
static __device__ __forceinline__ int column_of_unit(int unit) { return unit / 4 * 2; }

static __device__ __forceinline__ RightUnit load_right(const Factor& right, int step, int unit,
                                                       bool whole) {
  const float* const data = static_cast<const float*>(right.data);
  const int row = 16 * step + unit % 4 * 2;
  RightUnit u;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int r = row + i / 2 * 8 + i % 2;
    u.rows[i] = make_float2(0.0f, 0.0f);
    if (whole || r < right.n)
      u.rows[i] = *reinterpret_cast<const float2*>(
          data + static_cast<uint32_t>(r * right.n + column_of_unit(unit)));
  }
  return u;
}

template <Dtype kType, int kColumns>
static __device__ __forceinline__ void store_right(const RightUnit& u, int unit, uint8_t* slice) {
  const int two = unit / 4, group = two / 16;
  const bool whole = group < kColumns / 2;
  const int n = 4 * group + (whole ? two % 4 : two % 2);  // which 8 of the products
  const int t = whole ? two / 4 % 4 : two / 2 % 4;        // of the lane that gets these channels
  uint8_t* const place = slice + n / 2 * kFragmentBytes + (8 * t + unit % 4) * 16 + n % 2 * 8;
  const float2(&v)[4] = u.rows;
  *reinterpret_cast<uint2*>(place) =
      make_uint2(pack2<kType>(v[0].x, v[1].x), pack2<kType>(v[2].x, v[3].x));
  *reinterpret_cast<uint2*>(place + 64) =
      make_uint2(pack2<kType>(v[0].y, v[1].y), pack2<kType>(v[2].y, v[3].y));
}

// The first slices of P2, or all of them.
template <Dtype kType, int kColumns>
static __device__ __forceinline__ void keep_right(const Factor& right, int slices,
                                                  uint8_t* shared) {
  constexpr int kUnits = 32 * kColumns, kSlice = kColumns * kFragmentBytes;
  if (right.vectors) {
#pragma unroll 4
    for (int i = threadIdx.x; i < slices * kUnits; i += blockDim.x) {
      const int step = i / kUnits, unit = i % kUnits;
      RightUnit u{};
      if (column_of_unit(unit) < right.n) u = load_right(right, step, unit, false);
      store_right<kType, kColumns>(u, unit, shared + step * kSlice);
    }
    return;
  }
#pragma unroll 1
  for (int i = threadIdx.x; i < slices * kSlice / 2; i += blockDim.x) {
    // Word 0 and 1 are an 8 of columns, words 2 and 3 the next.
    const int pair = i / 256, lane = i / 8 % 32, word = i / 2 % 4;
    const int row = 16 * (pair / kColumns) + lane % 4 * 2 + word % 2 * 8 + i % 2;
    const int t = lane / 8, j = pair % kColumns % 2 * 2 + word / 2;
    const int group = pair % kColumns / 2;
    const int column = 32 * group + (group < kColumns / 2 ? 8 : 4) * t + 2 * j + lane / 4 % 2;
    const bool inside = row < right.n && column < right.n;
    const float v = inside ? load(right.data, right.dtype, row * right.n + column) : 0.0f;
    reinterpret_cast<uint16_t*>(shared)[i] = static_cast<uint16_t>(pack2<kType>(v, 0.0f));
  }
}

}  // namespace fq::cuda
