// The CUTLASS 2.x GEMMs of sm_80, 86 and 89: gemm_s4_cutlass_sm8x.cu and gemm_s8s4_cutlass_sm8x.cu
// choose types and tiles, this makes kernels of them.
//
// A block makes one tile of the output. CUTLASS supplies its two halves: the main loop (cp.async
// ring in shared memory, ldmatrix, mma.sync) and the way of the sums back through shared memory to
// 8 consecutive columns per thread. Between memory and both stand two things of our own, because
// CUTLASS's device layer costs more to compile than all the kernels here: the kernel (GemmSm8x),
// and the visitor that turns 8 sums into 8 outputs (ScaleVisitor). Output type, bias, residual and
// zero point are run-time values there: they cost a few uniform branches per tile, not a kernel
// each.
//
// The sums are exact. Products are added in int32; |a w| is at most 8 * 8 (s4), 15 * 8 (u4) or
// 128 * 8 (s8), times kMaxGemmK = 2^20 terms that is at most 2^30. So the saturation of
// OpMultiplyAddSaturate, the only s4 instruction CUTLASS has, never acts, and the order of
// additions does not matter. Kernels that hold 16 times the codes of `w` shift that out again
// (kShift), and are good for fewer terms.
#pragma once

#include "../ops.h"
#include "launch.cuh"
#include "plan_gemm.h"
#include "ptx.cuh"

#include "cutlass/cutlass.h"
#include "cutlass/epilogue/threadblock/default_epilogue_tensor_op.h"
#include "cutlass/epilogue/threadblock/epilogue_with_visitor_callbacks.h"
#include "cutlass/gemm/threadblock/default_mma.h"
#include "cutlass/gemm/threadblock/threadblock_swizzle.h"

namespace fq::cuda {
namespace {

using cutlass::gemm::GemmCoord;
using cutlass::gemm::GemmShape;
using cutlass::layout::ColumnMajor;
using cutlass::layout::RowMajor;

constexpr int kVector = 8;  // columns that a thread finishes and stores together

// ---- the epilogue -------------------------------------------------------------------------------

struct EpilogueParams {
  const float* a_scale;
  const int32_t* a_zero;
  const float* w_scale;
  const int32_t* w_colsum;
  const void* bias;
  const void* residual;
  void* out;
  int32_t m, n;  // of the whole output; n is a multiple of kVector
  Dtype bias_dtype, out_dtype;
};

template <Dtype kType>
__device__ __forceinline__ uint4 narrow(const float (&y)[kVector]) {
  return make_uint4(pack2<kType>(y[0], y[1]), pack2<kType>(y[2], y[3]), pack2<kType>(y[4], y[5]),
                    pack2<kType>(y[6], y[7]));
}

template <Dtype kType>
__device__ __forceinline__ void widen(const uint4& bits, float (&y)[kVector]) {
  widen2<kType>(bits.x, y[0], y[1]);
  widen2<kType>(bits.y, y[2], y[3]);
  widen2<kType>(bits.z, y[4], y[5]);
  widen2<kType>(bits.w, y[6], y[7]);
}

// y rounded to T, then residual + that, rounded again. Leaves in y what was rounded last.
template <Dtype kType>
__device__ __forceinline__ uint4 finish(float (&y)[kVector], bool add, const uint4& residual) {
  uint4 bits = narrow<kType>(y);
  if (add) {
    float before[kVector];
    widen<kType>(residual, before);
    widen<kType>(bits, y);
    CUTLASS_PRAGMA_UNROLL
    for (int j = 0; j < kVector; ++j) y[j] = before[j] + y[j];
    bits = narrow<kType>(y);
  }
  return bits;
}

// pack2's NaN is 0x7fff, contract.h's is another one.
__device__ __forceinline__ uint32_t with_nan(uint32_t pair, uint32_t nan) {
  const uint32_t low = (pair & 0xffffu) == 0x7fffu ? nan : pair & 0xffffu;
  const uint32_t high = pair >> 16 == 0x7fffu ? nan : pair >> 16;
  return low | high << 16;
}

// What EpilogueWithVisitorCallbacks calls a fusion. It offers its thread the sums of kVector
// columns of one row at a time: `steps` of the tile one after the other, in each some rows and
// columns.
template <class Block, class ThreadMap, int kShift>
class ScaleVisitor {
 public:
  using Arguments = EpilogueParams;
  using Params = EpilogueParams;

