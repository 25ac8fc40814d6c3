// gemm_s8s4_sm8x: 8-bit activations times 4-bit weights on the s8 tensor cores of sm_80, 86 and 89
// (mma.sync m16n8k32), by CUTLASS 2.x. How: cutlass_sm8x.cuh.
//
// Weights stay nibbles in memory and in shared memory, and become bytes in registers, between
// ldmatrix and mma. CUTLASS has an operator for such mixed inputs; WidenWeights takes everything
// from it but that last step.
#include "cutlass_sm8x.cuh"
#include "gemm.h"

#include "cutlass/gemm/warp/mma_mixed_input_tensor_op.h"

namespace fq::cuda {
namespace {

// What a lane wants: for column g = lane / 4 of every 8-column product, codes 4t .. 4t + 3 and
// 16 + 4t .. 16 + 4t + 3 of 32, t = lane % 4. What ldmatrix gave it, meant for nibbles: codes
// 8t .. 8t + 7, in one word. So its two halves are the low halves (t even) or the high halves (t
// odd) of the words of lanes t / 2 and 2 + t / 2 of its four.
//
// Two products at a time, so that every shuffle carries 32 useful bits: two shuffles, in the first
// of which lane t reads lane 0, 2, 1, 3 and in the second lane 2, 0, 3, 1. Then each of the four
// lanes is read by one that wants low halves in one shuffle and by one that wants high halves in
// the other.
//
// Bytes are 16 times the code: the nibble in the upper half, sign included, for three operations
// per 8 codes. The epilogue shifts that out.
template <class MixedInput>
class WidenWeights : public MixedInput {
 public:
  using typename MixedInput::FragmentA;
  using typename MixedInput::FragmentB;
  using typename MixedInput::TransformedFragmentA;
  using typename MixedInput::TransformedFragmentB;
  static constexpr int kProducts = FragmentB::kElements / 8;
  static_assert(kProducts % 2 == 0 && FragmentB::kElements % 8 == 0 &&
                sizeof(FragmentB) == 4 * kProducts &&
                sizeof(TransformedFragmentB) == 8 * kProducts);

  __device__ __forceinline__ void transform(TransformedFragmentA& a_out,
                                            TransformedFragmentB& w_out, const FragmentA& a,
                                            const FragmentB& w) const {
    a_out = a;
    const uint32_t* const words = reinterpret_cast<const uint32_t*>(&w);
    uint32_t* const bytes = reinterpret_cast<uint32_t*>(&w_out);
    const unsigned t = threadIdx.x % 4;
    const bool odd = t % 2 != 0;
    const int first_lane = static_cast<int>(t / 2 + t % 2 * 2), second_lane = first_lane ^ 2;
    const unsigned low = 0x5410, high = 0x7632;  // for __byte_perm: halves of both words
    const unsigned first_halves = t < 2 ? low : high, second_halves = t < 2 ? high : low;
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < kProducts; i += 2) {
      const uint32_t x =
          __shfl_sync(kAllLanes, __byte_perm(words[i], words[i + 1], first_halves), first_lane, 4);
      const uint32_t y = __shfl_sync(kAllLanes, __byte_perm(words[i], words[i + 1], second_halves),
                                     second_lane, 4);
      const uint32_t lower = odd ? y : x, upper = odd ? x : y;  // codes 4t.., codes 16 + 4t..
      widen_halves(lower, bytes[2 * i], bytes[2 * i + 2]);
      widen_halves(upper, bytes[2 * i + 1], bytes[2 * i + 3]);
    }
  }

 private:
  // Four codes of one product and four of the next -> four bytes each.
  static __device__ __forceinline__ void widen_halves(uint32_t codes, uint32_t& first,
                                                      uint32_t& second) {
    const uint32_t even = (codes << 4) & 0xf0f0f0f0u, odd = codes & 0xf0f0f0f0u;
    first = __byte_perm(even, odd, 0x5140);
    second = __byte_perm(even, odd, 0x7362);
  }
};

template <class Block, class Warp, int kStages>
struct S8S4Tile {
  static constexpr GemmTile kTile = {Block::kM, Block::kN, Block::kK, kStages};
  using Plain =
      cutlass::gemm::threadblock::DefaultMma<int8_t, RowMajor, 16, cutlass::int4b_t, ColumnMajor,
                                             32, int32_t, RowMajor, cutlass::arch::OpClassTensorOp,
                                             cutlass::arch::Sm80, Block, Warp, GemmShape<16, 8, 32>,
                                             kStages, cutlass::arch::OpMultiplyAddMixedInputUpcast>;
  using Core = typename Plain::MmaCore;
  using Policy = cutlass::gemm::threadblock::MmaPolicy<
      WidenWeights<typename Core::MmaPolicy::Operator>, typename Core::MmaPolicy::SmemPaddingA,
      typename Core::MmaPolicy::SmemPaddingB, Core::MmaPolicy::kPartitionsK>;
  using Mma = cutlass::gemm::threadblock::MmaMultistage<
      Block, typename Plain::IteratorA, typename Core::SmemIteratorA, Core::kCacheOpA,
      typename Plain::IteratorB, typename Core::SmemIteratorB, Core::kCacheOpB, int32_t, RowMajor,
      Policy, kStages>;
  using Gemm = GemmSm8x<Mma, 4, kMostScaledK>;
};

}  // namespace

int gemm_s8s4_sm8x(const GemmInteger& args, const GemmTile& tile, void* stream) {
  if (args.a_zero != nullptr) return cudaErrorNotSupported;  // `a` would be uint8
  return launch_tile<GemmKernel::kS8S4Sm8x,
                     S8S4Tile<GemmShape<128, 256, 64>, GemmShape<64, 64, 64>, 4>,
                     S8S4Tile<GemmShape<128, 128, 64>, GemmShape<64, 64, 64>, 4>,
                     S8S4Tile<GemmShape<64, 128, 64>, GemmShape<32, 64, 64>, 6>,
                     S8S4Tile<GemmShape<64, 64, 128>, GemmShape<32, 32, 128>, 4>,
                     S8S4Tile<GemmShape<16, 64, 128>, GemmShape<16, 64, 64>, 6>>(args, tile,
                                                                                 stream);
}

}  // namespace fq::cuda
