// What the variants of the integer GEMMs share: the cut into tiles and the epilogue. They
// differ in how they find the integer sum_k a w; it is exact, so all of them agree bit for bit.
#pragma once

#include "../ops.h"
#include "gemm_tiles.h"

namespace fq::cpu {

void gemm_w4a4_avx2(const GemmInteger& args, int64_t begin, int64_t end);
void gemm_w4a4_avx512(const GemmInteger& args, int64_t begin, int64_t end);
void gemm_w4a8_avx2(const GemmInteger& args, int64_t begin, int64_t end);
void gemm_w4a8_avx512(const GemmInteger& args, int64_t begin, int64_t end);
void gemm_w8a8_avx2(const GemmInteger& args, int64_t begin, int64_t end);
void gemm_w8a8_avx512(const GemmInteger& args, int64_t begin, int64_t end);

namespace {

// Rows are prepared as one byte a code.
inline Tiling tiling(const GemmInteger& args) { return Tiling(args.m, args.n, args.k); }

// What the columns of one tile bring to the epilogue; unused columns are 0.
struct TileColumns {
  float scale[kTileColumns] = {};
  float bias[kTileColumns] = {};
  uint32_t colsum[kTileColumns] = {};

  TileColumns(const GemmInteger& args, const Tile& tile) {
    for (int c = 0; c < tile.columns; ++c) {
      scale[c] = args.w_scale[tile.column + c];
      if (args.bias) bias[c] = load(args.bias, args.bias_dtype, tile.column + c);
      if (args.w_colsum) colsum[c] = static_cast<uint32_t>(args.w_colsum[tile.column + c]);
    }
  }
};

template <Dtype kOut>
inline void finish_as(const GemmInteger& args, const Tile& tile, const TileColumns& columns,
                      int64_t row, const int32_t* dots, uint32_t offset, uint32_t per_colsum) {
  const float scale_x = args.a_scale[row];
  const int64_t first = row * args.n + tile.column;
  float out[kTileColumns];
  for (int c = 0; c < kTileColumns; ++c) {
    // In unsigned arithmetic, which wraps: the terms may leave int32, their sum does not.
    const uint32_t sum = static_cast<uint32_t>(dots[c]) + offset + per_colsum * columns.colsum[c];
    out[c] = scaled(static_cast<int32_t>(sum), scale_x, columns.scale[c]);
  }
  if (args.bias)
    for (int c = 0; c < kTileColumns; ++c) out[c] = out[c] + columns.bias[c];
  if (args.residual) {
    float residual[kTileColumns] = {};
    for (int c = 0; c < tile.columns; ++c) residual[c] = load(args.residual, kOut, first + c);
    for (int c = 0; c < kTileColumns; ++c) out[c] = residual[c] + round_to(kOut, out[c]);
  }
  if (tile.columns == kTileColumns)
    for (int c = 0; c < kTileColumns; ++c) store(args.out, kOut, first + c, out[c]);
  else
    for (int c = 0; c < tile.columns; ++c) store(args.out, kOut, first + c, out[c]);
}

// Writes one row of a tile. The integer product is dots[c] + offset + per_colsum * w_colsum[c].
inline void finish(const GemmInteger& args, const Tile& tile, const TileColumns& columns,
                   int64_t row, const int32_t* dots, uint32_t offset, uint32_t per_colsum) {
  if (args.out_dtype == Dtype::kFloat32)
    finish_as<Dtype::kFloat32>(args, tile, columns, row, dots, offset, per_colsum);
  else if (args.out_dtype == Dtype::kBFloat16)
    finish_as<Dtype::kBFloat16>(args, tile, columns, row, dots, offset, per_colsum);
  else
    finish_as<Dtype::kFloat16>(args, tile, columns, row, dots, offset, per_colsum);
}

}  // namespace
}  // namespace fq::cpu