  // What the tile needs of the vectors along m and n. Read coalesced, at any alignment, once.
  struct SharedStorage {
    alignas(16) float w_scale[Block::kN];
    alignas(16) float bias[Block::kN];
    alignas(16) int32_t w_colsum[Block::kN];
    float a_scale[Block::kM];
    int32_t a_zero[Block::kM];
  };

  __device__ __forceinline__ ScaleVisitor(const Params& params, SharedStorage& shared)
      : params_(params), shared_(shared) {}

  static constexpr int kRows = ThreadMap::Iterations::kRow;        // of a thread and step
  static constexpr int kColumns = ThreadMap::Iterations::kColumn;  // in units of kVector
  static_assert(ThreadMap::Iterations::kGroup == 1 && ThreadMap::Iterations::kCluster == 1 &&
                ThreadMap::Count::kGroup == 1 && ThreadMap::Count::kCluster == 1 &&
                ThreadMap::kElementsPerAccess == kVector);

  struct Callbacks {
    const Params& params;
    SharedStorage& shared;
    int thread;
    int32_t tile_m, tile_n;  // where the tile begins
    int32_t row, column;     // where this thread begins in it
    float w_scale[kColumns][kVector], bias[kColumns][kVector];
    uint4 residual[kRows][kColumns];

    __device__ __forceinline__ int32_t row_in_tile(int step, int r) const {
      return row + step * ThreadMap::Shape::kRow + r * ThreadMap::Delta::kRow;
    }
    __device__ __forceinline__ int32_t column_in_tile(int c) const {
      return column + c * ThreadMap::Delta::kColumn;
    }
    // Of an element of out and of residual, in units of kVector. Unsigned: one multiplication.
    __device__ __forceinline__ uint64_t vector_at(int32_t m, int32_t n) const {
      return uint64_t{static_cast<uint32_t>(m)} * static_cast<uint32_t>(params.n / kVector) +
             static_cast<uint32_t>(n / kVector);
    }

    __device__ __forceinline__ void begin_epilogue() {
      for (int i = thread; i < Block::kN; i += ThreadMap::kThreads) {
        const int32_t n = tile_n + i;
        const bool inside = n < params.n;
        shared.w_scale[i] = inside ? params.w_scale[n] : 0.0f;
        // x + -0 is x, for every x.
        shared.bias[i] =
            inside && params.bias != nullptr ? load(params.bias, params.bias_dtype, n) : -0.0f;
        if (params.a_zero != nullptr) shared.w_colsum[i] = inside ? params.w_colsum[n] : 0;
      }
      for (int i = thread; i < Block::kM; i += ThreadMap::kThreads) {
        const int32_t m = tile_m + i;
        const bool inside = m < params.m;
        shared.a_scale[i] = inside ? params.a_scale[m] : 0.0f;
        if (params.a_zero != nullptr) shared.a_zero[i] = inside ? params.a_zero[m] : 0;
      }
      __syncthreads();
      CUTLASS_PRAGMA_UNROLL
      for (int c = 0; c < kColumns; ++c) {
        CUTLASS_PRAGMA_UNROLL
        for (int j = 0; j < kVector; ++j) {
          w_scale[c][j] = shared.w_scale[column_in_tile(c) + j];
          bias[c][j] = shared.bias[column_in_tile(c) + j];
        }
      }
    }

    // The sums of this step are still on their way: time to fetch the residual.
    __device__ __forceinline__ void begin_step(int step) {
      if (params.residual == nullptr) return;
      CUTLASS_PRAGMA_UNROLL
      for (int r = 0; r < kRows; ++r) {
        CUTLASS_PRAGMA_UNROLL
        for (int c = 0; c < kColumns; ++c) {
          const int32_t m = tile_m + row_in_tile(step, r), n = tile_n + column_in_tile(c);
          if (m < params.m && n < params.n)
            residual[r][c] = static_cast<const uint4*>(params.residual)[vector_at(m, n)];
        }
      }
    }

