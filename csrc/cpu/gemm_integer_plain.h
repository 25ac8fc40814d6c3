// gemm_w4a4 and gemm_w4a8 as plain loops over the contract: codes are unpacked to int16, multiplied
// and added. The compiler vectorises them a little; what the vector variants must agree with.
#pragma once

#include "gemm_integer.h"
#include "scratch.h"

namespace fq::cpu {
namespace {

// One row of codes, as int16: two of them fit one multiply-add of every vector unit. Odd k: the
// nibble after the last one is read (w4a4) or left out (w4a8), as ops.h says.
inline void unpack(const uint8_t* row, int64_t k, bool is_signed, int16_t* out) {
  const int16_t sign = is_signed ? 8 : 0;
  for (int64_t b = 0; b < nibble_bytes(k); ++b) {
    out[2 * b] = static_cast<int16_t>(((row[b] & 15) ^ sign) - sign);
    out[2 * b + 1] = static_cast<int16_t>(((row[b] >> 4) ^ sign) - sign);
  }
}

inline void widen(const uint8_t* row, int64_t k, bool is_signed, int16_t* out) {
  const int16_t sign = is_signed ? 128 : 0;
  for (int64_t i = 0; i < k; ++i) out[i] = static_cast<int16_t>((row[i] ^ sign) - sign);
}

inline int32_t dot(const int16_t* a, const int16_t* w, int64_t k) {
  int32_t sum = 0;
  for (int64_t i = 0; i < k; ++i) sum += int32_t{a[i]} * int32_t{w[i]};
  return sum;
}

template <bool kNibbles>
inline void gemm_plain(const GemmInteger& args, int64_t begin, int64_t end) {
  const Tiling tiles = tiling(args);
  const bool is_signed = args.a_zero == nullptr;
  const int64_t w_bytes = nibble_bytes(args.k), padded = 2 * w_bytes;
  const int64_t k = kNibbles ? padded : args.k;
  int16_t* const w = static_cast<int16_t*>(
      scratch((tiles.block_rows + kTileColumns) * padded * static_cast<int64_t>(sizeof(int16_t))));
  int16_t* const a = w + kTileColumns * padded;

  int64_t prepared_row = -1;
  for (int64_t t = begin; t < end; ++t) {
    const Tile tile = tiles.at(t);
    for (int64_t r = 0; r < tile.rows && tile.row != prepared_row; ++r) {
      if (kNibbles)
        unpack(args.a + (tile.row + r) * w_bytes, k, is_signed, a + r * padded);
      else
        widen(args.a + (tile.row + r) * k, k, is_signed, a + r * padded);
    }
    prepared_row = tile.row;
    for (int64_t c = 0; c < tile.columns; ++c)
      unpack(args.w + (tile.column + c) * w_bytes, args.k, true, w + c * padded);

    const TileColumns columns(args, tile);
    for (int64_t r = 0; r < tile.rows; ++r) {
      int32_t dots[kTileColumns] = {};
      for (int64_t c = 0; c < tile.columns; ++c) dots[c] = dot(a + r * padded, w + c * padded, k);
      const uint32_t zero = is_signed ? 0u : static_cast<uint32_t>(args.a_zero[tile.row + r]);
      finish(args, tile, columns, tile.row + r, dots, 0u, 0u - zero);
    }
  }
}

}  // namespace
}  // namespace fq::cpu
