// The integer GEMMs on vectors: the body that gemm_integer_avx2.cpp and
// gemm_integer_avx512.cpp compile, each with its own `Vector` (a set of bytes and the few
// instructions used on them).
//
// A register block is kRows x 4 outputs; every output has a vector of partial sums over k. One load
// of weight bytes holds codes of even k in the low nibbles and of odd k in the high ones, so the
// activations are split into an even and an odd plane once per block of rows:
//
//   memory, w    | b0: k0 k1 | b1: k2 k3 | ...        low(w) = k0 k2 k4 ..   high(w) = k1 k3 k5 ..
//   prepared, a  | chunk 0: k0 k2 k4 .. | k1 k3 k5 .. | chunk 1: ..      (a chunk is one vector)
//
// The multipliers take unsigned x signed bytes. The weights are made unsigned, w + 8, which is one
// XOR on the way to the nibbles; unsigned 8-bit activations are made signed, a - 128:
//
//   sum a w = sum (a - 128)(w + 8) - 8 sum (a - 128) + 128 sum w          (without 128 if signed)
//
// and both corrections go into the epilogue, in int32 modulo 2^32. Weights of 8 bits are not split:
// a chunk is one vector of codes in their order, and `Vector` says what it adds to a weight (128 or
// nothing) in place of the 8. Bound: arithmetic, for one row
// by the unpacking of the weights (3 instructions per 2 products), from 4 rows on by the products.
#pragma once

#include "gemm_integer.h"
#include "scratch.h"

namespace fq::cpu {
namespace {

constexpr int kBlockColumns = 4;

template <class Vector, int kWeightBits>
struct Prepared {
  static constexpr int64_t kPlanes = 8 / kWeightBits;
  static constexpr int64_t kChunk = kPlanes * Vector::kBytes;  // bytes: an even and an odd vector
  int64_t chunks, tail;  // tail: weight bytes in the last chunk
  int64_t stride;        // bytes of a row
  int8_t* rows;          // [block_rows, chunks, kPlanes, kBytes]
  int32_t* sums;         // [block_rows] = sum of a row

