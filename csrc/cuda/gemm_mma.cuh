// The hand-written integer GEMM: s8 tensor cores (mma.sync m16n8k32), exact int32 sums, for every
// shape, type and alignment, on every architecture from sm_80 on. gemm_mma.cu lists its tiles.
//
// A block makes a tile of the output. Its warps form kWarpsK groups; group i takes the slices
// i, i + kWarpsK, ... of k, so that a small tile keeps many loads in flight. Within a group, warps
// share a ring of kStages slices in shared memory, filled by cp.async. A slice is 64 bytes of every
// row of `a`: 128 codes if they are nibbles, 64 if they are bytes.
#pragma once

#include "../ops.h"
#include "gemm_mma_slice.cuh"
#include "gemm_mma_store.cuh"
#include "launch.cuh"
#include "ptx.cuh"

namespace fq::cuda {

// ---- the kernel --------------------------------------------------------------------------------

// Blocks that run at the same time should share rows of both operands: they walk down 8 tiles of
// rows before they move on to the next columns.
static __device__ __forceinline__ void tile_of(int block, int tiles_m, int tiles_n, int* m,
                                               int* n) {
  constexpr int kBand = 8;
  const int band = block / (kBand * tiles_n), within = block % (kBand * tiles_n);
  const int rows = tiles_m - band * kBand < kBand ? tiles_m - band * kBand : kBand;
  *m = band * kBand + within % rows;
  *n = within / rows;
}

template <class Tile, class Codes>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kBlocksPerSm)
    gemm_mma_kernel(MmaParams params) {
  constexpr int kASlice = Tile::kBlockM * kSliceBytes;
  constexpr int kSlice = kASlice + Tile::kBlockN * Codes::kWBytes;
  constexpr int kFlush = 512;  // slices: 2^16 codes at most, half of what int32 holds
  const GemmInteger& args = params.args;
  FQ_DYNAMIC_SHARED(uint8_t, shared);

  const int warp = threadIdx.x / kWarp;
  const int group = threadIdx.x / Tile::kGroupThreads, thread = threadIdx.x % Tile::kGroupThreads;
  const Lane<Tile, Codes> lane{warp % Tile::kWarpsM, warp / Tile::kWarpsM % Tile::kWarpsN,
                               static_cast<int>(threadIdx.x % kWarp / 4),
                               static_cast<int>(threadIdx.x % 4)};
  int tile_m, tile_n;
  tile_of(blockIdx.x, params.tiles_m, params.tiles_n, &tile_m, &tile_n);
  const int64_t row0 = static_cast<int64_t>(tile_m) * Tile::kBlockM;
  const int64_t column0 = static_cast<int64_t>(tile_n) * Tile::kBlockN;
  const int rows = args.m - row0 < Tile::kBlockM ? static_cast<int>(args.m - row0) : Tile::kBlockM;
  const int columns =
      args.n - column0 < Tile::kBlockN ? static_cast<int>(args.n - column0) : Tile::kBlockN;
  const uint8_t* const a_tile = args.a + row0 * params.a_row_bytes;
  const uint8_t* const w_tile = args.w + column0 * params.w_row_bytes;

  uint8_t* const ring = shared + group * Tile::kStages * kSlice;

  // Every group makes the same number of steps; a slice past the end is all zeros.
  const int slices = (params.a_row_bytes + kSliceBytes - 1) / kSliceBytes;
  const int steps = (slices + Tile::kWarpsK - 1) / Tile::kWarpsK;
  Loader<Tile::kBlockM, kSliceBytes, Tile::kGroupThreads> a_loader(
      a_tile, rows, params.a_row_bytes, params.a_unit, group * kSliceBytes, thread);
  Loader<Tile::kBlockN, Codes::kWBytes, Tile::kGroupThreads> w_loader(
      w_tile, columns, params.w_row_bytes, params.w_unit, group * Codes::kWBytes, thread);
  const auto load_next = [&](int slot) {
    uint8_t* const to = ring + slot * kSlice;
    a_loader.load(to, Tile::kWarpsK * kSliceBytes);
    w_loader.load(to + kASlice, Tile::kWarpsK * Codes::kWBytes);
  };
  const auto synchronize = [] {
    if constexpr (Tile::kGroupThreads == kWarp)
      __syncwarp();
    else
      __syncthreads();
  };

  // Small tiles have the registers to fetch this early: it comes from memory.
  constexpr bool kColumnsEarly = Tile::kColumns == 4 && Tile::kAnyK;
  Columns mine{};
  if (kColumnsEarly && lane.column(0) < columns) load_columns(mine, args, column0 + lane.column(0));

  // The second set costs nothing in tiles that never use it before the end.
  int32_t sums[Tile::kRows][Tile::kColumns][4] = {};
  uint32_t totals[Tile::kRows][Tile::kColumns][4] = {};
#pragma unroll 1
  for (int step = 0; step < Tile::kStages - 1; ++step) {
    if (step < steps) load_next(step);
    copy_async_commit();
  }
  int read = 0, write = Tile::kStages - 1;
#pragma unroll 1
  for (int step = 0; step < steps; ++step) {
    copy_async_wait<Tile::kStages - 2>();
    synchronize();  // this slice is here for all; the one before it has been read by all
    if (step + Tile::kStages - 1 < steps) load_next(write);
    copy_async_commit();
    const uint8_t* const slice = ring + read * kSlice;
    multiply_slice(sums, lane, slice, slice + kASlice, params.flip);
    read = read + 1 == Tile::kStages ? 0 : read + 1;
    write = write + 1 == Tile::kStages ? 0 : write + 1;
    if (Tile::kAnyK && step % kFlush == kFlush - 1) empty_sums<Codes::kShift>(totals, sums);
  }
  empty_sums<Codes::kShift>(totals, sums);
  copy_async_wait<0>();
  __syncthreads();  // from here on the ring is scratch

  // The sums go through shared memory, 32 columns of a warp at a time: the groups' sums are added
  // there, and the rest is a short loop over a lane's rows. [group][part][half][thread] of int4.
  uint4* const scratch = reinterpret_cast<uint4*>(shared);
#pragma unroll
  for (int block = 0; block < Tile::kColumns / 4; ++block) {
    if (block > 0 && Tile::kWarpsK > 1) __syncthreads();
#pragma unroll
    for (int part = 0; part < Tile::kParts; ++part) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int m = part / 2, n = block * 4 + half * 2, i = part % 2 * 2;
        scratch[scratch_index<Tile>(group, part, half, thread)] = uint4{
            totals[m][n][i], totals[m][n][i + 1], totals[m][n + 1][i], totals[m][n + 1][i + 1]};
      }
    }
    if (Tile::kWarpsK > 1) __syncthreads();

    if (lane.column(block) < columns) {
      if (!kColumnsEarly) load_columns(mine, args, column0 + lane.column(block));
#pragma unroll 1
      for (int part = group; part < Tile::kParts; part += Tile::kWarpsK) {
        if (lane.row(part) >= rows) continue;
        uint32_t eight[8] = {};
#pragma unroll
        for (int other = 0; other < Tile::kWarpsK; ++other)
          add_sums<Tile>(eight, scratch, other, part, thread);
        store_row<Codes>(eight, mine, params, row0 + lane.row(part));
      }
    }
  }
}

}  // namespace fq::cuda
