// gemm_mma: the tiles of the hand-written GEMM and their launch. The kernel: gemm_mma.cuh.
#include "gemm.h"
#include "gemm_mma.cuh"

namespace fq::cuda {
namespace {

int32_t unit_of(const uint8_t* first_row, int64_t row_bytes) {
  const uint64_t both = reinterpret_cast<uintptr_t>(first_row) | static_cast<uint64_t>(row_bytes);
  return both % 16 == 0 ? 16 : both % 4 == 0 ? 4 : 1;
}

bool aligned(const void* pointer, int64_t bytes) {
  return reinterpret_cast<uintptr_t>(pointer) % static_cast<uint64_t>(bytes) == 0;
}

template <class Tile, class Codes>
int launch(const GemmInteger& args, void* stream) {
  constexpr int kShared = mma_shared_bytes<Tile, Codes>();
  constexpr GemmTile kTile = {Tile::kBlockM, Tile::kBlockN, kSliceBytes * Tile::kWarpsK,
                              Tile::kStages};
  static_assert(kShared == mma_shared_bytes(kTile, Codes::kA, Codes::kW), "plan_gemm.h knows");
  MmaParams params{};
  params.args = args;
  params.a_row_bytes = static_cast<int32_t>(activation_bytes(args.k, Codes::kA));
  params.w_row_bytes = static_cast<int32_t>(activation_bytes(args.k, Codes::kW));
  params.tiles_m = static_cast<int32_t>((args.m + Tile::kBlockM - 1) / Tile::kBlockM);
  params.tiles_n = static_cast<int32_t>((args.n + Tile::kBlockN - 1) / Tile::kBlockN);
  params.a_unit = unit_of(args.a, params.a_row_bytes);
  params.w_unit = unit_of(args.w, params.w_row_bytes);
  params.flip = args.a_zero ? 0x80808080u : 0u;
  params.vectors = args.n % 8 == 0 && aligned(args.out, 16) && aligned(args.residual, 16);
  const int error = allow_shared(gemm_mma_kernel<Tile, Codes>, kShared);
  if (error != 0) return error;
  const unsigned blocks = static_cast<unsigned>(params.tiles_m) * params.tiles_n;
  FQ_LAUNCH((gemm_mma_kernel<Tile, Codes>), blocks, Tile::kThreads, kShared, stream, params);
  return static_cast<int>(cudaGetLastError());
}

template <class Codes>
int launch_tile(const GemmInteger& args, const GemmTile& tile, void* stream) {
  if (tile.m == LargeTile::kBlockM) return launch<LargeTile, Codes>(args, stream);
  if (tile.m == MediumTile::kBlockM) return launch<MediumTile, Codes>(args, stream);
  return launch<SmallTile, Codes>(args, stream);
}

}  // namespace

int gemm_mma(const GemmInteger& args, int a_bits, int w_bits, const GemmPlan& plan, void* stream) {
  if (a_bits == 4) return launch_tile<MmaCodes<4, 4>>(args, plan.tile, stream);
  if (w_bits == 4) return launch_tile<MmaCodes<8, 4>>(args, plan.tile, stream);
  return launch_tile<MmaCodes<8, 8>>(args, plan.tile, stream);
}

}  // namespace fq::cuda
