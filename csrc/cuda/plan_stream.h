// The shape of a weight-streaming launch (gemm_stream.cuh): a pure function of the problem and the
// GPU. Pure C++, no CUDA header. Of plan_gemm.h.
//
// For few tokens a GEMM is as fast as its weights arrive. Memory answers kLatencyNs after it is
// asked, so kLatencyNs * bandwidth bytes have to be under way at all times (17 KiB for each SM of
// an H100, 24 of an H200, 11 of an A100, 5 of an RTX 4090). A warp has stages - 1 slices of
// kStreamRow bytes of each of its rows under way; the planner weighs warps, stages and rows of a
// block:
//
//   rate   = min(share of the bandwidth, bytes under way / latency)
//   memory = weights / rate, and half a block's time if not all blocks live at once
//   loads  = (weights + activations of a block) * blocks of an SM / kL2Bytes
//   issue  = instructions of a slice * slices of an SM / 4
//   chain  = waves of blocks * slices of a warp * (kStep + 2 * instructions of a slice)
//
// and the estimate is the largest of the three, a tenth of the others, and the start. The native
// 4-bit product of sm_8x would save some of the instructions: nowhere there is `issue` above a half
// of `memory` for up to 16 tokens (tests/cuda/test_plan_stream.py), so there is no kernel with it.
#pragma once

#include <cstdint>

#include "gpu.h"

