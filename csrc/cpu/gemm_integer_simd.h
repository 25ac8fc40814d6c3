// The integer GEMMs on vectors and on a matrix unit: the kernel of gemm_panels.h that
// gemm_integer_avx2.cpp, _avx512.cpp and _amx.cpp compile, each with its own `Vector` (a set of
// bytes and the few instructions used on them).
//
// A step is 64 codes of a row, int8, and of a column, uint8. A byte of 4-bit weights holds an even
// k in the low nibble and an odd k in the high one, so with these the codes of a step are in the
// order
//
//   quads 0..7: k = 0 2 4 .. 62      quads 8..15: k = 1 3 5 .. 63
//
// in the panel and in the rows. Past the end of a row its codes are 0, and what the panel holds
// there does not matter.
//
// The multipliers take unsigned x signed bytes. The weights are made unsigned, w + 8 or w + 128,
// and unsigned 8-bit activations are made signed, a - 128:
//
//   sum a w = sum (a - 128)(w + 8) - 8 sum (a - 128) + 128 sum w          (without 128 if signed)
//
// and both corrections go into the epilogue, in int32 modulo 2^32. Bound: arithmetic; for few rows
// the memory, if the weights are not in a cache.
#pragma once

#include "gemm_integer.h"
#include "gemm_panels.h"
#include "quads.h"

