// Integer matrix products; see ../../prelude.h.
#pragma once

#include "cutlass/cutlass.h"
#include "cutlass/layout/matrix.h"
#include "cutlass/numeric_types.h"
#include "emulated_ptx.h"

#define CUTLASS_ARCH_MMA_SM80_SUPPORTED 1

namespace cutlass::arch {

inline int LaneId() { return fq::emulated::lane(); }

// mma.sync m16n8k64 of 4-bit and m16n8k32 of 8-bit codes, with saturation. A register holds kPer
// codes, the first in the lowest bits. Lane l has, in register i:
//   a: row l / 4 + 8 * (i % 2), columns l % 4 * kPer + 4 * kPer * (i / 2) and on
//   b: rows l % 4 * kPer + 4 * kPer * i and on, column l / 4
//   c: row l / 4 + 8 * (i / 2), column l % 4 * 2 + i % 2
template <int kK, class A, class B>
struct Mma<gemm::GemmShape<16, 8, kK>, 32, A, layout::RowMajor, B, layout::ColumnMajor, int,
           layout::RowMajor, OpMultiplyAddSaturate> {
  using Shape = gemm::GemmShape<16, 8, kK>;
  using ElementA = A;
  using LayoutA = layout::RowMajor;
  using FragmentA = Array<A, kK / 2>;
  using ElementB = B;
  using LayoutB = layout::ColumnMajor;
  using FragmentB = Array<B, kK / 4>;
  using ElementC = int;
  using LayoutC = layout::RowMajor;
  using FragmentC = Array<int, 4>;
  using Operator = OpMultiplyAddSaturate;
  using ArchTag = arch::Sm80;

  static constexpr int kPer = kK / 8;
  static_assert(kPer * sizeof_bits<A>::value == 32 && kPer * sizeof_bits<B>::value == 32);

  template <class Code>
  static int code(uint32_t word, int j) {
    constexpr int kBits = sizeof_bits<Code>::value;
    const int raw = word >> (kBits * j) & ((1u << kBits) - 1);
    constexpr bool kSigned = std::is_same_v<Code, int4b_t> || std::is_same_v<Code, int8_t>;
    return kSigned && raw >> (kBits - 1) ? raw - (1 << kBits) : raw;
  }

  static void multiply(const fq::emulated::Fragments (&lanes)[32],
                       fq::emulated::Accumulators (&out)[32]) {
    int a[16][kK], b[8][kK];
    for (int l = 0; l < 32; ++l)
      for (int j = 0; j < kPer; ++j) {
        for (int i = 0; i < 4; ++i)
          a[l / 4 + 8 * (i % 2)][l % 4 * kPer + 4 * kPer * (i / 2) + j] = code<A>(lanes[l].a[i], j);
        for (int i = 0; i < 2; ++i)
          b[l / 4][l % 4 * kPer + 4 * kPer * i + j] = code<B>(lanes[l].b[i], j);
      }
    for (int l = 0; l < 32; ++l)
      for (int i = 0; i < 4; ++i) {
        int products = 0;
        for (int k = 0; k < kK; ++k)
          products += a[l / 4 + 8 * (i / 2)][k] * b[l % 4 * 2 + i % 2][k];
        int64_t sum = int64_t{static_cast<int32_t>(lanes[l].c[i])} + products;
        sum = sum > INT32_MAX ? INT32_MAX : sum < INT32_MIN ? INT32_MIN : sum;
        out[l].c[i] = static_cast<uint32_t>(static_cast<int32_t>(sum));
      }
  }

  void operator()(FragmentC& d, const FragmentA& a, const FragmentB& b, const FragmentC& c) const {
    fq::emulated::Fragments mine;
    std::memcpy(mine.a, &a, sizeof mine.a);
    std::memcpy(mine.b, &b, sizeof mine.b);
    std::memcpy(mine.c, &c, sizeof mine.c);
    const auto sum = fq::emulated::meet<fq::emulated::Fragments, fq::emulated::Accumulators>(
        "mma", {"", 0}, mine, multiply);
    std::memcpy(&d, sum.c, sizeof sum.c);
  }
};

}  // namespace cutlass::arch
