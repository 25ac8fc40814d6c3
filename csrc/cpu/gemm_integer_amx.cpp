// The integer GEMMs for AMX: a tile is 16 rows of 64 bytes, and tdpbsud multiplies one of rows by
// one of the panel, 16 x 16 sums of 64 products each. Panels and epilogue are AVX-512's.
#include "gemm_integer_avx512.h"
#include "tiles_amx.h"

namespace fq::cpu {
namespace {

struct Amx : Vnni {
  // 64 KB, in the L2 cache: sums that stay in their tiles for long save more than the L1 cache
  // does.
  static constexpr int64_t kPanelSteps = 32;

  // Tiles 0..3 are sums: rows 0..15 and 16..31 x columns 0..15 and 16..31; 4 and 5 are rows, 6 and
  // 7 columns.
  template <int kWeightBits, class Aside>
  static void multiply_block(const Block& block, Aside& aside) {
    int32_t* const totals = static_cast<int32_t*>(block.totals);
    const uint8_t *a = block.rows, *w = block.panel;
    const bool whole = block.count > kHalf;
    constexpr int64_t kStride = kTileColumns * 4;
    int32_t* const below = totals + kHalf * kTileColumns;
    if (block.first > 0) {
      load_tile<0>(totals, kStride);
      load_tile<1>(totals + kHalf, kStride);
      load_tile<2>(below, kStride);
      load_tile<3>(below + kHalf, kStride);
    } else {
      clear_tile<0>();
      clear_tile<1>();
      clear_tile<2>();
      clear_tile<3>();
    }
    for (int64_t s = 0; s < block.steps; ++s, a += block.row_step, w += kPanelStep) {
      load_tile<4>(a, kRowStep);
      load_tile<6>(w, kQuadBytes);
      load_tile<7>(w + kHalfBytes, kQuadBytes);
      multiply_bytes<0, 4, 6>();
      multiply_bytes<1, 4, 7>();
      if (whole) {
        load_tile<5>(a + kHalf * kRowStep, kRowStep);
        multiply_bytes<2, 5, 6>();
        multiply_bytes<3, 5, 7>();
      }
      aside.step();
    }
    store_tile<0>(totals, kStride);
    store_tile<1>(totals + kHalf, kStride);
    if (whole) {
      store_tile<2>(below, kStride);
      store_tile<3>(below + kHalf, kStride);
    }
  }
};

template <int kActivationBits, int kWeightBits>
void gemm(const GemmInteger& args, int64_t begin, int64_t end) {
  const TileShape rows{args.m < kHalf ? args.m : kHalf, kRowStep};
  const TileSession session(rows, rows, {kHalf, kQuadBytes});
  gemm_simd<Amx, kActivationBits, kWeightBits>(args, begin, end);
}

bool few(const GemmInteger& args) { return args.m <= Amx::kFewRows; }

}  // namespace

void gemm_w4a4_amx(const GemmInteger& args, int64_t begin, int64_t end) {
  (few(args) ? gemm_w4a4_avx512 : gemm<4, 4>)(args, begin, end);
}

void gemm_w4a8_amx(const GemmInteger& args, int64_t begin, int64_t end) {
  (few(args) ? gemm_w4a8_avx512 : gemm<8, 4>)(args, begin, end);
}

void gemm_w8a8_amx(const GemmInteger& args, int64_t begin, int64_t end) {
  (few(args) ? gemm_w8a8_avx512 : gemm<8, 8>)(args, begin, end);
}

}  // namespace fq::cpu
