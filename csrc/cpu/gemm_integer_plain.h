// The integer GEMMs as plain loops over the contract: codes are unpacked to int16, multiplied and
// added. The compiler vectorises them a little; what the vector variants must agree with.
#pragma once

#include "gemm_integer.h"
#include "scratch.h"

namespace fq::cpu {
namespace {

// One row of codes, as int16: two of them fit one multiply-add of every vector unit. Odd k: the
// nibble after the last one is read as well, and `out` has room for it.
template <int kBits>
inline void unpack(const uint8_t* row, int64_t k, bool is_signed, int16_t* out) {
  const int16_t sign = is_signed ? 1 << (kBits - 1) : 0;
  if (kBits == 8) {
    for (int64_t i = 0; i < k; ++i) out[i] = static_cast<int16_t>((row[i] ^ sign) - sign);
  } else {
    for (int64_t b = 0; b < nibble_bytes(k); ++b) {
      out[2 * b] = static_cast<int16_t>(((row[b] & 15) ^ sign) - sign);
      out[2 * b + 1] = static_cast<int16_t>(((row[b] >> 4) ^ sign) - sign);
    }
  }
}

// In unsigned arithmetic, which wraps: the terms may leave int32 before a zero point is taken off.
inline int32_t dot(const int16_t* a, const int16_t* w, int64_t k) {
  uint32_t sum = 0;
  for (int64_t i = 0; i < k; ++i) sum += static_cast<uint32_t>(int32_t{a[i]} * int32_t{w[i]});
  return static_cast<int32_t>(sum);
}

template <int kActivationBits, int kWeightBits>
inline void gemm_plain(const GemmInteger& args, int64_t begin, int64_t end) {
  const Tiling tiles = tiling(args);
  const bool is_signed = args.a_zero == nullptr;
  const int64_t a_bytes = activation_bytes(args.k, kActivationBits);
  const int64_t w_bytes = activation_bytes(args.k, kWeightBits);
  const int64_t padded = 2 * nibble_bytes(args.k);
  const int64_t k = kActivationBits == 4 ? padded : args.k;  // w4a4 does not know of an odd k
  int16_t* const w = static_cast<int16_t*>(
      scratch((tiles.block_rows + kTileColumns) * padded * static_cast<int64_t>(sizeof(int16_t))));
  int16_t* const a = w + kTileColumns * padded;

  int64_t prepared_row = -1;
  for (int64_t t = begin; t < end; ++t) {
    const Tile tile = tiles.at(t);
    for (int64_t r = 0; r < tile.rows && tile.row != prepared_row; ++r)
      unpack<kActivationBits>(args.a + (tile.row + r) * a_bytes, k, is_signed, a + r * padded);
    prepared_row = tile.row;
    for (int64_t c = 0; c < tile.columns; ++c)
      unpack<kWeightBits>(args.w + (tile.column + c) * w_bytes, args.k, true, w + c * padded);

    const TileColumns columns(args, tile);
    for (int64_t r = 0; r < tile.rows; ++r) {
      int32_t dots[kTileColumns] = {};
      for (int64_t c = 0; c < tile.columns; ++c) dots[c] = dot(a + r * padded, w + c * padded, k);
      finish_tile_rows(args, tile, columns, {nullptr, 0u}, r, 1, dots);
    }
  }
}

}  // namespace
}  // namespace fq::cpu
