// The matrix products of emulated_ptx.h, for a whole warp at once.
#include "emulated_ptx.h"

namespace fq::emulated {
namespace {

constexpr int kM = 16, kN = 8;

// Where the fragments lie (ptx.cuh): with kPer numbers a register, number j of register i.
// a: row, column of lane l: l / 4 + 8 * (i % 2), l % 4 * kPer + j + 4 * kPer * (i / 2)
// b: row, column: l % 4 * kPer + j + 4 * kPer * i, l / 4
// c: row, column: l / 4 + 8 * (i / 2), l % 4 * 2 + i % 2
template <int kPer, class Number, class Sum, class WidenA, class WidenB>
void multiply_as(const Fragments (&lanes)[kLanes], Accumulators (&out)[kLanes], WidenA widen_a,
                 WidenB widen_b) {
  constexpr int kK = 8 * kPer;
  Number a[kM][kK], b[kK][kN];
  Sum c[kM][kN];
  for (int l = 0; l < kLanes; ++l) {
    for (int i = 0; i < 4; ++i) {
      for (int j = 0; j < kPer; ++j)
        a[l / 4 + 8 * (i % 2)][l % 4 * kPer + j + 4 * kPer * (i / 2)] =
            widen_a(lanes[l].a[i] >> (32 / kPer * j));
      std::memcpy(&c[l / 4 + 8 * (i / 2)][l % 4 * 2 + i % 2], &lanes[l].c[i], sizeof(Sum));
    }
    for (int i = 0; i < 2; ++i)
      for (int j = 0; j < kPer; ++j)
        b[l % 4 * kPer + j + 4 * kPer * i][l / 4] = widen_b(lanes[l].b[i] >> (32 / kPer * j));
  }
  for (int row = 0; row < kM; ++row)
    for (int k = 0; k < kK; ++k)
      for (int column = 0; column < kN; ++column) c[row][column] += a[row][k] * b[k][column];
  for (int l = 0; l < kLanes; ++l)
    for (int i = 0; i < 4; ++i)
      std::memcpy(&out[l].c[i], &c[l / 4 + 8 * (i / 2)][l % 4 * 2 + i % 2], sizeof(Sum));
}

}  // namespace

void multiply(MmaType type, const Fragments (&lanes)[kLanes], Accumulators (&out)[kLanes]) {
  const auto bf16 = [](uint32_t x) { return bf16_to_float(static_cast<uint16_t>(x)); };
  const auto fp16 = [](uint32_t x) { return fp16_to_float(static_cast<uint16_t>(x)); };
  const auto s8 = [](uint32_t x) -> uint32_t { return static_cast<int8_t>(x); };
  const auto u8 = [](uint32_t x) -> uint32_t { return static_cast<uint8_t>(x); };
  switch (type) {  // integers unsigned: they wrap
    case MmaType::kBFloat16:
      return multiply_as<2, float, float>(lanes, out, bf16, bf16);
    case MmaType::kFloat16:
      return multiply_as<2, float, float>(lanes, out, fp16, fp16);
    case MmaType::kS8:
      return multiply_as<4, uint32_t, uint32_t>(lanes, out, s8, s8);
    case MmaType::kU8S8:
      return multiply_as<4, uint32_t, uint32_t>(lanes, out, u8, s8);
  }
}

}  // namespace fq::emulated
