// Which GEMM kernel and tile: a pure function of the problem and the GPU, tested without either.
// Pure C++, no CUDA header.
//
// The model. A tile is m x n outputs; a kernel's tile costs an SM the larger of
//
//   m n k / (products a clock * efficiency)       its products
//   (m a_bytes + n w_bytes) k / kL2Bytes          its operands, from the L2 cache
//
// clocks, and the busiest SM makes ceil(blocks / SMs) of them. A block cannot be faster than its
// chain of slices, each of which waits for memory, but several live on an SM at once:
//
//   ceil(blocks / (SMs * resident)) * slices * kSlice / (stages - 1), and a start for each after
//   one
//
// Nothing is faster than the memory: the weights at the rate at which the blocks ask for them
// (plan_stream.h), activations and the output once. The estimate is the start and the memory's
// first answer, the largest of the three and a tenth of the others; the smallest wins, the first on
// a tie. Clocks and rates are nominal: only ratios between kernels matter, and no answer depends on
// the choice. The kernel that streams weights past few tokens has a model of its own:
// plan_stream.h.
#pragma once

#include <cstdint>

#include "../contract.h"
#include "gpu.h"
#include "plan_stream.h"

namespace fq::cuda {

enum class GemmKernel : int32_t {
  kNone,
  kMma,
  kS4Sm8x,
  kS8S4Sm8x,
  kMixedSm90,
  kBytesSm90,
  kStream
};

// tokens x output features x k codes, and slices of k in flight.
struct GemmTile {
  int32_t m, n, k, stages;
};

struct GemmTileEntry {
  GemmKernel kernel;
  GemmTile tile;
  int32_t shared_bytes;  // of one block, dynamic and static: the kernels' files assert it
  int32_t resident;      // blocks that registers allow on an SM
  float efficiency;      // in products, of what its instruction can do: an estimate
};

// Exactly the tiles that are compiled. kMma: k counts bytes of a row of `a`, 64 per group of warps
// that splits k, and shared_bytes is mma_shared_bytes.
constexpr GemmTileEntry kGemmTiles[] = {
    {GemmKernel::kS4Sm8x, {128, 256, 128, 3}, 73728, 1, 0.80f},
    {GemmKernel::kS4Sm8x, {128, 128, 128, 3}, 49152, 2, 0.70f},
    {GemmKernel::kS4Sm8x, {64, 128, 128, 4}, 49152, 3, 0.55f},
    {GemmKernel::kS4Sm8x, {64, 64, 256, 4}, 65536, 4, 0.45f},
    {GemmKernel::kS4Sm8x, {16, 64, 256, 4}, 40960, 4, 0.20f},
    {GemmKernel::kS8S4Sm8x, {128, 256, 64, 4}, 65536, 1, 0.70f},
    {GemmKernel::kS8S4Sm8x, {128, 128, 64, 4}, 49152, 2, 0.65f},
    {GemmKernel::kS8S4Sm8x, {64, 128, 64, 6}, 49152, 3, 0.50f},
    {GemmKernel::kS8S4Sm8x, {64, 64, 128, 4}, 49152, 4, 0.40f},
    {GemmKernel::kS8S4Sm8x, {16, 64, 128, 6}, 36864, 4, 0.20f},
    {GemmKernel::kMixedSm90, {256, 128, 128, 4}, 200704, 1, 0.65f},
    {GemmKernel::kMixedSm90, {128, 128, 128, 6}, 184320, 1, 0.60f},
    {GemmKernel::kMixedSm90, {64, 64, 256, 4}, 100352, 2, 0.35f},
    {GemmKernel::kMixedSm90, {16, 64, 256, 6}, 75776, 3, 0.12f},
    {GemmKernel::kBytesSm90, {256, 128, 128, 4}, 232448, 1, 0.75f},
    {GemmKernel::kBytesSm90, {128, 128, 128, 6}, 232448, 1, 0.65f},
    {GemmKernel::kMma, {128, 128, 64, 3}, 49152, 2, 0.65f},
    {GemmKernel::kMma, {64, 64, 128, 3}, 49152, 3, 0.50f},
    {GemmKernel::kMma, {16, 32, 512, 3}, 73728, 2, 0.25f},
};

// Of kMma: the ring of slices, or the sums of all groups, 32 columns of a warp at a time.
constexpr int32_t mma_shared_bytes(const GemmTile& tile, int32_t a_bits, int32_t w_bits) {
  const int32_t ring = tile.stages * tile.k * (tile.m + (a_bits > w_bits ? tile.n / 2 : tile.n));
  const int32_t sums = tile.k / 64 * tile.m * tile.n * 4 / (tile.n > 64 ? 2 : 1);
  return ring > sums ? ring : sums;
}

struct GemmQuery {
  int64_t m, n, k;
  int32_t a_bits, w_bits;  // 4 or 8: how the codes lie, nibbles or bytes
  bool zero, residual;     // a_zero, residual are given
  Dtype out;
  bool aligned;  // a, w, out and residual to 16 bytes
};

struct GemmPlan {
  GemmKernel kernel;
  GemmTile tile;
  bool widen;  // 4-bit activation codes become bytes in the workspace first
  int32_t shared_bytes;
  int64_t blocks;
  double clocks;      // the estimate
  StreamPlan stream;  // of kStream
};

// The factors 16 of widened nibbles must fit: 16 * 8 * 128 k and 16 * 16 * 64 k below 2^31.
constexpr int64_t kMostScaledK = (1 << 17) - 1;

// Whether a kernel takes unsigned activation codes and subtracts a_zero * w_colsum.
constexpr bool takes_zero(GemmKernel kernel) {
  return kernel == GemmKernel::kMma || kernel == GemmKernel::kS4Sm8x;
}

constexpr bool has_s4(int32_t arch) { return arch == 80 || arch == 86 || arch == 89; }

// Whether this GPU and this tile can do that.
constexpr bool gemm_runs(const Gpu& gpu, const GemmQuery& query, const GemmTileEntry& entry,
                         bool have_cutlass) {
  if (entry.shared_bytes > gpu.shared_per_block) return false;
  const bool nibbles = query.a_bits == 4 || query.w_bits == 4;
  if (entry.kernel == GemmKernel::kMma)
    return gpu.arch >= 80 && (entry.tile.m <= 16 || !nibbles || query.k <= kMostScaledK);
  if (!have_cutlass || !query.aligned || (query.zero && !takes_zero(entry.kernel)) ||
      query.out == Dtype::kFloat32 || query.n % 8 != 0 || query.k % 32 != 0)
    return false;
  switch (entry.kernel) {
    case GemmKernel::kS4Sm8x:
      return has_s4(gpu.arch) && query.a_bits == 4 && query.w_bits == 4;
    case GemmKernel::kS8S4Sm8x:
      return has_s4(gpu.arch) && query.a_bits == 8 && query.w_bits == 4 && query.k <= kMostScaledK;
    case GemmKernel::kMixedSm90:
      return gpu.arch == 90 && query.w_bits == 4 && query.k <= kMostScaledK;
    case GemmKernel::kBytesSm90:
      return gpu.arch == 90 && query.a_bits == 8 && query.w_bits == 8;
    default:
      return false;
  }
}

// Products of one clock on one SM, of the instruction that the kernel uses.
constexpr double products_per_clock(int32_t arch, GemmKernel kernel) {
  const double bytes = arch == 80 || arch == 100 ? 2048 : arch == 90 ? 2560 : 1024;
  if (kernel == GemmKernel::kS4Sm8x) return 2 * bytes;
  if (kernel == GemmKernel::kMixedSm90 || kernel == GemmKernel::kBytesSm90) return 4096;
  return bytes;
}

// In clocks; see the top of this file.
constexpr double gemm_clocks(const Gpu& gpu, const GemmQuery& query, const GemmTileEntry& entry) {
  constexpr double kSlice = 800, kWiden = 3000;
  const GemmTile& tile = entry.tile;
  const bool widen = entry.kernel == GemmKernel::kMixedSm90 && query.a_bits == 4;
  const double k = static_cast<double>(query.k), m = static_cast<double>(query.m);
  const double n = static_cast<double>(query.n);
  const double a_row = k * (widen ? 8 : query.a_bits) / 8, w_row = k * query.w_bits / 8;

  const double rows = query.m < tile.m ? m : tile.m, columns = query.n < tile.n ? n : tile.n;
  const double products =
      k * tile.m * tile.n / (products_per_clock(gpu.arch, entry.kernel) * entry.efficiency);
  const double operands = (rows * a_row + columns * w_row) / kL2Bytes;
  const double slices =
      entry.kernel == GemmKernel::kMma ? k * query.a_bits / 8 / tile.k : k / tile.k;
  const double chain = slices * kSlice / (tile.stages - 1);

  const int64_t column_tiles = ceil_div(query.n, tile.n);
  const int64_t blocks = ceil_div(query.m, tile.m) * column_tiles;
  const int64_t sms = gpu.sms > 0 ? gpu.sms : 1;
  const int64_t fit = gpu.shared_per_sm / (entry.shared_bytes + 1024);
  const int64_t resident = fit < 1 ? 1 : fit < entry.resident ? fit : entry.resident;
  const int64_t waves = ceil_div(blocks, sms * resident);
  const double busy =
      static_cast<double>(ceil_div(blocks, sms)) * (products > operands ? products : operands);
  const double waiting =
      static_cast<double>(waves) * chain + static_cast<double>(waves - 1) * kStart;

  const double ahead = slices < tile.stages - 1 ? 1 : (tile.stages - 1) / slices;  // of the row
  const double memory =
      weights_clocks(gpu, column_tiles, sms * resident, columns * w_row, columns * w_row * ahead,
                     kTiledShare) +
      (m * a_row + m * n * (query.out == Dtype::kFloat32 ? 4 : 2)) / bytes_per_clock(gpu);
  return total_clocks(gpu, memory, busy, waiting) +
         (widen ? kWiden + 1.5 * m * k / bytes_per_clock(gpu) : 0);
}

// Few tokens: whether weights can be streamed. Rows of w and of a in pieces of 16 bytes.
constexpr bool stream_runs(const Gpu& gpu, const GemmQuery& query) {
  const bool nibbles = query.a_bits == 4 || query.w_bits == 4;
  return gpu.arch >= 80 && query.aligned && query.k * query.a_bits % 128 == 0 &&
         query.k * query.w_bits % 128 == 0 && !(nibbles && query.k > kMostScaledK);
}

// kernel is kNone where nothing runs.
constexpr GemmPlan plan_gemm(const Gpu& gpu, const GemmQuery& query, bool have_cutlass) {
  const GemmTileEntry* best = nullptr;
  double least = 0;
  for (const GemmTileEntry& entry : kGemmTiles) {
    if (!gemm_runs(gpu, query, entry, have_cutlass)) continue;
    const double clocks = gemm_clocks(gpu, query, entry);
    if (best != nullptr && clocks >= least) continue;
    best = &entry;
    least = clocks;
  }
  if (stream_runs(gpu, query)) {
    const StreamPlan stream =
        plan_stream(gpu, query.m, query.n, query.k, query.a_bits, query.w_bits);
    if (stream.shared_bytes > 0 && (best == nullptr || stream.clocks < least))
      return {GemmKernel::kStream,
              {stream.tokens, stream.rows, kStreamRow * stream.warps, stream.stages},
              false,
              stream.shared_bytes,
              stream.blocks,
              stream.clocks,
              stream};
  }
  if (best == nullptr) return {GemmKernel::kNone, {0, 0, 0, 0}, false, 0, 0, -1, {}};
  return {best->kernel,
          best->tile,
          best->kernel == GemmKernel::kMixedSm90 && query.a_bits == 4,
          best->kernel == GemmKernel::kMma
              ? mma_shared_bytes(best->tile, query.a_bits, query.w_bits)
              : best->shared_bytes,
          ceil_div(query.m, best->tile.m) * ceil_div(query.n, best->tile.n),
          least,
          {}};
}

}  // namespace fq::cuda