namespace fq::cpu {
namespace {

constexpr int64_t kQuads = kRowStep / 4;  // of a step

// ---- products with a panel
// -----------------------------------------------------------------------

// totals[r, c] = (or, if `add`, +=) the products of kRows rows and the panel.
template <class Vector, int kWeightBits, int kRows>
inline void multiply_rows(const Block& block, const uint8_t* rows, int32_t* totals) {
  constexpr int64_t kFar = kQuads / 2;
  constexpr int64_t kSecond = Vector::kColumns == kHalf ? kHalfBytes : kQuadBytes / 2;
  constexpr int kChains = kRows == 1 ? 4 : kRows == 2 ? 2 : 1;        // to hide a product's latency
  for (int64_t c = 0; c < kTileColumns; c += 2 * Vector::kColumns) {  // two vectors of columns
    typename Vector::Sums sums[kChains][kRows][2];
    for (int chain = 0; chain < kChains; ++chain)
      for (int r = 0; r < kRows; ++r)
        for (int v = 0; v < 2; ++v) {
          const int32_t* const total = totals + r * kTileColumns + c + v * Vector::kColumns;
          const bool add = block.first > 0 && chain == 0;
          sums[chain][r][v] = add ? Vector::load_sums(total) : Vector::zero();
        }
    for (int64_t s = 0; s < block.steps; ++s) {
      const uint8_t* const w = block.panel + s * kPanelStep + c / kHalf * kHalfBytes;
      const uint8_t* const a = rows + s * block.row_step;
#pragma GCC unroll 8
      for (int64_t q = 0; q < kFar; ++q) {
        const auto w00 = Vector::load(w + q * kQuadBytes);
        const auto w01 = Vector::load(w + (q + kFar) * kQuadBytes);
        const auto w10 = Vector::load(w + kSecond + q * kQuadBytes);
        const auto w11 = Vector::load(w + kSecond + (q + kFar) * kQuadBytes);
        for (int r = 0; r < kRows; ++r) {
          const auto a0 = Vector::broadcast(a + r * kRowStep + q * 4);
          const auto a1 = Vector::broadcast(a + r * kRowStep + (q + kFar) * 4);
          auto& sum = sums[q % kChains][r];
          sum[0] = Vector::template add_products<kWeightBits>(sum[0], w00, a0, w01, a1);
          sum[1] = Vector::template add_products<kWeightBits>(sum[1], w10, a0, w11, a1);
        }
      }
    }
    for (int r = 0; r < kRows; ++r)
      for (int v = 0; v < 2; ++v) {
        auto sum = sums[0][r][v];
        for (int chain = 1; chain < kChains; ++chain) sum = Vector::add(sum, sums[chain][r][v]);
        Vector::store_sums(totals + r * kTileColumns + c + v * Vector::kColumns, sum);
      }
  }
}

template <class Vector, int kWeightBits>
void multiply_vectors(const Block& block) {
  for (int64_t r = 0; r < block.count;) {
    const auto some = [&](auto multiply, int64_t done) {
      multiply(block, block.rows + r * kRowStep,
               static_cast<int32_t*>(block.totals) + r * kTileColumns);
      r += done;
    };
    const int64_t left = block.count - r;
    if (left >= Vector::kRows)
      some(multiply_rows<Vector, kWeightBits, Vector::kRows>, Vector::kRows);
    else if (Vector::kRows > 4 && left >= 4)
      some(multiply_rows<Vector, kWeightBits, 4>, 4);
    else if (left >= 2)
      some(multiply_rows<Vector, kWeightBits, 2>, 2);
    else
      some(multiply_rows<Vector, kWeightBits, 1>, 1);
  }
}

// ---- products of few rows
// ------------------------------------------------------------------------

// totals[r, c] of kRows rows from the columns in memory, which are unpacked in registers. Four
// columns at a time, every one with a vector of partial sums.
template <class Vector, int kWeightBits, int kRows>
inline void multiply_few_rows(const Work& work, const Columns<kWeightBits * 8>& columns,
                              int64_t row, int64_t count) {
  constexpr int kTogether = 4;
  constexpr int64_t kBytes = kWeightBits * 8, kLineSteps = 64 / kBytes;
  const int64_t whole_steps = columns.bytes / kBytes;
  const uint8_t* const a = work.row(row);
  // Whole groups of columns ahead: the next group, or about 8 KB where it is shorter.
  const int64_t ahead = ceil_div(8192, kTogether * columns.bytes) * kTogether * columns.bytes;
  for (int64_t c0 = 0; c0 < count; c0 += kTogether) {
    typename Vector::Sums sums[kRows][kTogether];
    for (int r = 0; r < kRows; ++r)
      for (int c = 0; c < kTogether; ++c) sums[r][c] = Vector::zero();
    const auto add_step = [&](int64_t s, auto weights) __attribute__((always_inline)) {
      typename Vector::Step codes[kRows];
      for (int r = 0; r < kRows; ++r)
        codes[r] = Vector::load_row_step(a + s * work.row_step() + r * kRowStep);
      for (int c = 0; c < kTogether; ++c) {
        const auto w = Vector::template load_step<kWeightBits>(weights(c));
        for (int r = 0; r < kRows; ++r)
          sums[r][c] = Vector::template add_step<kWeightBits>(sums[r][c], w, codes[r]);
      }
    };
    const auto in_memory = [&](int64_t s) {
      return [&, s](int c) { return columns.at[c0 + c] + s * kBytes; };
    };
    int64_t s = 0;
    for (; s + kLineSteps <= whole_steps; s += kLineSteps) {
      for (int c = 0; c < kTogether; ++c)
        __builtin_prefetch(columns.at[c0 + c] + s * kBytes + ahead, 0, 2);
      for (int64_t i = 0; i < kLineSteps; ++i) add_step(s + i, in_memory(s + i));
    }
    for (; s < whole_steps; ++s) add_step(s, in_memory(s));
    if (s < work.steps)
      add_step(s, [&](int c) { return columns.ends[c0 + c] + s * kBytes - columns.ends_from; });
    for (int r = 0; r < kRows; ++r)
      Vector::store_totals(reinterpret_cast<int32_t*>(work.totals) + (row + r) * kTileColumns + c0,
                           sums[r]);
  }
}

// ---- the kernel
// ----------------------------------------------------------------------------------

template <class Vector, int kActivationBits, int kWeightBits>
struct IntegerKernel {
  using Args = GemmInteger;
  using Epilogue = TileColumns;
  static constexpr int64_t kUnitSteps = 1, kUnitBytes = kRowStep * kWeightBits / 8;
  static constexpr int64_t kColumns = Vector::kColumns, kFewRows = Vector::kFewRows;

  const GemmInteger& args;
  Offsets offsets;
  int64_t most;  // steps of a panel

  explicit IntegerKernel(const GemmInteger& a)
      : args(a), offsets{nullptr, kActivationBits == 8 && a.a_zero ? 128u : 0u} {
    // Panels of about the same size; an even number of steps is whole cache lines of a column.
    const int64_t panels = ceil_div(steps(), Vector::kPanelSteps);
    most = panels > 1 ? (ceil_div(steps(), panels) + 1) / 2 * 2 : steps();
  }