    __device__ __forceinline__ void visit(int step, int r, int c, int /*access*/,
                                          const cutlass::Array<int32_t, kVector>& sums) {
      const int32_t m = tile_m + row_in_tile(step, r), n = tile_n + column_in_tile(c);
      if (m >= params.m || n >= params.n) return;
      int32_t sum[kVector];
      CUTLASS_PRAGMA_UNROLL
      for (int j = 0; j < kVector; ++j) sum[j] = sums[j] >> kShift;
      if (params.a_zero != nullptr) {
        const uint32_t zero = static_cast<uint32_t>(shared.a_zero[row_in_tile(step, r)]);
        CUTLASS_PRAGMA_UNROLL
        for (int j = 0; j < kVector; ++j)
          sum[j] = static_cast<int32_t>(
              static_cast<uint32_t>(sum[j]) -
              zero * static_cast<uint32_t>(shared.w_colsum[column_in_tile(c) + j]));
      }
      const float a_scale = shared.a_scale[row_in_tile(step, r)];
      float y[kVector];
      CUTLASS_PRAGMA_UNROLL
      for (int j = 0; j < kVector; ++j) y[j] = scaled(sum[j], a_scale, w_scale[c][j]) + bias[c][j];

      const bool bf16 = params.out_dtype == Dtype::kBFloat16;
      const bool add = params.residual != nullptr;
      uint4 bits = bf16 ? finish<Dtype::kBFloat16>(y, add, residual[r][c])
                        : finish<Dtype::kFloat16>(y, add, residual[r][c]);
      bool has_nan = false;
      CUTLASS_PRAGMA_UNROLL
      for (int j = 0; j < kVector; ++j) has_nan |= y[j] != y[j];
      if (has_nan) {
        const uint32_t nan =
            bf16 ? float_to_bf16(quiet_nan()) : uint32_t{float_to_fp16(quiet_nan())};
        bits = make_uint4(with_nan(bits.x, nan), with_nan(bits.y, nan), with_nan(bits.z, nan),
                          with_nan(bits.w, nan));
      }
      static_cast<uint4*>(params.out)[vector_at(m, n)] = bits;
    }

    __device__ __forceinline__ void begin_row(int) {}
    __device__ __forceinline__ void end_row(int) {}
    __device__ __forceinline__ void end_step(int) {}
    __device__ __forceinline__ void end_epilogue() {}
  };

  // `tile`: where it begins, in elements. The problem's shape is in the parameters.
  template <class Unused>
  __device__ __forceinline__ Callbacks get_callbacks(GemmCoord tile, int thread, Unused) {
    const cutlass::MatrixCoord start = ThreadMap::initial_offset(thread);
    return {params_, shared_, thread, tile.m(), tile.n(), start.row(), start.column(), {}, {}, {}};
  }

 private:
  const Params& params_;
  SharedStorage& shared_;
};

// ---- the kernel ---------------------------------------------------------------------------------

constexpr int64_t kMostRows = (int64_t{1} << 31) - 1024;  // of `a` and `w`: CUTLASS counts in int32

// Mma: a CUTLASS threadblock main loop, row-major `a` times column-major `w` into int32. Its sums
// are 2^kShift times what they should be, and good for kMostK terms.
template <class Mma_, int kShift, int64_t kMostK_>
struct GemmSm8x {
  using Mma = Mma_;
  using Block = typename Mma::Shape;
  using Warps = typename Mma::WarpCount;
  static constexpr int kThreads = kWarp * Warps::kCount;
  static constexpr int64_t kMostK = kMostK_;
  // Any 16-bit type: it only decides how the sums go through shared memory.
  using DefaultEpilogue = typename cutlass::epilogue::threadblock::DefaultEpilogueTensorOp<
      Block, typename Mma::Operator, Warps::kK,
      cutlass::epilogue::thread::LinearCombination<cutlass::half_t, kVector, int32_t, float>,
      kVector>::Epilogue;
  using Epilogue = cutlass::epilogue::threadblock::EpilogueWithVisitorCallbacks<
      DefaultEpilogue,
      ScaleVisitor<Block, typename DefaultEpilogue::OutputTileIterator::ThreadMap, kShift>, 1>;
  // Blocks that run together share rows of `a` and of `w` in the L2 cache.
  using Swizzle = cutlass::gemm::threadblock::GemmIdentityThreadblockSwizzle<8>;

  union Shared {
    typename Mma::SharedStorage main;
    typename Epilogue::SharedStorage epilogue;
  };

  struct Params {
    typename Mma::IteratorA::Params a_layout;
    typename Mma::IteratorB::Params w_layout;
    const uint8_t* a;
    const uint8_t* w;
    int32_t k, log_tile;
    EpilogueParams epilogue;
  };

