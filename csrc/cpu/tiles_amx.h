// The tile registers of AMX: eight, of at most 16 rows of 64 bytes. The instructions are spelled
// out because the compilers' own wrappers do not say that they read and write memory.
#pragma once

#include <cstdint>

namespace fq::cpu {
namespace {

template <int kTile>
inline void clear_tile() {
  asm volatile("tilezero %%tmm%c0" : : "i"(kTile));
}

// stride: bytes from a row to the next one.
template <int kTile>
inline void load_tile(const void* rows, int64_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(rows), "r"(stride), "i"(kTile) : "memory");
}

template <int kTile>
inline void store_tile(void* rows, int64_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(rows), "r"(stride), "i"(kTile) : "memory");
}

// Sums [row][column] of int32 += left [row][4 k] x right [k][column][4]: int8 x uint8.
template <int kSums, int kLeft, int kRight>
inline void multiply_bytes() {
  asm volatile("tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(kSums), "i"(kLeft), "i"(kRight));
}

// Sums [row][column] of float += left [row][2 k] x right [k][column][2]: bfloat16. Of one row and
// column: even = fma over the even k, ascending from 0; odd likewise; sum = sum + (even + odd).
// Subnormal numbers are taken for 0, also as results.
template <int kSums, int kLeft, int kRight>
inline void multiply_bf16() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(kSums), "i"(kLeft), "i"(kRight));
}

struct TileShape {
  int64_t rows, row_bytes;
};

// Configures tiles 0..3, which are sums, 4 and 5, the left factors, and 6 and 7, the right ones,
// and gives them back at its end, so that no context switch has to save them.
struct TileSession {
  TileSession(TileShape sums, TileShape left, TileShape right) {
    struct {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {};
      uint8_t rows[16] = {};
    } config;
    for (int tile = 0; tile < 8; ++tile) {
      const TileShape& shape = tile < 4 ? sums : tile < 6 ? left : right;
      config.row_bytes[tile] = static_cast<uint16_t>(shape.row_bytes);
      config.rows[tile] = static_cast<uint8_t>(shape.rows);
    }
    asm volatile("ldtilecfg %0" : : "m"(config));
  }
  TileSession(const TileSession&) = delete;
  ~TileSession() { asm volatile("tilerelease" : : : "memory"); }
};

}  // namespace
}  // namespace fq::cpu