  Dtype out_dtype() const { return args.out_dtype; }
  int64_t steps() const { return ceil_div(args.k, kRowStep); }
  int64_t most_panel_steps() const { return most; }
  int64_t panel_steps(int64_t first) const {
    return steps() - first < most ? steps() - first : most;
  }
  int64_t column_bytes() const { return activation_bytes(args.k, kWeightBits); }
  const uint8_t* column(int64_t n) const { return args.w + n * column_bytes(); }
  int64_t unit_offset(int64_t unit) const { return unit * kUnitBytes; }
  bool reads_past_columns() const { return column_bytes() % kUnitBytes != 0; }
  void start_tile(const Tile&) {}

  // Codes of the rows, signed, and what their sums take off.
  void prepare(const Tile& tile, const Work& work) {
    constexpr int64_t kBytes = kRowStep * kActivationBits / 8;
    const int64_t row_bytes = activation_bytes(args.k, kActivationBits);
    const bool is_signed = args.a_zero == nullptr;
    // What makes a code signed; the padding becomes 0 too.
    const int flip = kActivationBits == 4 ? (is_signed ? 8 : 0) : (is_signed ? 0 : 128);
    const int padding = kActivationBits == 4 ? 0 : flip;
    constexpr uint32_t kWeight = kWeightBits == 4 ? 8 : 128;
    int32_t* const row_offsets = reinterpret_cast<int32_t*>(work.extra);
    offsets.rows = row_offsets;
    for (int64_t r = 0; r < tile.rows; ++r) {
      const uint8_t* const a = args.a + (tile.row + r) * row_bytes;
      uint8_t* out = work.row(r);
      typename Vector::Sums sum = Vector::zero();
      for (int64_t first = 0; first < row_bytes; first += kBytes, out += work.row_step()) {
        const uint8_t* codes = a + first;
        uint8_t last[kBytes];
        if (row_bytes - first < kBytes) {
          __builtin_memset(last, padding, kBytes);
          __builtin_memcpy(last, codes, static_cast<std::size_t>(row_bytes - first));
          codes = last;
        }
        sum = Vector::template prepare_step<kActivationBits, kWeightBits>(codes, flip, out, sum);
      }
      row_offsets[r] =
          static_cast<int32_t>(0u - kWeight * static_cast<uint32_t>(Vector::total(sum)));
    }
  }

  // Codes of the columns, unsigned.
  static void make_unit(const uint8_t* const* columns, int64_t offset, uint8_t* out) {
    for (int64_t piece = 0; piece < kUnitBytes / 16; ++piece) {
      typename Vector::Bytes quads[4];
      load_quads(columns, offset + piece * 16, quads);
      for (int64_t j = 0; j < 4; ++j) {
        uint8_t* const quad = out + (piece * 4 + j) * kQuadBytes;
        if (kWeightBits == 4) {
          Vector::store(quad, Vector::low(quads[j]));
          Vector::store(quad + kQuads / 2 * kQuadBytes, Vector::high(quads[j]));
        } else {
          Vector::store(quad, Vector::flip(quads[j]));
        }
      }
    }
  }

  void multiply_few(const Tile& tile, const Columns<kUnitBytes>& columns, const Work& work) {
    for (int64_t r = 0; r < tile.rows;) {
      const auto some = [&](auto multiply, int64_t done) {
        multiply(work, columns, r, tile.columns);
        r += done;
      };
      if (tile.rows - r >= 4)
        some(multiply_few_rows<Vector, kWeightBits, 4>, 4);
      else if (tile.rows - r >= 2)
        some(multiply_few_rows<Vector, kWeightBits, 2>, 2);
      else
        some(multiply_few_rows<Vector, kWeightBits, 1>, 1);
    }
  }

  template <class Aside>
  void multiply_block(const Block& block, Aside& aside) {
    Vector::template multiply_block<kWeightBits>(block, aside);
  }

  void finish(const Tile& tile, const TileColumns& columns, int64_t first, int64_t count,
              const void* totals) {
    finish_tile_rows(args, tile, columns, offsets, first, count,
                     static_cast<const int32_t*>(totals));
  }
};

template <class Vector, int kActivationBits, int kWeightBits>
void gemm_simd(const GemmInteger& args, int64_t begin, int64_t end) {
  const Tiling tiles = tiling(args);
  IntegerKernel<Vector, kActivationBits, kWeightBits> kernel(args);
  const int64_t most_rows = args.m < tiles.block_rows ? args.m : tiles.block_rows;
  const Work work(kernel.steps(), most_rows, kernel.most_panel_steps(),
                  most_rows * int64_t{sizeof(int32_t)});
  gemm_panels(kernel, tiles, work, begin, end);
}

}  // namespace
}  // namespace fq::cpu
