// The epilogue of the integer GEMMs: from sums to outputs, 32 columns of a row at a time.
#pragma once

#include <cstddef>
#include <type_traits>

#include "../ops.h"
#include "gemm_tiles.h"
#include "narrow_bf16.h"

namespace fq::cpu {
namespace {

// What the columns of one tile bring to the epilogue. Where there is no bias it is -0, which
// changes nothing when it is added.
struct TileColumns {
  float scale[kTileColumns] = {};
  float bias[kTileColumns];
  uint32_t colsum[kTileColumns] = {};

  TileColumns() {
    for (float& b : bias) b = -0.0f;
  }
  TileColumns(const GemmInteger& args, const Tile& tile) : TileColumns() {
    const std::size_t bytes = static_cast<std::size_t>(tile.columns) * 4;
    __builtin_memcpy(scale, args.w_scale + tile.column, bytes);
    if (args.w_colsum) __builtin_memcpy(colsum, args.w_colsum + tile.column, bytes);
    if (args.bias)
      for (int c = 0; c < tile.columns; ++c)
        bias[c] = load(args.bias, args.bias_dtype, tile.column + c);
  }
};

// What turns sums into integer products: a kernel that multiplied (a - activation) (w + weight)
// gives, with the sums of the rows of a - activation and the zero points,
//   sum (a - zero) w = dots - weight * row_sum + (activation - zero) * w_colsum,
// where the last term is 0 if there are no zero points.
struct Offsets {
  const int32_t* rows;  // -weight * row_sum [rows of the tile], modulo 2^32; null if all are 0
  uint32_t activation;
};

// One row of a whole tile. Loops of a fixed length over plain arrays: they become vectors.
template <Dtype kOut, bool kColsum>
inline void finish_whole(const TileColumns& columns, float scale_x, const int32_t* dots,
                         uint32_t offset, uint32_t per_colsum, const void* residual, void* row) {
  float out[kTileColumns];
  for (int c = 0; c < kTileColumns; ++c) {
    // In unsigned arithmetic, which wraps: the terms may leave int32, their sum does not.
    uint32_t sum = static_cast<uint32_t>(dots[c]) + offset;
    if (kColsum) sum += per_colsum * columns.colsum[c];
    out[c] = scaled(static_cast<int32_t>(sum), scale_x, columns.scale[c]) + columns.bias[c];
  }
  if (residual)
    for (int c = 0; c < kTileColumns; ++c)
      out[c] = load(residual, kOut, c) + round_to(kOut, out[c]);
  for (int c = 0; c < kTileColumns; ++c) store(row, kOut, c, out[c]);
}

// Writes rows [first, first + count) of a tile from their sums, dots [count, kTileColumns].
template <Dtype kOut, bool kColsum>
__attribute__((noinline)) void finish_any(const GemmInteger& args, const Tile& tile,
                                          const TileColumns& columns, const Offsets& offsets,
                                          int64_t first, int64_t count, const int32_t* dots) {
  const std::size_t bytes = static_cast<std::size_t>(tile.columns * size_of(kOut));
  for (int64_t r = first; r < first + count; ++r, dots += kTileColumns) {
    const int64_t row = tile.row + r, at = (row * args.n + tile.column) * size_of(kOut);
    const char* const residual =
        args.residual ? static_cast<const char*>(args.residual) + at : nullptr;
    char* const out = static_cast<char*>(args.out) + at;
    const float scale = args.a_scale[row];
    const uint32_t offset = offsets.rows ? static_cast<uint32_t>(offsets.rows[r]) : 0u;
    const uint32_t per_colsum =
        kColsum ? offsets.activation - static_cast<uint32_t>(args.a_zero[row]) : 0u;
    if (tile.columns == kTileColumns) {
      finish_whole<kOut, kColsum>(columns, scale, dots, offset, per_colsum, residual, out);
    } else {
      float padded_out[kTileColumns], padded_residual[kTileColumns] = {};
      if (residual) __builtin_memcpy(padded_residual, residual, bytes);
      finish_whole<kOut, kColsum>(columns, scale, dots, offset, per_colsum,
                                  residual ? padded_residual : nullptr, padded_out);
      __builtin_memcpy(out, padded_out, bytes);
    }
  }
}

// The same for whole tiles in bfloat16, without leaving the registers, and in few instructions: a
// matrix unit has no more than a few hundred of them in sight while it works. Returns how many rows
// it has done: it stops before one that needs the code above.
template <bool kColsum, bool kResidual>
__attribute__((noinline)) int64_t finish_bf16(const GemmInteger& args, const Tile& tile,
                                              const TileColumns& columns, const Offsets& offsets,
                                              int64_t first, int64_t count, const int32_t* dots) {
#if defined(__AVX512BF16__)
  const auto half = [](const float* p, int i) { return _mm512_loadu_ps(p + i * 16); };
  const __m512 scale[] = {half(columns.scale, 0), half(columns.scale, 1)};
  const __m512 bias[] = {half(columns.bias, 0), half(columns.bias, 1)};
  const __m512i colsum[] = {_mm512_loadu_si512(columns.colsum),
                            _mm512_loadu_si512(columns.colsum + 16)};
  const int64_t row = tile.row + first, at = row * args.n + tile.column;
  const int32_t* const offset = offsets.rows + first;
  const float* const scale_x = args.a_scale + row;
  const uint16_t* residual = static_cast<const uint16_t*>(args.residual) + (kResidual ? at : 0);
  uint16_t* out = static_cast<uint16_t*>(args.out) + at;
  for (int64_t r = 0; r < count; ++r, dots += kTileColumns, out += args.n) {
    const __m512i add = _mm512_set1_epi32(offset[r]);
    const __m512 factor = _mm512_set1_ps(scale_x[r]);
    __m512 y[2];
    for (int i = 0; i < 2; ++i) {
      __m512i sum = _mm512_add_epi32(add, _mm512_loadu_si512(dots + i * 16));
      if (kColsum) {
        const uint32_t times = offsets.activation - static_cast<uint32_t>(args.a_zero[row + r]);
        const __m512i all = _mm512_set1_epi32(static_cast<int32_t>(times));
        sum = _mm512_add_epi32(sum, _mm512_mullo_epi32(all, colsum[i]));
      }
      y[i] = _mm512_mul_ps(_mm512_cvtepi32_ps(sum), _mm512_mul_ps(factor, scale[i]));
      y[i] = _mm512_add_ps(y[i], bias[i]);
    }
    __m512i both;
    if (!round_to_bf16(y[0], y[1], both)) return r;
    if (kResidual) {
      const __m512i old = _mm512_loadu_si512(residual);
      residual += args.n;
      y[0] = _mm512_add_ps(widen_bf16<0>(old), widen_bf16<0>(both));
      y[1] = _mm512_add_ps(widen_bf16<1>(old), widen_bf16<1>(both));
      if (!round_to_bf16(y[0], y[1], both)) return r;
    }
    _mm512_storeu_si512(out, both);
  }
  return count;
#else
  static_cast<void>(args), static_cast<void>(tile), static_cast<void>(columns);
  static_cast<void>(offsets), static_cast<void>(first), static_cast<void>(dots);
  static_cast<void>(count);
  return 0;
#endif
}

template <Dtype kOut, bool kColsum>
void finish_rows(const GemmInteger& args, const Tile& tile, const TileColumns& columns,
                 const Offsets& offsets, int64_t first, int64_t count, const int32_t* dots) {
  const bool in_bf16 = kVectorsRoundToBf16 && kOut == Dtype::kBFloat16 &&
                       tile.columns == kTileColumns && offsets.rows;
  while (count > 0) {
    int64_t done = 0;
    if (in_bf16 && args.residual)
      done = finish_bf16<kColsum, true>(args, tile, columns, offsets, first, count, dots);
    else if (in_bf16)
      done = finish_bf16<kColsum, false>(args, tile, columns, offsets, first, count, dots);
    if (done == 0) {
      done = in_bf16 ? 1 : count;
      finish_any<kOut, kColsum>(args, tile, columns, offsets, first, done, dots);
    }
    first += done;
    count -= done;
    dots += done * kTileColumns;
  }
}

// Direct calls: they cost less than one through a pointer.
inline void finish_tile_rows(const GemmInteger& args, const Tile& tile, const TileColumns& columns,
                             const Offsets& offsets, int64_t first, int64_t count,
                             const int32_t* dots) {
  const auto finish = [&](auto of_dtype) {
    constexpr Dtype kOut = decltype(of_dtype)::value;
    if (args.a_zero)
      finish_rows<kOut, true>(args, tile, columns, offsets, first, count, dots);
    else
      finish_rows<kOut, false>(args, tile, columns, offsets, first, count, dots);
  };
  switch (args.out_dtype) {
    case Dtype::kBFloat16:
      return finish(std::integral_constant<Dtype, Dtype::kBFloat16>());
    case Dtype::kFloat16:
      return finish(std::integral_constant<Dtype, Dtype::kFloat16>());
    default:
      return finish(std::integral_constant<Dtype, Dtype::kFloat32>());
  }
}

}  // namespace
}  // namespace fq::cpu
