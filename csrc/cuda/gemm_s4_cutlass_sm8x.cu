// gemm_s4_sm8x: 4-bit activations times 4-bit weights on the s4 tensor cores of sm_80, 86 and 89
// (mma.sync m16n8k64), by CUTLASS 2.x. How: cutlass_sm8x.cuh.
//
// Activations with a zero point are unsigned nibbles; they have kernels of their own, which differ
// in one bit of the instruction.
//
// No other architecture has s4 tensor cores: there the same source compiles into a slow emulation.
// FQ_TEST_S4_EVERYWHERE allows that, for checking results on what GPU there is. Never ship it.
#include "cutlass_sm8x.cuh"
#include "gemm.h"

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900 && !defined(FQ_TEST_S4_EVERYWHERE)
#error "sm_90 and later have no s4 tensor cores"
#endif

namespace fq::cuda {
namespace {

template <class A, class Block, class Warp, int kStages>
struct S4Tile {
  static constexpr GemmTile kTile = {Block::kM, Block::kN, Block::kK, kStages};
  using Mma = typename cutlass::gemm::threadblock::DefaultMma<
      A, RowMajor, 32, cutlass::int4b_t, ColumnMajor, 32, int32_t, RowMajor,
      cutlass::arch::OpClassTensorOp, cutlass::arch::Sm80, Block, Warp, GemmShape<16, 8, 64>,
      kStages, cutlass::arch::OpMultiplyAddSaturate>::ThreadblockMma;
  using Gemm = GemmSm8x<Mma, 0, kMaxGemmK>;
};

template <class A>
int launch_s4(const GemmInteger& args, const GemmTile& tile, void* stream) {
  return launch_tile<GemmKernel::kS4Sm8x,
                     S4Tile<A, GemmShape<128, 256, 128>, GemmShape<64, 64, 128>, 3>,
                     S4Tile<A, GemmShape<128, 128, 128>, GemmShape<64, 64, 128>, 3>,
                     S4Tile<A, GemmShape<64, 128, 128>, GemmShape<32, 64, 128>, 4>,
                     S4Tile<A, GemmShape<64, 64, 256>, GemmShape<32, 32, 256>, 4>,
                     S4Tile<A, GemmShape<16, 64, 256>, GemmShape<16, 64, 128>, 4>>(args, tile,
                                                                                   stream);
}

}  // namespace

int gemm_s4_sm8x(const GemmInteger& args, const GemmTile& tile, void* stream) {
  return args.a_zero != nullptr ? launch_s4<cutlass::uint4b_t>(args, tile, stream)
                                : launch_s4<cutlass::int4b_t>(args, tile, stream);
}

}  // namespace fq::cuda
