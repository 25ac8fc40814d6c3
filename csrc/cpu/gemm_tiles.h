// How the output [m, n] of a matrix product is cut into the tiles that threads share: blocks of
// rows outermost, 32 columns at a time inside.
//
//               columns 0..31   32..63   ..
//   rows 0..255 tile 0          tile 1   ..
//   rows 256..  ..
//
// A thread works on consecutive tiles: it prepares the rows of a block once and streams the
// weights. A block is at most 512 rows, and 4 MB of them. The cut changes no result.
#pragma once

#include <cstdint>

namespace fq::cpu {
namespace {

constexpr int64_t kTileColumns = 32;
constexpr int64_t kMostTileRows = 512;
constexpr int64_t kTileRowUnit = 32;               // a block is a multiple of it
constexpr int64_t kBlockBytes = int64_t{4} << 20;  // of prepared rows

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct Tile {
  int64_t row, rows, column;
  int columns;  // 1..32
};

struct Tiling {
  int64_t m, n, block_rows, across;

  // row_bytes: what a kernel keeps of one row of the left operand.
  Tiling(int64_t m_, int64_t n_, int64_t row_bytes)
      : m(m_), n(n_), across(ceil_div(n_, kTileColumns)) {
    const int64_t fit = kBlockBytes / (row_bytes > 0 ? row_bytes : 1) / kTileRowUnit * kTileRowUnit;
    block_rows = fit > kMostTileRows ? kMostTileRows : fit < kTileRowUnit ? kTileRowUnit : fit;
  }

  int64_t count() const { return ceil_div(m, block_rows) * across; }

  Tile at(int64_t index) const {
    const int64_t row = index / across * block_rows, column = index % across * kTileColumns;
    const int64_t rows = m - row < block_rows ? m - row : block_rows;
    const int64_t columns = n - column < kTileColumns ? n - column : kTileColumns;
    return {row, rows, column, static_cast<int>(columns)};
  }
};

}  // namespace
}  // namespace fq::cpu