  static __device__ __forceinline__ void run(const Params& params, Shared& shared) {
    const GemmCoord tile = Swizzle::get_tile_offset(params.log_tile);
    const int32_t m = tile.m() * Block::kM, n = tile.n() * Block::kN;
    if (m >= params.epilogue.m || n >= params.epilogue.n) return;  // the grid is rounded up
    const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarp;
    const int warp = __shfl_sync(kAllLanes, thread / kWarp, 0);  // to the compiler: uniform

    using A = typename Mma::IteratorA::Element;
    using W = typename Mma::IteratorB::Element;
    typename Mma::IteratorA a(params.a_layout, reinterpret_cast<A*>(const_cast<uint8_t*>(params.a)),
                              {params.epilogue.m, params.k}, thread, {m, 0});
    typename Mma::IteratorB w(params.w_layout, reinterpret_cast<W*>(const_cast<uint8_t*>(params.w)),
                              {params.k, params.epilogue.n}, thread, {0, n});
    typename Mma::FragmentC sums;
    sums.clear();
    Mma mma(shared.main, thread, warp, lane);
    mma((params.k + Block::kK - 1) / Block::kK, sums, a, w, sums);

    Epilogue epilogue(params.epilogue, shared.epilogue, thread, warp, lane);
    epilogue(sums, GemmCoord(m, n, 0), 0, thread);
  }
};

template <class Gemm>
__global__ void __launch_bounds__(Gemm::kThreads)
    gemm_kernel(const __grid_constant__ typename Gemm::Params params) {
  FQ_DYNAMIC_SHARED(typename Gemm::Shared, shared);
  Gemm::run(params, *shared);
}

template <class Gemm>
int launch(const GemmInteger& args, void* stream) {
  using Block = typename Gemm::Block;
  using Swizzle = typename Gemm::Swizzle;
  if (args.k > Gemm::kMostK || args.m > kMostRows || args.n > kMostRows)
    return cudaErrorNotSupported;
  const int32_t m = static_cast<int32_t>(args.m), n = static_cast<int32_t>(args.n);
  const int32_t k = static_cast<int32_t>(args.k);
  const GemmCoord tiles = Swizzle::get_tiled_shape({m, n, k}, {Block::kM, Block::kN, Block::kK}, 1);
  const dim3 grid = Swizzle::get_grid_shape(tiles);
  const int error = allow_shared(gemm_kernel<Gemm>, sizeof(typename Gemm::Shared));
  if (error != cudaSuccess) return error;
  const typename Gemm::Params params{
      RowMajor(args.k),
      ColumnMajor(args.k),
      args.a,
      args.w,
      k,
      Swizzle::get_log_tile(tiles),
      {args.a_scale, args.a_zero, args.w_scale, args.w_colsum, args.bias, args.residual, args.out,
       m, n, args.bias_dtype, args.out_dtype}};
  FQ_LAUNCH(gemm_kernel<Gemm>, grid, Gemm::kThreads, sizeof(typename Gemm::Shared), stream, params);
  return static_cast<int>(cudaGetLastError());
}

// What plan_gemm.h says about a tile of these files.
constexpr int32_t planned_shared_bytes(GemmKernel kernel, GemmTile tile) {
  for (const GemmTileEntry& entry : kGemmTiles)
    if (entry.kernel == kernel && entry.tile.m == tile.m && entry.tile.n == tile.n &&
        entry.tile.k == tile.k && entry.tile.stages == tile.stages)
      return entry.shared_bytes;
  return 0;
}

// Launches Tile::Gemm for the first of Tiles that is `tile`.
template <GemmKernel kKernel>
int launch_tile(const GemmInteger&, const GemmTile&, void*) {
  return cudaErrorNotSupported;
}

template <GemmKernel kKernel, class Tile, class... Others>
int launch_tile(const GemmInteger& args, const GemmTile& tile, void* stream) {
  constexpr GemmTile kTile = Tile::kTile;
  static_assert(sizeof(typename Tile::Gemm::Shared) == planned_shared_bytes(kKernel, kTile),
                "plan_gemm.h: no such tile, or its shared memory is another");
  if (tile.m == kTile.m && tile.n == kTile.n && tile.k == kTile.k && tile.stages == kTile.stages)
    return launch<typename Tile::Gemm>(args, stream);
  return launch_tile<kKernel, Others...>(args, tile, stream);
}

}  // namespace
}  // namespace fq::cuda
