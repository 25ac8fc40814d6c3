// What the variants of the integer GEMMs share: the cut into tiles and the epilogue. They
// differ in how they find the integer sum_k a w; it is exact, so all of them agree bit for bit.
#pragma once

#include <cstddef>

#include "../ops.h"
#include "gemm_tiles.h"
#include "narrow_bf16.h"

namespace fq::cpu {

void gemm_w4a4_avx2(const GemmInteger& args, int64_t begin, int64_t end);
void gemm_w4a4_avx512(const GemmInteger& args, int64_t begin, int64_t end);
void gemm_w4a4_amx(const GemmInteger& args, int64_t begin, int64_t end);
void gemm_w4a8_avx2(const GemmInteger& args, int64_t begin, int64_t end);
void gemm_w4a8_avx512(const GemmInteger& args, int64_t begin, int64_t end);
void gemm_w4a8_amx(const GemmInteger& args, int64_t begin, int64_t end);
void gemm_w8a8_avx2(const GemmInteger& args, int64_t begin, int64_t end);
void gemm_w8a8_avx512(const GemmInteger& args, int64_t begin, int64_t end);
void gemm_w8a8_amx(const GemmInteger& args, int64_t begin, int64_t end);

namespace {

// Rows are prepared as one byte a code.
inline Tiling tiling(const GemmInteger& args) { return Tiling(args.m, args.n, args.k); }

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
  uint32_t weight, activation;
  const int32_t* row_sums;  // [rows of the tile]; null if weight is 0
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
  if (kOut == Dtype::kBFloat16 && narrow_to_bf16(out, row)) return;
  for (int c = 0; c < kTileColumns; ++c) store(row, kOut, c, out[c]);
}

// Writes `count` rows of a tile, from row `first` of it on, from their sums, dots [count,
// kTileColumns].
template <Dtype kOut, bool kColsum>
void finish_rows(const GemmInteger& args, const Tile& tile, const TileColumns& columns,
                 const Offsets& offsets, int64_t first, int64_t count, const int32_t* dots) {
  const std::size_t bytes = static_cast<std::size_t>(tile.columns * size_of(kOut));
  for (int64_t r = first; r < first + count; ++r, dots += kTileColumns) {
    const int64_t row = tile.row + r, at = (row * args.n + tile.column) * size_of(kOut);
    const char* const residual =
        args.residual ? static_cast<const char*>(args.residual) + at : nullptr;
    char* const out = static_cast<char*>(args.out) + at;
    const float scale = args.a_scale[row];
    const uint32_t sum = offsets.row_sums ? static_cast<uint32_t>(offsets.row_sums[r]) : 0u;
    const uint32_t offset = 0u - offsets.weight * sum;
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

using FinishRows = decltype(&finish_rows<Dtype::kFloat32, true>);

inline FinishRows finisher(const GemmInteger& args) {
  const bool colsum = args.a_zero != nullptr;
  switch (args.out_dtype) {
    case Dtype::kBFloat16:
      return colsum ? finish_rows<Dtype::kBFloat16, true> : finish_rows<Dtype::kBFloat16, false>;
    case Dtype::kFloat16:
      return colsum ? finish_rows<Dtype::kFloat16, true> : finish_rows<Dtype::kFloat16, false>;
    default:
      return colsum ? finish_rows<Dtype::kFloat32, true> : finish_rows<Dtype::kFloat32, false>;
  }
}

}  // namespace
}  // namespace fq::cpu