  Prepared(int64_t k, int64_t block_rows) {
    const int64_t bytes = activation_bytes(k, kWeightBits);
    chunks = ceil_div(bytes, Vector::kBytes);
    tail = bytes - (chunks - 1) * Vector::kBytes;
    stride = chunks * kChunk;
    rows = static_cast<int8_t*>(
        scratch(block_rows * (stride + static_cast<int64_t>(sizeof(int32_t)))));
    sums = reinterpret_cast<int32_t*>(rows + block_rows * stride);
  }
};

// Splits `bytes` packed bytes into the two planes of one chunk; the rest of the chunk becomes 0.
template <class Vector>
inline void split_nibbles(const uint8_t* a, int64_t bytes, int sign, int8_t* chunk) {
  int8_t* const odd = chunk + Vector::kBytes;
  for (int64_t b = 0; b < bytes; ++b) {
    chunk[b] = static_cast<int8_t>(((a[b] & 15) ^ sign) - sign);
    odd[b] = static_cast<int8_t>(((a[b] >> 4) ^ sign) - sign);
  }
  for (int64_t b = bytes; b < Vector::kBytes; ++b) chunk[b] = odd[b] = 0;
}

// The same for `codes` codes of one byte, of which the bits in `flip` are inverted.
template <class Vector>
inline void split_bytes(const uint8_t* a, int64_t codes, int flip, int8_t* chunk) {
  int8_t* const odd = chunk + Vector::kBytes;
  const int64_t pairs = codes / 2;
  for (int64_t b = 0; b < pairs; ++b) {
    chunk[b] = static_cast<int8_t>(a[2 * b] ^ flip);
    odd[b] = static_cast<int8_t>(a[2 * b + 1] ^ flip);
  }
  for (int64_t b = pairs; b < Vector::kBytes; ++b) chunk[b] = odd[b] = 0;
  if (codes % 2) chunk[pairs] = static_cast<int8_t>(a[codes - 1] ^ flip);
}

// The same without the planes.
template <class Vector>
inline void copy_bytes(const uint8_t* a, int64_t codes, int flip, int8_t* chunk) {
  for (int64_t b = 0; b < codes; ++b) chunk[b] = static_cast<int8_t>(a[b] ^ flip);
  for (int64_t b = codes; b < Vector::kBytes; ++b) chunk[b] = 0;
}

template <class Vector, int kActivationBits, int kWeightBits>
void prepare(const GemmInteger& args, const Tile& tile,
             const Prepared<Vector, kWeightBits>& prepared) {
  const int64_t row_bytes = activation_bytes(args.k, kActivationBits);
  const int64_t chunk_bytes = prepared.kChunk * kActivationBits / 8;
  const bool is_signed = args.a_zero == nullptr;
  for (int64_t r = 0; r < tile.rows; ++r) {
    const uint8_t* const a = args.a + (tile.row + r) * row_bytes;
    int8_t* const out = prepared.rows + r * prepared.stride;
    for (int64_t c = 0; c < prepared.chunks; ++c) {
      const int64_t left = row_bytes - c * chunk_bytes;
      const int64_t bytes = left < chunk_bytes ? left : chunk_bytes;
      int8_t* const chunk = out + c * prepared.kChunk;
      if (kActivationBits == 4)
        split_nibbles<Vector>(a + c * chunk_bytes, bytes, is_signed ? 8 : 0, chunk);
      else if (kWeightBits == 4)
        split_bytes<Vector>(a + c * chunk_bytes, bytes, is_signed ? 0 : 128, chunk);
      else
        copy_bytes<Vector>(a + c * chunk_bytes, bytes, is_signed ? 0 : 128, chunk);
    }
    int32_t sum = 0;
    for (int64_t i = 0; i < prepared.stride; ++i) sum += out[i];
    prepared.sums[r] = sum;
  }
}

// dots[r * kTileColumns + c] = sum over k of rows[r] and columns[c] + 8, for kRows x 4 of them.
template <class Vector, int kWeightBits, int kRows>
inline void block(const Prepared<Vector, kWeightBits>& prepared, const int8_t* rows,
                  const uint8_t* const (&columns)[kBlockColumns], int32_t* dots) {
  typename Vector::Sums sums[kRows][kBlockColumns];
  for (int r = 0; r < kRows; ++r)
    for (int c = 0; c < kBlockColumns; ++c) sums[r][c] = Vector::zero();

  const auto add_chunk = [&](int64_t chunk, auto load_weights) __attribute__((always_inline)) {
    typename Vector::Bytes even[kRows], odd[kRows];
    for (int r = 0; r < kRows; ++r) {
      const int8_t* const row = rows + r * prepared.stride + chunk * prepared.kChunk;
      even[r] = Vector::load(row);
      if (kWeightBits == 4) odd[r] = Vector::load(row + Vector::kBytes);
    }
    for (int c = 0; c < kBlockColumns; ++c) {
      const typename Vector::Bytes bytes = load_weights(columns[c] + chunk * Vector::kBytes);
      if (kWeightBits == 8) {
        for (int r = 0; r < kRows; ++r)
          sums[r][c] = Vector::add_products(sums[r][c], bytes, even[r]);
      } else {
        const typename Vector::Bytes low = Vector::low(bytes), high = Vector::high(bytes);
        for (int r = 0; r < kRows; ++r)
          sums[r][c] = Vector::add_products(sums[r][c], low, even[r], high, odd[r]);
      }
    }
  };
  for (int64_t chunk = 0; chunk + 1 < prepared.chunks; ++chunk)
    add_chunk(chunk, [](const uint8_t* w) { return Vector::load(w); });
  if (prepared.chunks > 0)
    add_chunk(prepared.chunks - 1,
              [&](const uint8_t* w) { return Vector::load_first(w, prepared.tail); });

  for (int r = 0; r < kRows; ++r)
    Vector::store_totals(dots + r * kTileColumns, sums[r][0], sums[r][1], sums[r][2], sums[r][3]);
}

template <class Vector, int kWeightBits, int kRows>
inline void row_group(const Prepared<Vector, kWeightBits>& prepared, const GemmInteger& args,
                      const Tile& tile, int64_t first, int32_t* dots) {
  const int64_t w_bytes = activation_bytes(args.k, kWeightBits);
  for (int c0 = 0; c0 < tile.columns; c0 += kBlockColumns) {
    const uint8_t* columns[kBlockColumns];
    for (int c = 0; c < kBlockColumns; ++c) {  // past the last column: that one again, unused
      const int64_t column = c0 + c < tile.columns ? c0 + c : tile.columns - 1;
      columns[c] = args.w + (tile.column + column) * w_bytes;
    }
    block<Vector, kWeightBits, kRows>(prepared, prepared.rows + first * prepared.stride, columns,
                                      dots + c0);
  }
}

template <class Vector, int kActivationBits, int kWeightBits>
void gemm_simd(const GemmInteger& args, int64_t begin, int64_t end) {
  const Tiling tiles = tiling(args);
  const Prepared<Vector, kWeightBits> prepared(args.k, tiles.block_rows);
  const uint32_t offset = kActivationBits == 4 || args.a_zero == nullptr ? 0u : 128u;
  const uint32_t w_offset = kWeightBits == 4 ? 8u : Vector::kByteOffset;

  int64_t prepared_row = -1;
  for (int64_t t = begin; t < end; ++t) {
    const Tile tile = tiles.at(t);
    if (tile.row != prepared_row)
      prepare<Vector, kActivationBits, kWeightBits>(args, tile, prepared);
    prepared_row = tile.row;

    const TileColumns columns(args, tile);
    for (int64_t first = 0; first < tile.rows;) {
      int32_t dots[Vector::kRows * kTileColumns] = {};
      const int64_t left = tile.rows - first;
      int64_t rows = 1;
      if (left >= Vector::kRows) {
        rows = Vector::kRows;
        row_group<Vector, kWeightBits, Vector::kRows>(prepared, args, tile, first, dots);
      } else if (left >= 2) {
        rows = 2;
        row_group<Vector, kWeightBits, 2>(prepared, args, tile, first, dots);
      } else {
        row_group<Vector, kWeightBits, 1>(prepared, args, tile, first, dots);
      }
      for (int64_t r = first; r < first + rows; ++r) {
        const int64_t row = tile.row + r;
        const uint32_t zero = args.a_zero ? static_cast<uint32_t>(args.a_zero[row]) : 0u;
        const uint32_t row_term = 0u - w_offset * static_cast<uint32_t>(prepared.sums[r]);
        finish(args, tile, columns, row, dots + (r - first) * kTileColumns, row_term,
               offset - zero);
      }
      first += rows;
    }
  }
}

}  // namespace
}  // namespace fq::cpu
