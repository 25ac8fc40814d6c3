// The kernel and launch of gemm_w4a16: a pure function of the problem and the GPU. Pure C++, no
// CUDA header.
//
// Which arithmetic a problem gets depends on its type, k and groups only, never on m, the GPU or
// alignment: a token's bits are the same in every batch (gemm_w4a16.cuh). Among the kernels of that
// arithmetic the smallest estimate wins, made as in plan_stream.h.
#pragma once

#include <cstdint>

#include "../contract.h"
#include "gpu.h"
#include "plan_stream.h"

namespace fq::cuda {

constexpr int32_t kW16Slice = 128;  // codes
constexpr int32_t kW16Block = 32;   // codes of one word in each of four lanes
constexpr int32_t kW16Spans = 8;    // into which k is cut
constexpr int32_t kW16Stages = 4;   // at most

// kStream: the warps of a block take the spans. Tiles: they take parts of a tile, span by span.
enum class W16Kernel : int32_t { kNone, kGeneral, kStream, kSmallTile, kLargeTile };

struct W16Tile {
  W16Kernel kernel;
  int32_t tokens, rows, threads, registers;
};
constexpr W16Tile kW16Tiles[] = {
    {W16Kernel::kStream, 16, 32, 32 * kW16Spans, 128},
    {W16Kernel::kSmallTile, 32, 64, 128, 128},
    {W16Kernel::kLargeTile, 64, 128, 256, 168},
};

struct W16Query {
  int64_t m, n, k, groups;
  int32_t bits;
  Dtype dtype;
};

struct W16Plan {
  W16Kernel kernel;
  int32_t tokens, rows, stages, shared_bytes;
  int64_t blocks;
  double clocks;
};

constexpr int64_t w16_group(const W16Query& query) {
  return query.groups > 0 ? query.k / query.groups : query.k;
}
// Tensor cores: groups of whole blocks, or one group.
constexpr bool w16_tensor_cores(const W16Query& query) {
  return query.dtype != Dtype::kFloat32 && (query.groups == 1 || w16_group(query) % kW16Block == 0);
}
// Scales may change inside of a slice: every block of it then has its own.
constexpr bool w16_fine(const W16Query& query) {
  return query.groups != 1 && w16_group(query) % kW16Slice != 0;
}

// w, its scales and x, of one slice.
constexpr int32_t w16_stage_bytes(int32_t tokens, int32_t rows, bool fine) {
  return rows * (kW16Slice / 2 + (fine ? 16 : 4)) + tokens * kW16Slice * 2;
}
// The ring, or the sums in the order [token][row], padded as in plan_stream.h. kStream: of each
// warp.
constexpr int32_t w16_ring_bytes(int32_t tokens, int32_t rows, int32_t stages, bool fine) {
  const int32_t ring = stages * w16_stage_bytes(tokens, rows, fine);
  const int32_t sums = tokens * stream_sums_row(rows) * 4;
  return ring > sums ? ring : sums;
}

// shared_bytes 0 where it does not fit.
constexpr W16Plan w16_plan(const Gpu& gpu, const W16Query& query, const W16Tile& tile,
                           int32_t tokens, int32_t stages) {
  constexpr double kWiden = 96, kPair = 24, kStep = 300;
  const bool streams = tile.kernel == W16Kernel::kStream, fine = w16_fine(query);
  const int32_t rings = streams ? kW16Spans : 1;
  const int32_t shared = rings * w16_ring_bytes(tokens, tile.rows, stages, fine);
  W16Plan plan{tile.kernel, tokens, tile.rows, stages, 0, 0, 0};
  const int64_t by_shared = gpu.shared_per_sm / (shared + 1024);
  const int64_t by_registers = gpu.registers_per_sm / (tile.registers * tile.threads);
  const int64_t resident = by_shared < by_registers ? by_shared : by_registers;
  if (shared > gpu.shared_per_block || resident < 1) return plan;
  if (streams && query.m > kMostStreamTokens) return plan;
  plan.shared_bytes = shared;
  plan.blocks = ceil_div(query.m, tokens) * ceil_div(query.n, tile.rows);

  const int64_t sms = gpu.sms > 0 ? gpu.sms : 1, slots = sms * resident;
  const int64_t slices = ceil_div(query.k, kW16Slice);
  const int64_t steps = streams ? ceil_div(slices, kW16Spans) : slices;
  const int64_t ahead = stages - 1 < steps ? stages - 1 : steps;
  const double row_bytes = static_cast<double>(query.k) * (query.bits == 2 ? 2 : 4) / 8 +
                           4.0 * static_cast<double>(query.groups);
  const double rows = static_cast<double>(query.n < tile.rows ? query.n : tile.rows);
  const double w_block = rows * row_bytes;
  const double part = static_cast<double>(rings * ahead) / static_cast<double>(slices);
  const double under_way = w_block * (part < 1 ? part : 1);
  const double there = static_cast<double>(query.m < tokens ? query.m : tokens);
  const double x_row = 2.0 * static_cast<double>(query.k);
  const double of_sm = static_cast<double>(ceil_div(plan.blocks, sms));
  const double waves = static_cast<double>(ceil_div(plan.blocks, slots));
  // Blocks of other tokens find these weights in L2.
  const double memory = weights_clocks(gpu, ceil_div(query.n, tile.rows), slots, w_block, under_way,
                                       streams ? kStreamShare : kTiledShare) +
                        static_cast<double>(query.m) *
                            (x_row + 2.0 * static_cast<double>(query.n)) / bytes_per_clock(gpu);
  const double loads = of_sm * (w_block + there * x_row) / kL2Bytes;
  // Instructions of a block for a slice: widening in each warp that has these rows, tokens into
  // pairs in each warp that has these, products.
  const double down = tile.rows / 16, across = tokens / 8;
  const double each = down * kWiden * (tile.kernel == W16Kernel::kLargeTile ? 2 : 1) +
                      across * kPair * (streams ? 1 : 4) + down * across * 8 + 60;
  const double issue = of_sm * static_cast<double>(slices) * each / 4;
  const double per_clock = gpu.arch == 80 || gpu.arch == 100 ? 1024 : gpu.arch == 90 ? 1280 : 256;
  const double products =
      of_sm * static_cast<double>(slices) * kW16Slice * tile.rows * tokens / per_clock;
  const double busy = issue > products ? issue : products;
  const double of_warp = streams ? each : each / (tile.threads / 32);
  const double chain = waves * static_cast<double>(steps) * (kStep + 2 * of_warp);
  plan.clocks = total_clocks(gpu, memory, loads, busy, chain) + 25.0 * rings;
  return plan;
}

constexpr W16Plan plan_w4a16(const Gpu& gpu, const W16Query& query) {
  if (gpu.arch < 80) return {W16Kernel::kNone, 0, 0, 0, 0, 0, 0};
  W16Plan best{W16Kernel::kGeneral, 0, 0, 0, 0, 0, 0};
  if (!w16_tensor_cores(query)) return best;
  for (const W16Tile& tile : kW16Tiles)
    for (int32_t stages = 2; stages <= kW16Stages; ++stages)
      for (int32_t tokens = tile.tokens;; tokens = 8) {  // 8 with fewer bytes of x, more blocks
        const W16Plan plan = w16_plan(gpu, query, tile, tokens, stages);
        if (plan.shared_bytes > 0 &&
            (best.kernel == W16Kernel::kGeneral || plan.clocks < best.clocks))
          best = plan;
        if (tile.kernel != W16Kernel::kStream || tokens == 8) break;
      }
  return best;
}

}  // namespace fq::cuda