namespace fq::cuda {

constexpr int32_t kStreamRow = 64;  // bytes of a row of w in a slice
constexpr int32_t kMostStreamStages = 6;
constexpr int32_t kMostStreamWarps = 16;
constexpr int64_t kMostStreamTokens = 1 << 16;  // of a grid
constexpr double kLatencyNs = 700;              // of memory under load: an estimate
constexpr double kL2Bytes = 40;                 // a clock, from the L2 cache to an SM: an estimate
constexpr double kStreamShare = 0.9;  // of the bandwidth: estimates, for kernels whose warps
constexpr double kTiledShare = 0.85;  // wait for themselves only, and with barriers of blocks

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The two kernels per pair of widths: the most tokens of a block (it may have fewer, in eights),
// its rows of w, and the registers that a thread may take.
struct StreamTile {
  int32_t tokens, rows, registers;
};
constexpr StreamTile kStreamTiles[] = {{8, 16, 64}, {32, 32, 128}};

struct StreamPlan {
  int32_t tokens, rows;   // of a block
  int32_t warps, stages;  // warps split k, and each has a ring
  int32_t cluster;        // blocks that split k, too: sm_90
  int32_t resident;       // blocks of an SM
  int32_t shared_bytes;
  int64_t blocks;
  double clocks;
};

// Bytes of a row of `a` that stand against kStreamRow bytes of a row of `w`.
constexpr int32_t stream_a_row(int32_t a_bits, int32_t w_bits) {
  return kStreamRow * a_bits / w_bits;
}

constexpr int32_t stream_stage_bytes(int32_t tokens, int32_t rows, int32_t a_bits, int32_t w_bits) {
  return rows * kStreamRow + tokens * stream_a_row(a_bits, w_bits);
}

// Sums of a warp in shared memory: a row of them per token. The pad keeps lanes in different banks.
constexpr int32_t stream_sums_row(int32_t rows) { return rows + 4; }

// The ring, in which the sums lie afterwards, and those of the whole block behind it.
constexpr int32_t stream_shared_bytes(int32_t tokens, int32_t rows, int32_t warps, int32_t stages,
                                      int32_t a_bits, int32_t w_bits) {
  return warps * stages * stream_stage_bytes(tokens, rows, a_bits, w_bits);
}

constexpr int32_t warps_per_sm(int32_t arch) {
  return arch == 86 || arch == 89 || arch == 120 ? 48 : 64;
}

constexpr double gigahertz(int32_t arch) {
  return arch == 80 ? 1.4 : arch == 89 || arch == 120 ? 2.4 : 1.7;
}

constexpr double bytes_per_clock(const Gpu& gpu) {
  return (gpu.bandwidth_gb > 0 ? gpu.bandwidth_gb : 1000) / gigahertz(gpu.arch);
}

// Clocks until the weights are there: `blocks` that read `bytes` each, `slots` of them at a time,
// with under_way bytes asked for in each; share: what such kernels reach of the bandwidth. Blocks
// beyond the first ones leave half a block's time to the last.
constexpr double weights_clocks(const Gpu& gpu, int64_t blocks, int64_t slots, double bytes,
                                double under_way, double share) {
  const double latency = kLatencyNs * gigahertz(gpu.arch);
  const int64_t live = blocks < slots ? blocks : slots;
  const double asked = static_cast<double>(live) * under_way / latency;
  const double most = bytes_per_clock(gpu) * share, rate = asked < most ? asked : most;
  return static_cast<double>(blocks) * bytes / rate +
         (blocks > slots ? 0.5 * latency * bytes / under_way : 0);
}

// Of a launch: the start, the memory's first answer, the largest of its bounds and a tenth of the
// others.
constexpr double kStart = 2000;
constexpr double total_clocks(const Gpu& gpu, double a, double b, double c, double d = 0) {
  const double ab = a > b ? a : b, cd = c > d ? c : d, most = ab > cd ? ab : cd;
  return kStart + kLatencyNs * gigahertz(gpu.arch) + most + 0.1 * (a + b + c + d - most);
}

// Instructions of a warp for one slice: widening, products, loads, copies.
constexpr double stream_instructions(int32_t tokens, int32_t rows, int32_t a_bits, int32_t w_bits) {
  const int32_t down = rows / 16, across = tokens / 8, steps = w_bits == 4 ? 4 : 2;
  const int32_t widen_w = w_bits == 4 ? 24 : 0;
  const int32_t widen_a = w_bits == 4 ? 12 : 0;  // bytes: eight, and a second load
  const int32_t copies = stream_stage_bytes(tokens, rows, a_bits, w_bits) / 512;
  return down * (widen_w + 2.0) + across * (widen_a + 2.0) + down * across * steps + 3.0 * copies +
         60;
}

// Bytes of w that a block has under way at once; steps: slices of a warp.
constexpr int64_t stream_under_way(const StreamPlan& plan, int64_t steps) {
  const int64_t ahead = plan.stages - 1 < steps ? plan.stages - 1 : steps;
  return int64_t{plan.warps} * ahead * plan.rows * kStreamRow;
}

// What one such launch would take; shared_bytes 0 where it does not fit.
constexpr StreamPlan stream_plan(const Gpu& gpu, int64_t m, int64_t n, int64_t k, int32_t a_bits,
                                 int32_t w_bits, const StreamTile& tile, int32_t tokens,
                                 int32_t warps, int32_t stages, int32_t cluster) {
  constexpr double kReduce = 25, kMeet = 700, kStep = 300;  // a warp's sums; a cluster's
  StreamPlan plan{tokens, tile.rows, warps, stages, cluster, 0, 0, 0, 0};
  const int32_t shared = stream_shared_bytes(tokens, tile.rows, warps, stages, a_bits, w_bits);
  const int64_t by_shared = gpu.shared_per_sm / (shared + 1024);
  const int64_t by_registers = gpu.registers_per_sm / (tile.registers * 32 * warps);
  const int64_t by_warps = warps_per_sm(gpu.arch) / warps;
  const int64_t least = by_shared < by_registers ? by_shared : by_registers;
  const int64_t resident = least < by_warps ? least : by_warps;
  if (shared > gpu.shared_per_block || resident < 1) return plan;
  const int64_t sms = gpu.sms > 0 ? gpu.sms : 1;
  const int64_t w_row = k * w_bits / 8, slices = ceil_div(w_row, kStreamRow);
  const int64_t splits = int64_t{warps} * cluster, steps = ceil_div(slices, splits);
  const int64_t token_tiles = ceil_div(m, tokens), row_tiles = ceil_div(n, tile.rows);
  plan.shared_bytes = shared;
  plan.resident = static_cast<int32_t>(resident);
  plan.blocks = token_tiles * row_tiles * cluster;

  const int64_t under_way = stream_under_way(plan, steps);
  const double rows = static_cast<double>(n < tile.rows ? n : tile.rows);
  const double there = static_cast<double>(m < tokens ? m : tokens);
  const double w_block = rows * static_cast<double>(w_row) / cluster;
  const double a_row = static_cast<double>(k) * a_bits / 8;
  const double memory =
      weights_clocks(gpu, row_tiles * cluster, sms * resident, w_block,
                     static_cast<double>(under_way), kStreamShare) +
      static_cast<double>(m) * (a_row + 2.0 * static_cast<double>(n)) / bytes_per_clock(gpu);
  const double of_sm = static_cast<double>(ceil_div(plan.blocks, sms));
  const double loads = of_sm * (w_block + there * a_row / cluster) / kL2Bytes;
  const double instructions = stream_instructions(tokens, tile.rows, a_bits, w_bits);
  const double issue = of_sm * static_cast<double>(warps * steps) * instructions / 4;
  const double chain = static_cast<double>(ceil_div(plan.blocks, sms * resident) * steps) *
                       (kStep + 2 * instructions);
  plan.clocks =
      total_clocks(gpu, memory, loads, issue, chain) + kReduce * warps + (cluster > 1 ? kMeet : 0);
  return plan;
}

// The best of them; shared_bytes 0 if there is none. The widest block is weighed for few tokens,
// too: they never cost more than many.
constexpr StreamPlan plan_stream(const Gpu& gpu, int64_t m, int64_t n, int64_t k, int32_t a_bits,
                                 int32_t w_bits) {
  constexpr int32_t kStages[] = {2, 3, 4, 6};
  StreamPlan best{};
  if (m > kMostStreamTokens) return best;
  for (const StreamTile& tile : kStreamTiles) {
    const int32_t least = m < tile.tokens ? static_cast<int32_t>(ceil_div(m, 8) * 8) : tile.tokens;
    for (int32_t tokens = least;; tokens = tile.tokens) {
      for (int32_t cluster = 1; cluster <= (gpu.arch == 90 ? 4 : 1); cluster *= 2) {
        if (cluster > 1 && ceil_div(n, tile.rows) * cluster > 2 * gpu.sms) break;
        for (int32_t warps = 4; warps <= kMostStreamWarps; warps *= 2)
          for (const int32_t stages : kStages) {
            const StreamPlan plan =
                stream_plan(gpu, m, n, k, a_bits, w_bits, tile, tokens, warps, stages, cluster);
            if (plan.shared_bytes == 0) continue;
            if (best.shared_bytes == 0 || plan.clocks < best.clocks) best = plan;
          }
      }
      if (tokens == tile.tokens) break;
    }
  }
  return best;
}

}  // namespace fq::cuda
